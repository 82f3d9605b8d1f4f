"""The flags that the examples have in common."""

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType


def parser(description: str | None, parts: tuple[str, ...]) -> argparse.ArgumentParser:
    """A parser with `--seed`, and `--without`, which takes one of `parts`."""
    result = _parser(description, parts)
    add(result, "--seed", 0, least=0)
    return result


def flags(
    argv: list[str] | None,
    doc: str | None,
    part: str,
    *,
    multiples: Mapping[str, int] = MappingProxyType({}),
    **defaults: int | float,
) -> argparse.Namespace:
    """Numbers, all of which must be positive, and some `multiples` of others; and
    `--without`, which takes `part`."""
    parser = _parser(doc, (part,))
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"(default: {default})"
        )
    args = parser.parse_args(argv)
    for name in defaults:
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            parser.error(f"--{name} must be positive; got {value}")
        if value % multiples.get(name, value):
            parser.error(f"--{name} must be a multiple of {multiples[name]}; got {value}")
    return args


def _parser(description: str | None, parts: tuple[str, ...]) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--without", choices=parts, help="leave this out, and see the example fail"
    )
    return result


def add(
    parser: argparse.ArgumentParser, name: str, default: int, text: str = "", least: int = 1
) -> None:
    """Adds a flag for an integer of at least `least`."""
    parser.add_argument(
        name, type=at_least(least), default=default, help=f"{text} (default: {default})"
    )


def at_least(least: int) -> Callable[[str], int]:
    """What reads an integer of at least `least`, as the `type` of a flag."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}; got {text}"
            )
        return number

    return read
