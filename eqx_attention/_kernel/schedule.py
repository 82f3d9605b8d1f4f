"""In which order the blocks of threads of a kernel are computed."""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._axes import largest_divisor
from .._device import num_multiprocessors
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


def place_of_split(
    batch: int, heads: int, rows: int, section: int, splits: int
) -> Callable[[jax.Array], tuple]:
    """As `place_of`, of rows whose tiles are in several splits: (batch, head, row of tiles,
    split). The last rows come first: under a causal mask, they are the longest."""
    order = place_of(batch, heads, rows, section)

    def place(n):
        batch, head, row = order(lax.div(n, splits))
        return batch, head, rows - 1 - row, lax.rem(n, splits)

    return place


def tiles_of_split(whole: Any, some: Any, split: Any, splits: int) -> tuple[Any, Any, Any]:
    """The first tile of a split of a row; how many there are, FULL ones and all; where the
    row has so many of either."""
    if splits == 1:
        return 0, whole, some
    first, last = (lax.div(n * some, splits) for n in (split, split + 1))
    return first, jnp.clip(whole, first, last) - first, last - first


class Schedule(NamedTuple):
    """Which pieces of work each block of threads does, one after another.

    `pieces` are their numbers, `(programs, most pieces)`, and `counts` how many of them
    there are; `None` if each block does the one of its own number.
    """

    programs: int
    pieces: np.ndarray | None = None
    counts: np.ndarray | None = None

    @property
    def arrays(self) -> list[jax.Array]:
        """What a kernel is given, if anything."""
        return [jnp.asarray(x) for x in self[1:] if x is not None]

    @staticmethod
    def piece(refs: Sequence[Any], n: Any) -> Any:
        """In the kernel: the n-th piece of this block."""
        block = lax.axis_index("block")
        return refs[0][block, n] if refs else block

    @staticmethod
    def count(refs: Sequence[Any]) -> Any:
        """In the kernel: how many pieces this block does."""
        return refs[1][lax.axis_index("block")] if refs else 1


def in_turn(pieces: int, cost: Callable[[jax.Array], jax.Array]) -> Schedule:
    """One block of threads a multiprocessor, and each piece, in order, goes to the block
    that is the first to be free. `cost` is a function of the numbers of pieces."""
    with jax.ensure_compile_time_eval():
        costs = cost(jnp.arange(pieces)).tolist()
    return _in_turn(costs, num_multiprocessors())


def _in_turn(costs: Sequence[int], programs: int) -> Schedule:
    free = [(0, program) for program in range(min(programs, len(costs)))]
    pieces: list[list[int]] = [[] for _ in free]
    for n, cost in enumerate(costs):
        since, program = free[0]
        pieces[program].append(n)
        heapq.heapreplace(free, (since + cost, program))
    counts = np.array([len(own) for own in pieces], np.int32)
    table = np.zeros((len(pieces), counts.max()), np.int32)
    for program, own in enumerate(pieces):
        table[program, : len(own)] = own
    return Schedule(len(pieces), table, counts)
