"""Which tiles a kernel computes, by the summaries of the mask."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int

from .._axes import ceil_div
from .._mask import AbstractMask, And, Causal, Full, Segments, SlidingWindow
from .._mechanism.base import Blocks, Request
from .._mechanism.negligible import may_be_negligible
from .._mechanism.plan import by_rank, Grid, Kinds, kinds, lists
from .._static import has_arrays


T = TypeVar("T")


class Table(NamedTuple):
    """For each (batch, key head, row of tiles): the tiles of the row that are not EMPTY,
    those that are FULL first; how many are FULL; and how many there are."""

    columns: Int[Array, "#batch #head rows columns"]
    full: Int[Array, "#batch #head rows"]
    some: Int[Array, "#batch #head rows"]

    def at(self, batch, kv_head, row) -> tuple:
        """Where a row's entries are."""
        sizes = self.full.shape
        return (0 if sizes[0] == 1 else batch, 0 if sizes[1] == 1 else kv_head, row)


def longest_first(tiles: Table) -> Int[Array, "#batch #head rows"] | None:
    """The rows by how many tiles they have, the most first; of those that have as many, the
    last one first. Counted from the last row. `None` if it is known at trace time that they
    are just from the last to the first, as under causal masks."""

    def order():
        return by_rank(tiles.columns.shape[-1] - tiles.some[..., ::-1])

    if isinstance(tiles.some, Tracer):
        return order()
    with jax.ensure_compile_time_eval():
        known = order()
        return known if (jnp.diff(known) < 0).any() else None


class Order(NamedTuple):
    """What rows need to know that add to columns one after another.

    Each goes through its columns from the last to the first, so that a row that began
    later is behind the one before it, and need not wait: see `backwards`. For each (batch,
    key head, row of tiles), so many tiles come before those that are FULL; and for each
    tile, so many of its column are in rows before.
    """

    high: Int[Array, "#batch #head rows"]
    before: Int[Array, "#batch #head rows columns"]


def table(request: Request, block_q: int, block_k: int, by_key: bool = False) -> Table:
    """**Arguments:**

    - `block_q`, `block_k`: how many queries and keys a tile has. The last one of a side
        may reach beyond the end: then it is never FULL along the keys.
    - `by_key`: whether a row is one of keys, and not of queries.
    """

    def build(found: Kinds) -> Table:
        columns, full, some = lists(found)
        # Without a mask, kernels look at FULL tiles alone.
        some = some if sees_itself(request) else jnp.maximum(some, 1)
        return Table(columns, some if never_masked(request, block_k) else full, some)

    return _of_kinds(build, request, block_q, block_k, by_key)


def table_in_order(request: Request, block_q: int, block_k: int) -> tuple[Table, Order]:
    """As `table`, by key, for rows that add to columns one after another."""

    def build(found: Kinds) -> tuple[Table, Order]:
        some, every = found
        for axis in () if sees_itself(request) else (2, 3):
            first = lax.broadcasted_iota(jnp.int32, some.shape, axis) == 0
            some = some | (~some.any(axis, keepdims=True) & first)
        found = Kinds(some, some if never_masked(request, block_k) else every)
        columns, high, full, some = backwards(found)
        there = found.some.astype(jnp.int32)
        before = jnp.cumsum(there, axis=2) - there
        before = jnp.take_along_axis(before, columns, -1)
        return Table(columns, full, some), Order(high, before)

    return _of_kinds(build, request, block_q, block_k, True)


def _of_kinds(
    build: Callable[[Kinds], T],
    request: Request,
    block_q: int,
    block_k: int,
    by_key: bool,
) -> T:
    """Each row computes a tile, also one that sees nothing: masked, that is harmless. And
    each column is computed, if the order is to know it. `build` sees to that, unless it is
    known where there are such tiles: on the diagonal."""
    pairs = request.pairs
    q_len, kv_len = request.lengths
    heads = request.key_.shape[2]
    sizes = Blocks(1, 1, min(block_q, q_len), min(block_k, kv_len))
    counts = Blocks(
        request.query.shape[0], heads, ceil_div(q_len, block_q), ceil_div(kv_len, block_k)
    )
    grid = Grid(counts, sizes, (q_len, kv_len), request.groups)

    def built() -> T:
        found = kinds(request, grid, (False, False))
        if kv_len % block_k:
            found = Kinds(found.some, found.every.at[..., -1].set(False))
        if sees_itself(request):
            first_q, first_k = (
                lax.broadcasted_iota(jnp.int32, found.some.shape, axis) * size
                for axis, size in ((2, block_q), (3, block_k))
            )
            diagonal = (first_q < first_k + block_k) & (first_k < first_q + block_q)
            found = Kinds(found.some | diagonal, found.every)
        if by_key:
            found = Kinds(*(x.swapaxes(2, 3) for x in found))
        return build(found)

    if has_arrays((pairs.mask, pairs.q, pairs.kv)) or may_be_negligible(request):
        return built()
    with jax.ensure_compile_time_eval():
        return built()


def backwards(kinds: Kinds) -> tuple[Array, Array, Array, Array]:
    """Of each row: its tiles from the last to the first, but with no PARTIAL ones between
    those that are FULL: they come after. Then how many are before those that are FULL (all
    are after them if there are none), how many those are, and how many there are at all."""
    size = kinds.some.shape[-1]
    column = jnp.arange(size)[None, None, None, :]
    last = jnp.where(kinds.every, column, -1).max(-1, keepdims=True)
    low = jnp.where(kinds.every, 1, jnp.where((column > last) & (last >= 0), 0, 2))
    rank = jnp.where(kinds.some | kinds.every, low, 3).astype(jnp.int8)
    order = size - 1 - by_rank(rank[..., ::-1])
    high, full, some = (
        found.sum(-1, dtype=jnp.int32) for found in (rank == 0, rank == 1, rank <= 2)
    )
    return order, high, full, some


def never_masked(request: Request, block_k: int) -> bool:
    """Whether it is known at trace time that every tile is FULL."""
    return isinstance(request.pairs.mask, Full) and request.lengths[1] % block_k == 0


def sees_no_later(request: Request) -> bool:
    """Whether it is known at trace time that there is a key for each query, by number, and
    that none sees those after its own."""
    pairs, (q_len, kv_len) = request.pairs, request.lengths
    counted = pairs.q.counted and pairs.kv.counted and pairs.q.shift == pairs.kv.shift

    def causal(mask):
        match mask:
            case Causal(offset=int(offset)):
                return offset <= 0
        return False

    return counted and q_len == kv_len and any(map(causal, _parts(request)))


def sees_itself(request: Request) -> bool:
    """Whether, moreover, queries see the keys of their own numbers, but for segments that
    differ."""

    def own(mask):
        match mask:
            case Causal(offset=0) | SlidingWindow() | Segments():
                return True
        return False

    return sees_no_later(request) and all(map(own, _parts(request)))


def _parts(request: Request) -> tuple[AbstractMask, ...]:
    mask = request.pairs.mask
    return tuple(mask.masks) if isinstance(mask, And) else (mask,)
