"""Which tiles jax's splash attention computes, in the form in which it asks for them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .._axes import ceil_div
from .._mask import And
from .._mechanism.base import Blocks, Request
from .._mechanism.plan import Grid, Kinds, kinds, lists
from .._mechanism.splash_mask import parts, written_out
from .._static import at_trace_time, has_arrays
from .tables import never_masked


class Tiles(NamedTuple):
    """For each (head, row of tiles), the tiles to compute, those that are FULL first. Rows
    are of queries, or, for the gradient of keys, of keys; the last axis is that of the
    other side, and no longer than the longest row, where that is known at trace time.

    - `number`: which tile of the row; where there are no more, the last one again, so that
        nothing is loaded.
    - `kind`: 2 if it is FULL, 1 if not, and 0 where there are no more.
    - `place`: where it is among those that are written out, if these are.
    - `written`: all tiles, written out, one head after another.
    """

    number: Int[Array, "#head rows columns"]
    kind: Int[Array, "#head rows columns"]
    place: Int[Array, "#head rows columns"] | None
    written: Bool[Array, "#batch tiles _ _"] | None


def tiles(request: Request, block_q: int, block_k: int, by_key: bool) -> Tiles | None:
    """**Arguments:**

    - `block_q`, `block_k`: how many queries and keys a tile has. The last one of a side
        may reach beyond the end.
    - `by_key`: whether rows are of keys.

    **Returns:**

    `None` if it is known at trace time that all tiles are FULL.
    """
    pairs = request.pairs
    if never_masked(request, block_k):
        return None
    if parts(pairs.mask).written:
        cut = _written(request, block_q, block_k)
        found = Kinds(cut.any((0, 4, 5)), cut.all((0, 4, 5)))
        number, kind = _rows(found, by_key)
        place = _places(number, kind, cut.shape, by_key)
        cut = cut.swapaxes(4, 5) if by_key else cut
        return Tiles(number, kind, place, cut.reshape(cut.shape[0], -1, *cut.shape[4:]))

    def build() -> tuple[Array, Array]:
        return _rows(_summarised(request, block_q, block_k), by_key)

    if has_arrays((pairs.mask, pairs.q, pairs.kv)):
        return Tiles(*build(), None, None)
    with at_trace_time():
        number, kind = (np.asarray(x) for x in jax.jit(build)())
    longest = max(1, int((kind > 0).sum(-1).max()))
    return Tiles(*(jnp.asarray(x[..., :longest]) for x in (number, kind)), None, None)


def _summarised(request: Request, block_q: int, block_k: int) -> Kinds:
    """By the summaries of the mask: (head, query, key), one head for all, as one table
    serves the batch."""
    batch, q_len, heads, _ = request.query.shape
    kv_len = request.key_.shape[1]
    grid = Grid(
        Blocks(1, 1, ceil_div(q_len, block_q), ceil_div(kv_len, block_k)),
        Blocks(batch, heads, min(block_q, q_len), min(block_k, kv_len)),
        (q_len, kv_len),
        1,
    )
    return Kinds(*(x[0] for x in kinds(request, grid, (False, False))))


def _rows(found: Kinds, by_key: bool) -> tuple[Array, Array]:
    """`(number, kind)`, as in `Tiles`."""
    if by_key:
        found = Kinds(*(x.swapaxes(1, 2) for x in found))
    order, full, some = lists(found)
    limit = order.shape[-1]
    n = jnp.arange(limit, dtype=jnp.int32).reshape(1, 1, -1)
    full, some = full[..., None], some[..., None]
    last = jnp.maximum(some - 1, 0)
    number = jnp.take_along_axis(order, jnp.minimum(n, last), -1)
    kind = jnp.where(n < full, 2, jnp.where(n < some, 1, 0))
    # Scalar memory is scarce.
    dtypes = (d for d in (jnp.int8, jnp.int16, jnp.int32) if limit <= jnp.iinfo(d).max)
    return number.astype(next(dtypes)), kind.astype(jnp.int8)


def _written(
    request: Request, block_q: int, block_k: int
) -> Bool[Array, "#batch #head rows columns _ _"]:
    pairs = dataclasses.replace(request.pairs, mask=And(parts(request.pairs.mask).pairs))
    visible = written_out(dataclasses.replace(request, pairs=pairs))
    widths = [(0, -visible.shape[2] % block_q), (0, -visible.shape[3] % block_k)]
    visible = jnp.pad(visible, [(0, 0), (0, 0), *widths])
    batch, heads, rows, columns = visible.shape
    shape = (batch, heads, rows // block_q, block_q, columns // block_k, block_k)
    return visible.reshape(shape).transpose(0, 1, 2, 4, 3, 5)


def _places(number: Array, kind: Array, shape: tuple[int, ...], by_key: bool) -> Array:
    _, heads, rows, columns, _, _ = shape
    head = jnp.arange(heads, dtype=jnp.int32).reshape(-1, 1, 1)
    row = jnp.arange(number.shape[1], dtype=jnp.int32).reshape(1, -1, 1)
    number = number.astype(jnp.int32)
    i, j = (number, row) if by_key else (row, number)
    # Tiles that are FULL look at none: the first then is loaded once.
    return jnp.where(kind == 1, (head * rows + i) * columns + j, 0)
