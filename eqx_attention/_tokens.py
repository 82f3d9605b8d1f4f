"""The tokens of one side of a call: their indices and positions."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int

from ._axes import Block, blocks, ceil_div, cut
from ._static import AnyArray


class Tokens(eqx.Module):
    """One side's tokens, in canonical form.

    An index is a token's place in the global array: by default, its place here. A position
    is an integer of its own: by default, the index plus `shift`.
    """

    position: Int[Array, "batch 1 query key"] | None
    length: int = eqx.field(static=True)
    shift: int = eqx.field(static=True)
    index: Int[Array, "1 1 query key"] | None = None

    @property
    def counted(self) -> bool:
        """Whether all that is known of the tokens is how they are counted."""
        return self.position is None and self.index is None


def query_positions(
    q_positions: str | AnyArray, kv_positions: AnyArray | None, q_len: int, kv_len: int
) -> tuple[Int[Array, "*batch q_len"] | None, int]:
    """`(position, shift)` of the queries, as in `Tokens`.

    `"start"` counts from 0; `"end"` lines the last query up with the last key.
    """
    if not isinstance(q_positions, str):
        return jnp.asarray(q_positions, jnp.int32), 0
    if q_positions == "start":
        return None, 0
    if kv_positions is None or kv_len == 0:
        return None, kv_len - q_len
    last = jnp.asarray(kv_positions[..., -1:], jnp.int32)
    back = jnp.arange(1 - q_len, 1, dtype=jnp.int32)
    return last + back.reshape((1,) * (last.ndim - 1) + back.shape), 0


def both_positions(
    q_positions: str | AnyArray, kv_positions: AnyArray | None, q_len: int, kv_len: int
) -> tuple[Int[Array, "*batch q_len"], Int[Array, "*batch kv_len"]]:
    """The positions of all queries and of all keys, as arrays."""
    q, shift = query_positions(q_positions, kv_positions, q_len, kv_len)
    if q is None:
        q = jnp.arange(shift, shift + q_len, dtype=jnp.int32)
    if kv_positions is None:
        return q, jnp.arange(kv_len, dtype=jnp.int32)
    return q, jnp.asarray(kv_positions, jnp.int32)


class Tile(NamedTuple):
    """What a mask or a score may know of a tile, but for its own leaves: `q_index`,
    `kv_index`, `q_position`, `kv_position` and `head`, as integers.

    Each array broadcasts against `(head, query, key)`.
    """

    q_index: Int[Array, "1 query 1"]
    kv_index: Int[Array, "1 1 key"]
    q_position: Int[Array, "1 query 1"]
    kv_position: Int[Array, "1 1 key"]
    head: Int[Array, "head 1 1"]


class Bounds(NamedTuple):
    """The least and the greatest that tiles hold, for all tiles at once: `lower` and
    `upper`, each a [`eqx_attention.extend.Tile`][] of the axes (head, query block, key
    block)."""

    lower: Tile
    upper: Tile


def places(block: Block, axis: int) -> Int[Array, "1 head query key"]:
    """Where the heads (`axis` 1), queries (2) or keys (3) of a tile are in these arrays."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    count = jnp.arange(block.sizes[axis], dtype=jnp.int32)
    return (block.starts[axis] + count).reshape(shape)


def tile(q: Tokens, kv: Tokens, head: Array | None, block: Block) -> Tile:
    """One tile's tokens; each array has a batch axis in front. `head` are the numbers of
    the heads, if they are not counted from 0."""
    q_index = places(block, 2) if q.index is None else cut(q.index, block)
    kv_index = places(block, 3) if kv.index is None else cut(kv.index, block)
    return Tile(
        q_index,
        kv_index,
        q_index + q.shift if q.position is None else cut(q.position, block),
        kv_index + kv.shift if kv.position is None else cut(kv.position, block),
        places(block, 1) if head is None else cut(head, block),
    )


def bounds(q: Tokens, kv: Tokens, block_q: int, block_k: int) -> Bounds:
    """The ranges of all tiles of a call; each array has a batch axis in front."""
    q_low, q_high, q_pos = _ranges(q, 2, block_q)
    kv_low, kv_high, kv_pos = _ranges(kv, 3, block_k)
    head = jnp.zeros((1, 1, 1, 1), jnp.int32)
    return Bounds(
        Tile(q_low, kv_low, q_pos[0], kv_pos[0], head),
        Tile(q_high, kv_high, q_pos[1], kv_pos[1], head),
    )


def starts(length: int, size: int) -> Int[Array, " blocks"]:
    """Where each block starts; the last one ends where the axis ends."""
    first = jnp.arange(ceil_div(length, size), dtype=jnp.int32) * size
    return jnp.minimum(first, length - size)


def _ranges(tokens: Tokens, axis: int, size: int):
    if tokens.index is None:
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        low = starts(tokens.length, size).reshape(shape)
        high = low + (size - 1)
    else:
        low = blocks(tokens.index, axis, size, jnp.min)
        high = blocks(tokens.index, axis, size, jnp.max)
    if tokens.position is None:
        return low, high, (low + tokens.shift, high + tokens.shift)
    low_pos = blocks(tokens.position, axis, size, jnp.min)
    high_pos = blocks(tokens.position, axis, size, jnp.max)
    return low, high, (low_pos, high_pos)
