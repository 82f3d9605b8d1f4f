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
import pathlib
import sys
import time

import jax.numpy as jnp
import numpy as np
from lm import checkpoint, curve
from lm.config import flag, RunConfig
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
        help="where checkpoint, curve and sample go (default: %(default)s)",
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


def start(args: argparse.Namespace) -> tuple[RunConfig, Split, State]:
    """A new run, or the one in `--out` from where it was.

    **Raises:** a `ValueError` or an `OSError` if that is not possible.
    """
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(RunConfig)
        if hasattr(args, field.name)
    }
    if not args.resume:
        config = RunConfig(**given)
        text = read_text(config.text)
        parts = split(text, config.seq)
        args.out.mkdir(parents=True, exist_ok=True)
        state = init_state(config)
        save(args.out, config, text, state)
        return config, parts, state

    saved = checkpoint.read(args.out / "checkpoint")
    config = RunConfig(**saved.header["config"])
    for name, value in given.items():
        if value != getattr(config, name):
            raise ValueError(
                f"{flag(name)} is {value}, but the run to resume has "
                f"{getattr(config, name)}; leave it out, or start a new run"
            )
    text = read_text(config.text)
    if digest(text) != saved.header["text_sha256"]:
        raise ValueError(
            f"the text ({config.text or 'pydoc_data, which differs between Pythons'}) is "
            "not the one that the run to resume was started on"
        )
    return config, split(text, config.seq), saved.restore(init_state(config))


def digest(text: np.ndarray) -> str:
    return hashlib.sha256(text.tobytes()).hexdigest()


def save(out: pathlib.Path, config: RunConfig, text: np.ndarray, state: State) -> None:
    header = {"config": dataclasses.asdict(config), "text_sha256": digest(text)}
    checkpoint.save(out / "checkpoint", header, state)


def train(
    config: RunConfig, parts: Split, state: State, out: pathlib.Path, checkpoint_every: int
) -> State:
    """All steps that are left, with a progress bar."""
    text = np.concatenate(parts)
    train_text = jnp.asarray(parts.train)
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
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(tokens)
            last = step == config.steps
            if step % evaluate_every == 0 or last:
                held_out = evaluate(state.model, parts, config.seq)
                bar.write(f"step {step:5}: held-out loss {held_out:.4f} nats a byte")
                new = state.validation_loss.at[step - 1].set(held_out)
                state = dataclasses.replace(state, validation_loss=new)
            if step % checkpoint_every == 0 or last:
                save(out, config, text, state)
    return state


def main(argv: list[str] | None = None) -> None:
    began = time.monotonic()
    arguments = parser()
    args = arguments.parse_args(argv)
    try:
        check(args)
        config, parts, state = start(args)
    except (OSError, ValueError) as error:
        arguments.error(str(error))

    ngram_loss = WittenBell(parts.train).loss(parts.train, parts.held_out)
    print(f"text        {len(parts.train):,} bytes, and {len(parts.held_out):,} held out")
    print(f"n-gram      {ngram_loss:.4f} nats a held-out byte")
    print(f"model       {num_parameters(state.model):,} parameters, {config.attention}")
    print(f"output      {args.out}", flush=True)

    try:
        state = train(config, parts, state, args.out, args.checkpoint_every)
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume continues from the last checkpoint")

    curve.draw(
        args.out / "loss.png",
        np.asarray(state.train_loss),
        np.asarray(state.validation_loss),
        ngram_loss,
    )
    sample = bytes(
        generate(
            state.model,
            args.prompt.encode(),
            args.sample_bytes,
            temperature=args.temperature,
            top_k=args.top_k,
            seed=args.sample_seed,
        )
    )
    # A sample may end in the middle of a character.
    sample = args.prompt + sample.decode(errors="replace")
    (args.out / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"\n{sample}\n")
    loss = float(state.validation_loss[-1])
    print(f"model       {loss:.4f} nats a held-out byte")
    print(f"n-gram      {ngram_loss:.4f} (Witten-Bell, four bytes of context)")
    print(f"time        {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
