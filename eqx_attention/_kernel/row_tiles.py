"""Which tiles of keys a row of tiles has, as a kernel finds them: from lists, or, where
queries see one run of keys, from where that starts and ends."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .._axes import ceil_div
from .._device import num_multiprocessors
from .._mask import AbstractMask, And, Causal, Full, Padding, SlidingWindow, span
from .._mechanism.base import Request
from .schedule import in_turn, Schedule
from .tables import Table, table


# Positions are added to how far a mask reaches, in 32 bits.
_LARGEST = 2**30


class Listed(NamedTuple):
    """From lists, of tiles of `block` keys."""

    table: Table
    block: int

    @property
    def arrays(self) -> list[jax.Array]:
        """What the kernel is given."""
        return list(self.table)

    def counts(self, refs: Sequence[Any], at: tuple) -> tuple[Any, Any]:
        """In the kernel: how many tiles of a row are FULL; and how many there are."""
        _, full, some = refs
        return full[self.table.at(*at)], some[self.table.at(*at)]

    def first_key(self, refs: Sequence[Any], at: tuple, n: Any) -> Any:
        """In the kernel: that of the n-th tile of a row, FULL ones first."""
        return refs[0][(*self.table.at(*at), n)] * self.block


class Counted(NamedTuple):
    """So many of the first keys, of each batch element or of all, in tiles of `block`; but
    for keys before or after some of the row's queries, of which the least and the greatest
    position are given for each row (or for all). `reach` is how far queries see, counted
    from their own positions: none, and they see all; -inf or inf, and they see all on that
    side."""

    lengths: jax.Array
    positions: tuple[jax.Array, ...]
    reach: tuple[float, float] | None
    kv_len: int
    block: int

    @property
    def arrays(self) -> list[jax.Array]:
        """What the kernel is given."""
        return [self.lengths, *self.positions]

    def counts(self, refs: Sequence[Any], at: tuple) -> tuple[Any, Any]:
        """In the kernel: how many tiles of a row are FULL; and how many there are, of which
        there is one even if it sees nothing."""
        first, last, first_full, last_full = self._ranges(refs, at)
        return jnp.maximum(last_full - first_full, 0), jnp.maximum(last - first, 1)

    def first_key(self, refs: Sequence[Any], at: tuple, n: Any) -> Any:
        """In the kernel: that of the n-th tile of a row, FULL ones first."""
        if self.reach is None:
            return n * self.block
        first, _, first_full, last_full = self._ranges(refs, at)
        whole = jnp.maximum(last_full - first_full, 0)
        before = jnp.where(whole > 0, first_full - first, self.kv_len)
        rest = n - whole
        after = jnp.where(rest < before, first + rest, last_full + rest - before)
        return jnp.where(n < whole, first_full + n, after) * self.block

    def _ranges(self, refs: Sequence[Any], at: tuple) -> tuple[Any, Any, Any, Any]:
        """The first tile that any query of a row sees, and the first one after these; and
        of those that all of them see whole."""
        batch, _, row = at
        length = refs[0][0 if self.lengths.shape[0] == 1 else batch]
        length = jnp.clip(length, 0, self.kv_len)
        up = lambda x: lax.div(x + (self.block - 1), self.block)  # noqa: E731
        if self.reach is None:
            zero = jnp.zeros_like(length)
            return zero, up(length), zero, lax.div(length, self.block)
        sizes = self.positions[0].shape
        where = (0 if sizes[0] == 1 else batch, 0 if sizes[1] == 1 else row)
        low, high = (ref[where] for ref in refs[1:])
        least, most = self.reach

        def start(position):
            return 0 * length if least == -jnp.inf else position + int(least)

        def end(position):
            return length if most == jnp.inf else position + (int(most) + 1)

        # A row that sees nothing has a tile, too, and it is one that there is.
        last_tile = ceil_div(self.kv_len, self.block) - 1
        first = jnp.clip(lax.div(jnp.maximum(start(low), 0), self.block), 0, last_tile)
        last = up(jnp.clip(end(high), 0, length))
        first_full = up(jnp.clip(start(high), 0, self.kv_len))
        last_full = lax.div(jnp.clip(end(low), 0, length), self.block)
        return first, last, first_full, last_full


def row_tiles(request: Request, block_q: int, block_k: int) -> Listed | Counted:
    found = _counted(request, block_q, block_k)
    if found is None:
        return Listed(table(request, block_q, block_k), block_k)
    return found


def _counted(request: Request, block_q: int, block_k: int) -> Counted | None:
    """If the mask is known to be one run of keys for each query."""
    pairs, kv_len = request.pairs, request.lengths[1]
    lengths, by_position = None, False
    for mask in _parts(pairs.mask):
        match mask:
            case Full():
                pass
            case Padding(q_lengths=None) if lengths is None and pairs.kv.index is None:
                lengths = jnp.asarray(mask.kv_lengths).reshape(-1).astype(jnp.int32)
            case (
                Causal(offset=int()) | SlidingWindow(left=int() | None, right=int() | None)
            ) if pairs.kv.counted:
                by_position = True
            case _:
                return None
    if lengths is None:
        lengths = jnp.full(1, kv_len, jnp.int32)
    if not by_position:
        return Counted(lengths, (), None, kv_len, block_k)
    least, most = (x - pairs.kv.shift for x in span(pairs.mask))
    if any(_LARGEST <= abs(x) < math.inf for x in (least, most)):
        return None
    return Counted(lengths, _ends(request, block_q), (least, most), kv_len, block_k)


def _parts(mask: AbstractMask) -> list[AbstractMask]:
    if not isinstance(mask, And):
        return [mask]
    return [part for mask in mask.masks for part in _parts(mask)]


def _ends(request: Request, block_q: int) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest position of each row of tiles, `(batch, rows)`."""
    q = request.pairs.q
    if q.position is None:
        index = jnp.arange(q.length, dtype=jnp.int32) if q.index is None else q.index
        positions = (index + q.shift).reshape(1, -1)
    else:
        positions = q.position.reshape(q.position.shape[0], -1)
    positions = positions.astype(jnp.int32)
    if positions.shape[1] == 1:
        return positions, positions
    whole = jnp.pad(positions, ((0, 0), (0, -positions.shape[1] % block_q)), mode="edge")
    rows = whole.reshape(whole.shape[0], -1, block_q)
    return rows.min(axis=-1), rows.max(axis=-1)


def schedule_of(tiles: Listed | Counted, pieces: int, place: Any, start: int) -> Schedule:
    """Which pieces each block of threads does, where a function says where a piece is, and
    it takes a time of so many tiles to start one."""
    if pieces <= num_multiprocessors():
        return Schedule(pieces)
    known = not any(isinstance(x, Tracer) for x in tiles.arrays)

    def cost(n):
        if not known:
            return jnp.ones_like(n)
        return tiles.counts(tiles.arrays, place(n)[:3])[1] + start

    return in_turn(pieces, cost)
