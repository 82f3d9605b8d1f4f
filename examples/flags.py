"""Flags of the small scripts."""

import argparse


def flags(
    argv: list[str] | None, doc: str | None, without: str, **defaults: int | float
) -> argparse.Namespace:
    """Numbers, all of which must be positive, and `--without-mask` or `--without-score`."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help="default: %(default)s"
        )
    parser.add_argument(
        f"--without-{without}",
        dest="without",
        action="store_true",
        help=f"take the {without} out, so that the check fails",
    )
    args = parser.parse_args(argv)
    for name in defaults:
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            parser.error(f"--{name} must be positive; got {value}")
    return args
