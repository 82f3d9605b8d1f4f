"""The masks that a benchmark may name, and how many pairs each sees."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._mask import (
    AbstractMask,
    And,
    Causal,
    Chunked,
    Full,
    Padding,
    PrefixLM,
    Segments,
    SlidingWindow,
)
from .._options import as_mask
from ..testing._visible import pairs_of, visible_at


MaskOf = Callable[[int], AbstractMask]

# What a call raises of what it was given; and what else a function of a user's own may.
ERRORS = (
    NotImplementedError,
    ValueError,
    TypeError,
    RuntimeError,
    MemoryError,
    AssertionError,
)
MASK_ERRORS = (*ERRORS, ArithmeticError, AttributeError, LookupError, NameError)


class Named(NamedTuple):
    """`make` takes the length and the number that may follow the name after a colon, which
    is at least `least`."""

    make: Callable[[int, int], AbstractMask]
    number: int | None
    says: str
    least: int = 1


def _documents(length: int, count: int) -> AbstractMask:
    ids = np.sort(np.random.default_rng(5).integers(0, count, length))
    return Causal() & Segments(jnp.asarray(ids, jnp.int32))


MASKS = {
    "full": Named(lambda length, _: Full(), None, "all keys"),
    "causal": Named(lambda length, _: Causal(), None, "the keys up to the query"),
    "window": Named(
        lambda length, n: Causal() & SlidingWindow(n),
        255,
        "the query's own key and the 255 before it",
        least=0,
    ),
    "documents": Named(_documents, 8, "causal, in 8 documents of random lengths"),
    "prefix_lm": Named(
        lambda length, n: PrefixLM(n), 256, "causal, and the first 256 keys", 0
    ),
    "chunked": Named(
        lambda length, n: Causal() & Chunked(n), 256, "causal, in chunks of 256"
    ),
    "padding": Named(
        lambda length, n: Padding(max(1, length - n)),
        64,
        "all but the last 64 keys, but at least one",
        least=0,
    ),
}


def masks_of(
    masks: Sequence[str] | Mapping[str, AbstractMask | MaskOf],
) -> dict[str, MaskOf]:
    """Each mask that is asked for, by its name, of a length."""
    if isinstance(masks, Mapping):
        made = {name: _as_function(mask) for name, mask in masks.items()}
    else:
        made = {name: _by_name(name) for name in masks}
    if not made:
        raise ValueError("masks: expected at least one mask, got none.")
    return made


def _as_function(mask: AbstractMask | MaskOf) -> MaskOf:
    if isinstance(mask, AbstractMask):
        return lambda length: mask
    return lambda length: as_mask(mask(length))


def _by_name(text: str) -> MaskOf:
    name, colon, number = text.partition(":")
    named = MASKS.get(name)
    if named is None:
        raise ValueError(f"masks: expected some of {', '.join(MASKS)}; got {text!r}.")
    if not colon:
        return lambda length: named.make(length, named.number or 0)
    valid = number.isdecimal() and int(number) >= named.least
    if named.number is None or not valid:
        wanted = name if named.number is None else f"{name}:{named.number} or the like"
        raise ValueError(f"masks: expected {wanted}, got {text!r}.")
    return lambda length: named.make(length, int(number))


def num_pairs(mask: AbstractMask, batch: int, heads: int, length: int) -> int:
    """How many (query, key) pairs a mask sees, over all batch elements and heads."""
    limits = _limits(mask)
    if limits is not None:
        index = np.arange(length, dtype=np.int64)
        least, most = int(max(limits[0], -length)), int(min(limits[1], length))
        first = np.maximum(index + least, 0)
        last = np.minimum(index + most, length - 1)
        return batch * heads * int(np.maximum(last - first + 1, 0).sum())
    step, total = max(1, _AT_ONCE // length), 0
    for start in range(0, length, step):
        rows = np.arange(start, min(length, start + step))
        seen = visible_rows(mask, batch, heads, length, rows)
        repeated = batch // seen.shape[0] * (heads // seen.shape[1])
        total += repeated * int(seen.sum())
    return total


# So many pairs are looked at at a time.
_AT_ONCE = 2**23


def visible_rows(
    mask: AbstractMask, batch: int, heads: int, length: int, rows: np.ndarray
) -> np.ndarray:
    """Which keys some queries see, with axes of batch and head of size one where all of
    these see the same."""
    at = pairs_of((batch,), heads, length, length, "start", None, rows)
    seen = visible_at(mask, at)
    return np.broadcast_to(seen, (*seen.shape[:2], len(rows), length))


def _limits(mask: Any) -> tuple[float, float] | None:
    """The least and the greatest `key - query` that is visible, if that is all of it."""
    match mask:
        case Full():
            return -np.inf, np.inf
        case Causal(offset=int(offset)):
            return -np.inf, float(offset)
        case SlidingWindow(left=int() | None, right=int() | None):
            ends = (mask.left, mask.right)
            left, right = (np.inf if x is None else float(x) for x in ends)
            return -left, right
        case And(masks=masks):
            found = [_limits(m) for m in masks]
            if None not in found:
                lows, highs = zip(*(x for x in found if x is not None), strict=True)
                return max(lows), min(highs)
    return None
