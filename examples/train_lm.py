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

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from lm import checkpoint, curve
from lm.config import flag, parse_mask, RunConfig
from lm.data import read_text, Split, split
from lm.model import num_parameters
from lm.ngram import WittenBell
from lm.sample import generate
from lm.train import evaluate, init_state, State, train_step
from tqdm import tqdm


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = result.add_argument_group(
        "what defines a run (with --resume, taken from the run)"
    )
    for field in dataclasses.fields(RunConfig):
        shown = "" if field.default is None else f" (default: {field.default})"
        run.add_argument(
            flag(field.name),
            # Only what was asked for is in the result, so that a resumed run can tell.
            default=argparse.SUPPRESS,
            type=str if field.default is None else type(field.default),
            metavar="FILE" if field.name == "text" else field.name.upper(),
            help=field.metadata["help"] + shown,
        )
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
    sample.add_argument(
        "--temperature", type=float, default=0.7, help="default: %(default)s; 0 is greedy"
    )
    sample.add_argument(
        "--top-k", type=int, default=40, help="bytes to draw from (default: %(default)s)"
    )
    sample.add_argument("--sample-seed", type=int, default=0, help="default: %(default)s")
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
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature must be >= 0; got {args.temperature}")
    if not 1 <= args.top_k <= 256:
        raise ValueError(f"--top-k must be in [1, 256]; got {args.top_k}")
    if not 0 <= args.sample_seed < 2**32:
        raise ValueError(f"--sample-seed must be in [0, 2**32); got {args.sample_seed}")


class Run(NamedTuple):
    config: RunConfig
    header: dict[str, Any]  # of its checkpoints
    text: Split
    state: State


def start(args: argparse.Namespace) -> Run:
    """A new run, or the one in `--out` from where it was.

    **Raises:** a `ValueError` or an `OSError` if that is not possible.
    """
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(RunConfig)
        if hasattr(args, field.name)
    }
    if args.resume:
        saved = checkpoint.read(args.out / "checkpoint")
        config = RunConfig(**saved.header["config"])
        for name, value in given.items():
            if value != getattr(config, name):
                raise ValueError(
                    f"{flag(name)} is {value}, but the run to resume has "
                    f"{getattr(config, name)}; leave it out, or start a new run"
                )
    else:
        saved = None
        config = RunConfig(**given)

    text = read_text(config.text)
    header = {
        "config": dataclasses.asdict(config),
        "text_sha256": hashlib.sha256(text.tobytes()).hexdigest(),
    }
    if saved is None:
        run = Run(config, header, split(text, config.seq), init_state(config))
        args.out.mkdir(parents=True, exist_ok=True)
        # Whenever a run is killed, there is something to resume.
        checkpoint.save(args.out / "checkpoint", header, run.state)
        return run
    if saved.header != header:
        raise ValueError(
            f"the text ({config.text or 'pydoc_data, which differs between Pythons'}) is "
            "not the one that the run to resume was started on"
        )
    like = eqx.filter_eval_shape(init_state, config)  # shapes and dtypes, no numbers
    return Run(config, header, split(text, config.seq), saved.restore(like))


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
        run = start(args)
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
    sampled = generate(
        state.model,
        prompt,
        args.sample_bytes,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.sample_seed,
    )
    # The last character may be a part of one.
    sample = (prompt + bytes(sampled)).decode(errors="replace")
    (args.out / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"\n{sample}\n")
    loss = float(state.validation_loss[-1])
    print(f"model       {loss:.4f} nats a held-out byte")
    print(f"n-gram      {ngram_loss:.4f} (Witten-Bell, four bytes of context)")
    print(f"time        {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
