"""Continues prompts with the language model of `train_lm.py`, byte by byte, as it is drawn.

    uv run examples/generate.py                                  # trains a little, first
    uv run examples/generate.py --checkpoint runs/train_lm --prompt "class "
    uv run examples/generate.py --checkpoint runs/train_lm --prompt "The " --prompt "If the"

Prompts may be of different lengths; they are read at once and go on together. What the
model has read is kept in a key-value cache of your choice, which the compiled step updates
in place.
"""

import argparse
import codecs
import pathlib
import sys
import time

import train_lm
from lm import checkpoint
from lm.caches import CACHES, init_caches, num_bytes
from lm.config import add_flags, given, RunConfig
from lm.model import LanguageModel, num_parameters
from lm.pick import Sampling
from lm.sample import generate
from lm.train import restore


STEPS = 150


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = result.add_argument_group("the model")
    model.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        metavar="DIR",
        help="the --out of train_lm.py (default: train one, in runs/generate)",
    )
    model.add_argument(
        "--steps",
        type=int,
        help=f"steps to train for, where there is no checkpoint (default: {STEPS})",
    )
    text = result.add_argument_group("the text")
    text.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be repeated; the first one's text is shown as it is drawn, and the "
        "others' after it (default: 'The ')",
    )
    text.add_argument(
        "--tokens",
        type=int,
        default=400,
        help="bytes to continue each prompt with (default: %(default)s)",
    )
    text.add_argument(
        "--cache",
        choices=CACHES,
        default="static",
        help="where keys and values are kept (default: %(default)s)",
    )
    sampling = result.add_argument_group("how bytes are drawn")
    sampling.add_argument("--greedy", action="store_true", help="as --temperature 0")
    add_flags(sampling, Sampling)
    return result


def sampling_of(args: argparse.Namespace) -> Sampling:
    options = given(args, Sampling)
    if args.greedy:
        if options.setdefault("temperature", 0.0) != 0:
            raise ValueError(
                f"--greedy is --temperature 0; got --temperature {args.temperature} too"
            )
    return Sampling(**options)


def trained(args: argparse.Namespace) -> tuple[RunConfig, LanguageModel]:
    """The model of a checkpoint, or one that is trained now.

    **Raises:** a `ValueError` or an `OSError` if that is not possible.
    """
    if args.checkpoint is None:
        out = pathlib.Path("runs/generate")
        run = train_lm.start(RunConfig(steps=args.steps or STEPS), out)
        print(f"training    {run.config.steps} steps, to {out}", flush=True)
        return run.config, train_lm.train(run, out, run.config.steps).model
    config, state = restore(checkpoint.read(args.checkpoint / "checkpoint"))
    return config, state.model


def check(args: argparse.Namespace) -> None:
    """**Raises:** a `ValueError` for a bad flag."""
    if "" in args.prompt:
        raise ValueError("--prompt must not be empty")
    if args.tokens < 1:
        raise ValueError(f"--tokens must be positive; got {args.tokens}")
    if args.steps is not None:
        if args.checkpoint is not None:
            raise ValueError("--steps is for training, and must not be with --checkpoint")
        if args.steps < 1:
            raise ValueError(f"--steps must be positive; got {args.steps}")


def main(argv: list[str] | None = None) -> None:
    arguments = parser()
    args = arguments.parse_args(argv)
    args.prompt = ["The "] if args.prompt is None else args.prompt
    try:
        check(args)
        sampling = sampling_of(args)
        config, model = trained(args)
    except (OSError, ValueError) as error:
        arguments.error(str(error))

    prompts = [prompt.encode(errors="surrogateescape") for prompt in args.prompt]
    capacity = max(map(len, prompts)) + args.tokens
    caches = init_caches(config, args.cache, len(prompts), capacity)
    size = f"{num_bytes(caches):,} bytes for {len(prompts)} x {capacity:,} tokens"
    print(f"model       {num_parameters(model):,} parameters")
    print(f"cache       {args.cache}, {size}\n", flush=True)

    # The last character may be a part of one.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(decoder.decode(prompts[0]), end="", flush=True)
    drawn: list[list[int]] = []
    times: list[float] = []
    for step in generate(model, prompts, args.tokens, caches, sampling):
        times.append(time.monotonic())
        drawn.append(step)
        print(decoder.decode(bytes(step[:1])), end="", flush=True)
    print(decoder.decode(b"", final=True))
    for prompt, sequence in list(zip(prompts, zip(*drawn)))[1:]:
        print("\n---\n" + (prompt + bytes(sequence)).decode(errors="replace"))

    # The first two steps are those that are compiled, for prompts and for one token.
    if len(times) > 2:
        speed = len(prompts) * (len(times) - 2) / (times[-1] - times[1])
        print(f"\nspeed       {speed:,.0f} tokens/s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
