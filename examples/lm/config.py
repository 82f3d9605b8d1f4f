"""What defines a run, as a value. Each field is a flag of the command line too."""

import argparse
import dataclasses
from typing import Any

import eqx_attention as eqa


MECHANISMS = ("auto", "vanilla", "blockwise")


def option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Two runs of equal `RunConfig`s on the same text end in the same bits, however often
    either was interrupted.

    **Raises:** a `ValueError` that names the flag, for what cannot be trained.
    """

    text: str | None = option(
        None, "file to train on (default: the Python documentation in pydoc_data)"
    )
    mechanism: str = option("auto", f"how to attend: {', '.join(MECHANISMS)}")
    mask: str = option(
        "causal",
        "which earlier bytes each byte sees: causal (all of them), window:N (the last N, "
        "itself included), chunked:N (those in its own chunk of N), or several of these "
        "joined by commas",
    )
    steps: int = option(1200, "number of training steps")
    batch: int = option(8, "sequences a step")
    seq: int = option(256, "bytes a sequence")
    width: int = option(128, "channels a token")
    depth: int = option(3, "number of transformer blocks")
    heads: int = option(4, "query heads")
    kv_heads: int = option(2, "key and value heads; query heads share them")
    ff_block: int = option(
        64, "tokens whose hidden layer exists at a time in the feed-forward network"
    )
    lr: float = option(6e-3, "highest learning rate")
    weight_decay: float = option(0.1, "weight decay of all matrices")
    seed: int = option(0, "seed of the initial weights and of the order of the data")

    def __post_init__(self):
        for name in (
            *("steps", "batch", "seq", "width", "depth"),
            *("heads", "kv_heads", "ff_block", "lr"),
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{flag(name)} must be positive; got {getattr(self, name)}"
                )
        if self.seq < 4:
            # The n-gram model, too, looks back that far.
            raise ValueError(f"--seq must be at least 4; got {self.seq}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"--weight-decay must be >= 0; got {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in [0, 2**32); got {self.seed}")
        if self.width % self.heads != 0:
            raise ValueError(
                f"--heads must divide --width; got {self.heads} and {self.width}"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(
                "--width / --heads must be even, for rotary embeddings; got "
                f"{self.width} / {self.heads} = {self.head_dim}"
            )
        if self.heads % self.kv_heads != 0:
            raise ValueError(
                f"--kv-heads must divide --heads; got {self.kv_heads} and {self.heads}"
            )
        if self.mechanism not in MECHANISMS:
            raise ValueError(
                f"--mechanism must be one of {', '.join(MECHANISMS)}; got "
                f"{self.mechanism!r}"
            )
        parse_mask(self.mask)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def attention(self) -> eqa.AttentionConfig:
        """What to attend to is one value, how to compute it another."""
        return eqa.AttentionConfig(mask=parse_mask(self.mask), mechanism=self.mechanism)


def flag(name: str) -> str:
    """The command line's name for a field."""
    return "--" + name.replace("_", "-")


def add_flags(group: Any, defaults: Any, leave_out: tuple[str, ...] = ()) -> None:
    """Adds a flag for each field of a dataclass to a group of arguments."""
    for field in dataclasses.fields(defaults):
        if field.name in leave_out:
            continue
        default = getattr(defaults, field.name)
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(
            flag(field.name),
            # Only what was asked for is in the result, so that `given` can tell.
            default=argparse.SUPPRESS,
            type=str if default is None else type(default),
            metavar="FILE" if field.name == "text" else field.name.upper(),
            help=field.metadata["help"] + shown,
        )


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """What the command line says of the fields."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def parse_mask(spec: str) -> eqa.AbstractMask:
    """`"window:256"` is `Causal() & SlidingWindow(255)`, and so on. Always causal: a byte
    that could be seen would be no challenge to predict.

    **Raises:** a `ValueError` if that is not a mask.
    """
    mask = eqa.Causal()
    for part in spec.split(","):
        kind, colon, number = part.partition(":")
        size = int(number) if number.isascii() and number.isdigit() else 0
        if kind == "causal" and not colon:
            continue
        elif kind == "window" and size > 0:
            # `SlidingWindow` counts the tokens to the left, without the token itself.
            mask &= eqa.SlidingWindow(size - 1)
        elif kind == "chunked" and size > 0:
            mask &= eqa.Chunked(size)
        else:
            raise ValueError(
                "--mask must be causal, window:N or chunked:N with a positive N, or "
                f"several joined by commas; got {spec!r}"
            )
    return mask
