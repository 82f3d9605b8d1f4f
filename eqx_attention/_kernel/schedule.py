"""In which order the blocks of threads of a kernel are computed."""

from collections.abc import Callable

import jax
from jax import lax

from .._axes import largest_divisor
from .._mechanism.base import Request


# Bytes of the second-level cache to fill with what neighbouring blocks share.
_CACHE = 2**25


def section(request: Request, least: int = 1) -> int:
    """How many key heads are computed side by side, so that what they read stays in the
    second-level cache; but `least` of them, if there are so many."""
    batch, length, kv_heads, value_dim = request.value.shape
    size = length * (value_dim + request.query.shape[-1]) * request.query.dtype.itemsize
    return largest_divisor(batch * kv_heads, max(least, _CACHE // size))


def place_of(
    batch: int, heads: int, rows: int, section: int
) -> Callable[[jax.Array], tuple]:
    """From the number of a block of threads to its (batch, head, row of tiles): all heads
    of a section for the first row, then for the second, and so on."""

    def place(n):
        inner = lax.rem(n, section * rows)
        head = lax.div(n, section * rows) * section + lax.rem(inner, section)
        return lax.div(head, heads), lax.rem(head, heads), lax.div(inner, section)

    return place
