"""The text, its held-out part, and which bytes are read at which step."""

import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8


class Split(NamedTuple):
    train: UInt8[np.ndarray, " train"]
    held_out: UInt8[np.ndarray, " held_out"]


def read_text(path: str | None) -> UInt8[np.ndarray, " text"]:
    """The bytes of a file, or of the documentation that every Python brings along (which
    differs a little from one version of Python to the next)."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics)).encode()
    else:
        text = pathlib.Path(path).read_bytes()
    return np.frombuffer(text, np.uint8)


def split(text: UInt8[np.ndarray, " text"], seq: int) -> Split:
    """Holds out the last tenth, but no more than 64 KiB: evaluating takes as long for a
    longer text.

    **Raises:** a `ValueError` if the rest is not enough for one sequence and its targets.
    """
    if len(text) == 0:
        raise ValueError("the text is empty")
    num_held_out = min(max(len(text) // 10, 1), 2**16)
    result = Split(text[:-num_held_out], text[-num_held_out:])
    if len(result.train) < seq + 1:
        raise ValueError(
            f"the text is too short: nine tenths of its {len(text)} bytes must hold a "
            f"sequence of {seq} bytes and the byte after it; give a longer text or a "
            "shorter sequence"
        )
    return result


def batch_starts(
    seed: int, step: Int[Array, ""] | int, batch: int, num_starts: int
) -> Int[Array, " batch"]:
    """Where each sequence of a batch begins: a function of the seed and the step alone.
    The order of the data therefore needs no state to be saved and restored."""
    key = jr.fold_in(jr.key(seed), step)
    return jr.randint(key, (batch,), 0, num_starts)


def cut(
    text: UInt8[Array, " text"], starts: Int[Array, " batch"], length: int
) -> Int[Array, "batch length"]:
    """The `length` tokens from each start on. (A token is a byte.)"""
    return text[starts[:, None] + jnp.arange(length)[None, :]].astype(jnp.int32)


class Windows(NamedTuple):
    """Stretches of text that together score each held-out byte once."""

    starts: Int[np.ndarray, " windows"]
    scored: Bool[np.ndarray, "windows seq"]  # which of the targets count


def held_out_windows(num_train: int, num_held_out: int, seq: int) -> Windows:
    """Windows of `seq` inputs that overlap by a half, of each of which the later half of
    the targets is scored: every byte is predicted from at least `seq // 2` bytes."""
    stride = seq // 2
    end = num_train + num_held_out
    lasts = np.minimum(np.arange(num_train + stride, end + stride, stride), end)
    starts = np.maximum(lasts - seq - 1, 0)
    targets = starts[:, None] + 1 + np.arange(seq)[None, :]
    firsts = np.concatenate([[num_train], lasts[:-1]])
    scored = (targets >= firsts[:, None]) & (targets < lasts[:, None])
    return Windows(starts, scored)
