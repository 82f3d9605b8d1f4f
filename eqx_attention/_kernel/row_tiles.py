"""Which tiles of keys a row of tiles has, as a kernel finds them: from lists, or, where all
queries see the first keys and no others, from how many these are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .._device import num_multiprocessors
from .._mask import Full, Padding
from .._mechanism.base import Request
from .schedule import in_turn, Schedule
from .tables import Table, table


class Listed(NamedTuple):
    """From lists, of tiles of `block` keys."""

    table: Table
    block: int

    @property
    def arrays(self) -> list[jax.Array]:
        """What the kernel is given."""
        return list(self.table)

    def cost(self, at: tuple, start: int) -> Any:
        """Of each row, in tiles, of which it takes so many to start; the same of all if it
        is not known at trace time."""
        some = self.table.some
        if isinstance(some, Tracer):
            return jnp.ones_like(at[0])
        return some[self.table.at(*at)] + start

    def counts(self, refs: Sequence[Any], at: tuple) -> tuple[Any, Any]:
        """In the kernel: how many tiles of a row are FULL; and how many there are."""
        _, full, some = refs
        return full[self.table.at(*at)], some[self.table.at(*at)]

    def first_key(self, refs: Sequence[Any], at: tuple, n: Any) -> Any:
        """In the kernel: that of the n-th tile of a row."""
        return refs[0][(*self.table.at(*at), n)] * self.block


class Counted(NamedTuple):
    """So many of the first keys, of each batch element or of all, in tiles of `block`."""

    lengths: jax.Array
    kv_len: int
    block: int

    @property
    def arrays(self) -> list[jax.Array]:
        """What the kernel is given."""
        return [self.lengths]

    def cost(self, at: tuple, start: int) -> Any:
        """Of each row, in tiles, of which it takes so many to start; the same of all if it
        is not known at trace time."""
        if isinstance(self.lengths, Tracer):
            return jnp.ones_like(at[0])
        return self.counts([self.lengths], at)[1] + start

    def counts(self, refs: Sequence[Any], at: tuple) -> tuple[Any, Any]:
        """In the kernel: how many tiles of a row are FULL; and how many there are, of which
        there is one even if it sees nothing."""
        length = refs[0][0 if self.lengths.shape[0] == 1 else at[0]]
        length = jnp.clip(length, 0, self.kv_len)
        some = lax.div(length + (self.block - 1), self.block)
        return lax.div(length, self.block), jnp.maximum(some, 1)

    def first_key(self, refs: Sequence[Any], at: tuple, n: Any) -> Any:
        """In the kernel: that of the n-th tile of a row."""
        return n * self.block


def row_tiles(request: Request, block_q: int, block_k: int) -> Listed | Counted:
    mask, kv_len = request.pairs.mask, request.lengths[1]
    if isinstance(mask, Full):
        return Counted(jnp.full(1, kv_len, jnp.int32), kv_len, block_k)
    if isinstance(mask, Padding) and mask.q_lengths is None:
        lengths = jnp.asarray(mask.kv_lengths).reshape(-1).astype(jnp.int32)
        return Counted(lengths, kv_len, block_k)
    return Listed(table(request, block_q, block_k), block_k)


def schedule_of(tiles: Listed | Counted, pieces: int, place: Any, start: int) -> Schedule:
    """Which pieces each block of threads does, where a function says where a piece is, and
    it takes a time of so many tiles to start one."""
    if pieces <= num_multiprocessors():
        return Schedule(pieces)
    return in_turn(pieces, lambda n: tiles.cost(place(n)[:3], start))
