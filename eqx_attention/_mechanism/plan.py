"""Which tiles a request has, and which of them its mask and its scores let us skip."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from .._axes import Block, blocks as reduce_blocks, ceil_div, over_batch
from .._mask import Full, span
from .._static import is_array
from .._tokens import bounds
from .base import Blocks, Request
from .negligible import may_be_negligible, negligible


class Grid(NamedTuple):
    """How many tiles there are along each axis of a request, and how large they are.

    The last tile of an axis ends where the axis ends, and so may overlap the one before
    it: nothing is padded, and tokens are counted in the first tile that holds them.
    """

    counts: Blocks
    sizes: Blocks
    lengths: tuple[int, int]
    groups: int

    def starts(self, axis: int, n):
        """Where block `n` of the queries (`axis` 0) or keys (1) starts."""
        size, length = self.sizes[2 + axis], self.lengths[axis]
        return jnp.minimum(n * size, length - size)

    def indices(self, axis: int) -> Int[Array, "blocks size"]:
        """The index of each token of each block."""
        blocks = jnp.arange(self.counts[2 + axis], dtype=jnp.int32)
        tokens = jnp.arange(self.sizes[2 + axis], dtype=jnp.int32)
        return self.starts(axis, blocks)[:, None] + tokens[None]

    def ragged(self, axis: int) -> bool:
        return self.lengths[axis] % self.sizes[2 + axis] != 0

    def fresh(self, axis: int, n):
        """The first index that no earlier block holds, if there can be an overlap."""
        return n * self.sizes[2 + axis] if self.ragged(axis) else None


def grid(request: Request, sizes: Blocks) -> Grid:
    batch, q_len, _, _ = request.query.shape
    _, kv_len, heads, _ = request.key_.shape
    counts = Blocks(
        batch // sizes.batch,
        heads // sizes.heads,
        ceil_div(q_len, sizes.query),
        ceil_div(kv_len, sizes.key),
    )
    return Grid(counts, sizes, (q_len, kv_len), request.groups)


class Band(NamedTuple):
    """As many keys as any query of one block may see, and where they start, counted from
    the block's first query. `last` is the last key that they may start at."""

    size: int
    offset: int
    last: int

    def block(self, block: Block) -> Block:
        """A tile of the queries of `block` and all keys that these may see."""
        start = jnp.clip(block.starts[2] + self.offset, 0, self.last)
        return Block((*block.starts[:3], start), (*block.sizes[:3], self.size))


def band(request: Request, block_q: int) -> Band | None:
    """What a block of so many queries may see, where that is known at trace time."""
    pairs, kv_len = request.pairs, request.key_.shape[1]
    least, most = span(pairs.mask)
    if math.isinf(most - least) or not (pairs.q.counted and pairs.kv.counted):
        return None
    # Rounded up to whole cache lines, or products take a few percent longer.
    size = ceil_div(max(1, block_q + int(most - least)), 16) * 16
    size = min(size, kv_len)
    return Band(size, pairs.q.shift - pairs.kv.shift + int(least), kv_len - size)


class Kinds(NamedTuple):
    """For each tile (batch, head, query, key): may a pair be visible, surely all of them?
    The first two axes have size one where these do not depend on them. A tile that is
    negligible is EMPTY: neither."""

    some: Bool[Array, "#batch #head query key"]
    every: Bool[Array, "#batch #head query key"]


def kinds(request: Request, grid: Grid, overlaps: tuple[bool, bool]) -> Kinds:
    """Sorts the tiles. `overlaps` says along which of (queries, keys) a last tile that
    overlaps the one before it must mask what it has twice."""
    sizes, counts, pairs = grid.sizes, grid.counts, request.pairs
    ranges = bounds(pairs.q, pairs.kv, sizes.query, sizes.key)
    arrays, rest = eqx.partition(pairs.mask, is_array)
    # Else XLA spends minutes on folding the reduction of a large constant. Together, so
    # that it reduces an array to both bounds at once.
    arrays = lax.optimization_barrier(arrays)

    def reduced(op):
        def leaf(x):
            return reduce_blocks(reduce_blocks(x, 2, sizes.query, op), 3, sizes.key, op)

        return eqx.combine(jax.tree.map(leaf, arrays), rest)

    def summary(tree):
        lower, upper, ranges = tree
        return lower.summary(upper, ranges)

    found = over_batch(summary, (reduced(jnp.min), reduced(jnp.max), ranges))
    some, every = (
        jnp.broadcast_to(x, (*x.shape[:2], counts.query, counts.key)) for x in found
    )
    for axis in range(2):
        if overlaps[axis] and grid.ragged(axis):
            n = jnp.arange(counts[2 + axis])
            last = jnp.expand_dims(n == counts[2 + axis] - 1, (0, 1, 3 - axis))
            every = every & ~last
    if not may_be_negligible(request):
        return Kinds(_merge(some, grid, jnp.any), _merge(every, grid, jnp.all))
    kept = ~negligible(request, sizes, ranges)
    every = _merge(every, grid, jnp.all) & _merge(kept, grid, jnp.any)
    return Kinds(_merge(some & kept, grid, jnp.any), every)


def _merge(x: Bool[Array, "..."], grid: Grid, op) -> Bool[Array, "..."]:
    """From single batch elements and query heads to those of a tile."""
    batch, heads = x.shape[:2]
    if batch > 1:
        x = op(x.reshape(grid.counts.batch, -1, *x.shape[1:]), axis=1)
    if heads > 1:
        x = op(x.reshape(x.shape[0], grid.counts.heads, -1, *x.shape[2:]), axis=2)
    return x


# Rows of at most so many tiles are sorted by counting.
_COUNTED = 256


@jax.jit  # Where it is computed at trace time, not one intermediate after another.
def by_rank(rank: Int[Array, "... columns"]) -> Int[Array, "... columns"]:
    """The columns of each row by their rank, those of the same rank in order.

    Where rows are short, by two sums: on a GPU a sort takes longer, and a while to compile.
    """
    size = rank.shape[-1]
    if size > _COUNTED:
        return jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    last = rank.ndim - 1
    key = rank.astype(jnp.int32) * size
    key = key + lax.broadcasted_iota(jnp.int32, key.shape, last)
    place = (key[..., None, :] < key[..., :, None]).sum(-1, dtype=jnp.int32)
    pairs = (*place.shape, size)
    wanted, column = (lax.broadcasted_iota(jnp.int32, pairs, last + n) for n in range(2))
    there = place[..., None, :] == wanted
    return jnp.where(there, column, 0).sum(-1, dtype=jnp.int32)


class Lists(NamedTuple):
    """For each (batch, head, row), the tiles of the row: first those that are FULL, then
    those that are PARTIAL; how many are FULL, and how many are either."""

    order: Int[Array, "#batch #head row column"]
    full: Int[Array, "#batch #head row"]
    some: Int[Array, "#batch #head row"]

    def row(self, batch, head, row) -> tuple[Int[Array, " column"], Array, Array]:
        at = tuple(0 if size == 1 else n for n, size in zip((batch, head), self.full.shape))
        return self.order[(*at, row)], self.full[(*at, row)], self.some[(*at, row)]


def lists(kinds: Kinds) -> Lists:
    """Lists the tiles of each row of the table of kinds."""
    rank = jnp.where(kinds.every, 0, jnp.where(kinds.some, 1, 2)).astype(jnp.int8)
    order = by_rank(rank)
    full = (rank == 0).sum(-1, dtype=jnp.int32)
    return Lists(order, full, (rank <= 1).sum(-1, dtype=jnp.int32))


def never_masked(request: Request, grid: Grid, overlaps: tuple[bool, bool]) -> bool:
    """Whether it is known at trace time that every tile is FULL."""
    ragged = any(overlaps[axis] and grid.ragged(axis) for axis in range(2))
    return isinstance(request.pairs.mask, Full) and not ragged


def always_masked(grid: Grid) -> bool:
    """Whether so few tiles are to be computed that code for FULL ones does not pay."""
    return grid.counts.query * grid.counts.key <= 2
