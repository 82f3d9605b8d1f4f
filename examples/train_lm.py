"""Trains a small language model, byte by byte, on a CPU in a few minutes.

    uv run examples/train_lm.py
    uv run examples/train_lm.py --mask window:64 --mechanism blockwise
    uv run examples/train_lm.py --resume      # after an interruption, of whatever kind

The model is a decoder-only transformer (see `lm/model.py`), the text the documentation that
comes with Python. A tenth of it is held out; there, the model is compared with one that
counts how often each byte followed the four bytes before it.
"""

import argparse
import dataclasses
import hashlib
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from lm import checkpoint, curve
from lm.caches import init_caches
from lm.config import add_flags, flag, given, parse_mask, RunConfig
from lm.data import read_text, Split, split
from lm.model import num_parameters
from lm.ngram import WittenBell
from lm.pick import Sampling
from lm.sample import generate
from lm.train import evaluate, init_state, restore, State, train_step
from tqdm import tqdm


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = result.add_argument_group(
        "what defines a run (with --resume, taken from the run)"
    )
    add_flags(run, RunConfig)
    files = result.add_argument_group("files")
    files.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/train_lm"),
        metavar="DIR",
        help="where checkpoint, curve and sample go, in place of those of an earlier run "
        "(default: %(default)s)",
    )
    files.add_argument(
        "--checkpoint-every",
        type=int,
        default=100,
        metavar="STEPS",
        help="steps between checkpoints (default: %(default)s)",
    )
    files.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in DIR from its checkpoint, bit for bit",
    )
    sample = result.add_argument_group("the sample")
    sample.add_argument("--prompt", default="The ", help="default: %(default)r")
    sample.add_argument(
        "--sample-bytes", type=int, default=400, help="default: %(default)s"
    )
    add_flags(sample, Sampling)
    return result


def check(args: argparse.Namespace) -> None:
    """**Raises:** a `ValueError` for a bad flag of those that do not define the run."""
    if args.checkpoint_every < 1:
        raise ValueError(
            f"--checkpoint-every must be positive; got {args.checkpoint_every}"
        )
    if args.prompt == "":
        raise ValueError("--prompt must not be empty")
    if args.sample_bytes < 0:
        raise ValueError(f"--sample-bytes must be >= 0; got {args.sample_bytes}")


def header_of(config: RunConfig, text: UInt8[np.ndarray, " text"]) -> dict[str, Any]:
    """What a checkpoint of a run says of it."""
    return {
        "config": dataclasses.asdict(config),
        "text_sha256": hashlib.sha256(text.tobytes()).hexdigest(),
    }


class Run(NamedTuple):
    config: RunConfig
    header: dict[str, Any]  # of its checkpoints
    text: Split
    state: State


def start(config: RunConfig, out: pathlib.Path) -> Run:
    """A new run, in place of one that may be in `out`.

    **Raises:** a `ValueError` or an `OSError` if there is no such text, or not enough.
    """
    text = read_text(config.text)
    header = header_of(config, text)
    run = Run(config, header, split(text, config.seq), init_state(config))
    out.mkdir(parents=True, exist_ok=True)
    # Whenever a run is killed, there is something to resume.
    checkpoint.save(out / "checkpoint", header, run.state)
    return run


def resume(asked: dict[str, Any], out: pathlib.Path) -> Run:
    """The run in `out`, from where it was.

    **Raises:** a `ValueError` or an `OSError` if it cannot go on, or not as `asked`.
    """
    saved = checkpoint.read(out / "checkpoint")
    config, state = restore(saved)
    for name, value in asked.items():
        if value != getattr(config, name):
            raise ValueError(
                f"{flag(name)} is {value}, but the run to resume has "
                f"{getattr(config, name)}; leave it out, or start a new run"
            )
    text = read_text(config.text)
    if saved.header != header_of(config, text):
        raise ValueError(
            f"the text ({config.text or 'pydoc_data, which differs between Pythons'}) is "
            "not the one that the run to resume was started on"
        )
    return Run(config, saved.header, split(text, config.seq), state)


def train(run: Run, out: pathlib.Path, checkpoint_every: int) -> State:
    """All steps that are left, with a progress bar."""
    config, header, text, state = run
    train_text = jnp.asarray(text.train)
    tokens = config.batch * config.seq
    evaluate_every = max(config.steps // 8, 1)
    done = int(state.step)
    with tqdm(
        desc="training",
        initial=done * tokens,
        total=config.steps * tokens,
        unit="token",
        unit_scale=True,
        # In a log file, a line now and then is enough.
        mininterval=0.1 if sys.stderr.isatty() else 10,
    ) as bar:
        for step in range(done + 1, config.steps + 1):
            state = train_step((config, train_text), state)
            loss = float(state.train_loss[step - 1])
            if not math.isfinite(loss):
                sys.exit(f"the loss of step {step} is {loss}: try a smaller --lr")
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(tokens)
            last = step == config.steps
            if step % evaluate_every == 0 or last:
                held_out = evaluate(state.model, text, config.seq)
                bar.write(f"step {step:5}: held-out loss {held_out:.4f} nats a byte")
                new = state.validation_loss.at[step - 1].set(held_out)
                state = dataclasses.replace(state, validation_loss=new)
            if step % checkpoint_every == 0 or last:
                checkpoint.save(out / "checkpoint", header, state)
    return state


def main(argv: list[str] | None = None) -> None:
    began = time.monotonic()
    arguments = parser()
    args = arguments.parse_args(argv)
    try:
        check(args)
        sampling = Sampling(**given(args, Sampling))
        asked = given(args, RunConfig)
        run = (
            resume(asked, args.out) if args.resume else start(RunConfig(**asked), args.out)
        )
    except (OSError, ValueError) as error:
        arguments.error(str(error))

    config, _, text, state = run
    ngram_loss = WittenBell(text.train).loss(text.train, text.held_out)
    print(f"text        {len(text.train):,} bytes, and {len(text.held_out):,} held out")
    print(f"n-gram      {ngram_loss:.4f} nats a held-out byte")
    print(f"model       {num_parameters(state.model):,} parameters")
    print(f"attention   {parse_mask(config.mask)}, by {config.mechanism}")
    print(f"output      {args.out}", flush=True)

    try:
        state = train(run, args.out, args.checkpoint_every)
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume continues from the last checkpoint")

    curve.draw(
        args.out / "loss.png",
        np.asarray(state.train_loss),
        np.asarray(state.validation_loss),
        ngram_loss,
    )
    prompt = args.prompt.encode(errors="surrogateescape")
    caches = init_caches(config, "static", 1, len(prompt) + args.sample_bytes)
    sampled = generate(state.model, [prompt], args.sample_bytes, caches, sampling)
    # The last character may be a part of one.
    sample = (prompt + bytes(byte for (byte,) in sampled)).decode(errors="replace")
    (args.out / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"\n{sample}\n")
    loss = float(state.validation_loss[-1])
    print(f"model       {loss:.4f} nats a held-out byte")
    print(f"n-gram      {ngram_loss:.4f} (Witten-Bell, four bytes of context)")
    print(f"time        {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
