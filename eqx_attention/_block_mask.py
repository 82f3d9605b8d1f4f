"""Masks, evaluated on their own: all pairs, or tile by tile."""

import math

import jax
import jax.numpy as jnp
from beartype import beartype as typechecker
from jax import lax
from jaxtyping import Array, Bool, Int, jaxtyped

from ._axes import Block, canonical, ceil_div, cut, over_batch, own_sizes, Sizes
from ._mask import AbstractMask, BlockMask
from ._options import as_mask, check_positions
from ._static import AnyArray, is_array
from ._tokens import both_positions, Tile, tile, Tokens


@jaxtyped(typechecker=typechecker)
def block_mask(
    mask: AbstractMask | Bool[AnyArray, "..."],
    q_len: int,
    kv_len: int,
    *,
    num_heads: int | None = None,
    block_q: int = 128,
    block_k: int = 128,
    q_positions: str | Int[AnyArray, " q_len"] = "start",
    kv_positions: Int[AnyArray, " kv_len"] | None = None,
) -> BlockMask:
    """Evaluates a mask once, and exactly, so that each use of it can skip tiles.

    Of most masks, mechanisms know which tiles they may skip. Of an
    [`eqx_attention.Predicate`][] without a summary, of segments that are not sorted, and of
    most combinations of masks by `&`, they know less: they compute tiles in which nothing
    is visible. This finds out, in memory that is linear in the lengths, but for one number
    a tile.

    **Arguments:**

    - `mask`: any mask, or a boolean array.
    - `q_len`, `kv_len`: the lengths of the calls in which it will be used.
    - `num_heads`: the number of query heads. Needed only if a function in the mask looks at
        the head.
    - `block_q`, `block_k`: how many query (key) tokens a tile has. Default 128. They need
        not be those of a mechanism.
    - `q_positions`, `kv_positions`: as for [`eqx_attention.attend`][]. The result is bound
        to them: where it is used, the positions of the call do not matter to it.

    **Returns:**

    A mask that sees the same pairs.

    **Raises:** `TypeError` if the mask does not fit the lengths; `ValueError` if
        `num_heads` is needed, a length is negative, or a tile has no tokens.
    """
    sizes = dict(q_len=q_len, kv_len=kv_len, block_q=block_q, block_k=block_k)
    for name, size in sizes.items():
        least = 1 if name.startswith("block") else 0
        if isinstance(size, bool):
            raise TypeError(f"{name}: expected an integer, got {size}.")
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}.")
    mask = as_mask(mask)
    bound = Bound(mask, q_len, kv_len, num_heads, q_positions, kv_positions)
    sizes = bound.sizes
    block_q, block_k = min(block_q, q_len), min(block_k, kv_len)
    pad = [(0, 0), (0, 0), (0, -kv_len % block_k)]

    def row(n):
        start = jnp.minimum(n * block_q, q_len - block_q)
        batch = math.prod(sizes.batch)
        block = Block((0, 0, start, 0), (batch, sizes.head, block_q, kv_len))
        seen = bound.visible(block)
        fresh = (start + jnp.arange(block_q) >= n * block_q)[None, None, :, None]
        some = jnp.any(seen & fresh, axis=2)
        every = jnp.all(seen | ~fresh, axis=2)
        some = jnp.pad(some, pad).reshape(*some.shape[:2], -1, block_k)
        every = jnp.pad(every, pad, constant_values=True).reshape(some.shape)
        return some.any(-1), every.all(-1)

    rows = jnp.arange(ceil_div(q_len, block_q), dtype=jnp.int32)
    some, every = (x.transpose(1, 2, 0, 3) for x in lax.map(row, rows))
    batch = sizes.batch if some.shape[0] > 1 else ()
    some, every = (x.reshape(*batch, *x.shape[1:]) for x in (some, every))
    return BlockMask(
        mask,
        bound.q_position,
        bound.kv_position,
        _sums(some),
        _sums(~every),
        block_q,
        block_k,
    )


class Bound:
    """A mask with its tokens, for evaluation without queries and keys."""

    def __init__(
        self,
        mask: AbstractMask,
        q_len: int,
        kv_len: int,
        num_heads: int | None,
        q_positions: str | AnyArray = "start",
        kv_positions: AnyArray | None = None,
    ):
        for name, size in (
            ("q_len", q_len),
            ("kv_len", kv_len),
            ("num_heads", 1 if num_heads is None else num_heads),
        ):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}.")
        batch, heads = own_sizes(mask, "mask")
        if num_heads is not None and heads not in (1, num_heads):
            raise ValueError(
                f"num_heads: expected {heads}, as arrays of the mask say; got {num_heads}."
            )
        heads = heads if num_heads is None else num_heads
        check_positions(q_positions, "q_positions", ("start", "end"))
        check_positions(kv_positions, "kv_positions", (None,))
        self.q_position, self.kv_position = both_positions(
            q_positions, kv_positions, q_len, kv_len
        )
        self.sizes = Sizes(batch, heads, q_len, kv_len)
        self._mask = canonical(mask, self.sizes, "mask")
        if num_heads is None and self._looks_at_heads():
            raise ValueError(
                "num_heads: expected the number of query heads, as a function in the mask "
                "looks at the head; got None."
            )

    def visible(self, block: Block) -> Bool[Array, "#batch #head query key"]:
        mask = jax.tree.map(lambda x: cut(x, block) if is_array(x) else x, self._mask)
        q = Tokens(self.q_position[None, None, :, None], self.sizes.query, 0)
        kv = Tokens(self.kv_position[None, None, None], self.sizes.key, 0)

        def of_tile(tree: tuple[AbstractMask, Tile]):
            mask, tokens = tree
            return mask.visible(tokens)

        seen = over_batch(of_tile, (mask, tile(q, kv, None, block)))
        return jnp.broadcast_to(seen, (*seen.shape[:2], *block.sizes[2:]))

    def whole(self) -> Bool[Array, "#batch #head query key"]:
        batch = math.prod(self.sizes.batch)
        return self.visible(Block((0, 0, 0, 0), (batch, *self.sizes[1:])))

    def _looks_at_heads(self) -> bool:
        if self.sizes.head > 1:
            return False
        two = Block((0, 0, 0, 0), (math.prod(self.sizes.batch), 2, *self.sizes[2:]))
        return jax.eval_shape(lambda: self.visible(two)).shape[1] > 1


def _sums(x: Bool[Array, "*batch rows columns"]) -> Int[Array, "*batch _ _"]:
    """How many entries are true before each, in both directions."""
    x = jnp.pad(x.astype(jnp.int32), [(0, 0)] * (x.ndim - 2) + [(1, 0), (1, 0)])
    return jnp.cumsum(jnp.cumsum(x, axis=-2), axis=-1)
