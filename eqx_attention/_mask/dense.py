"""Masks that are written out, pair by pair or tile by tile."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._arguments import as_array
from .._axes import axes, ceil_div
from .._static import AnyArray
from .._tokens import Bounds, Tile
from .base import AbstractMask, Summary


class Dense(AbstractMask):
    """A boolean for each pair, by index. A bare boolean array as `mask=` means this."""

    array: Bool[Array, "*batch heads q_len kv_len"] = axes("batch #head #query #key")

    def __init__(self, array: Bool[AnyArray, "..."]):
        """**Arguments:**

        - `array`: which pairs are visible. It broadcasts against
            `(*batch, q_heads, q_len, kv_len)`, so that `(q_len, kv_len)` will do too.

        **Raises:** `TypeError` if it is not a boolean array of at least two axes; and, when
            used, if it does not broadcast.
        """
        self.array = _array(array)

    def __check_init__(self):
        _array(self.array)

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return self.array

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        return Summary(upper.array, self.array)


def _array(x) -> Array:
    return as_array("Dense(array)", x, "booleans", "... #q_len #kv_len")


class BlockMask(AbstractMask):
    """A mask that is bound to its tokens, and whose tiles were evaluated beforehand.

    Made by [`eqx_attention.block_mask`][]. It goes by index: the positions are those it
    was made with. Mechanisms whose blocks differ from its own read its table too.
    """

    mask: AbstractMask
    q_position: Int[Array, "*batch q_len"] = axes("batch query")
    kv_position: Int[Array, "*batch kv_len"] = axes("batch key")
    # How many blocks before each block, in both directions, have a pair that is visible
    # (that is not): any rectangle's count is the difference of four entries.
    num_some: Int[Array, "..."] = axes("batch #head rest rest")
    num_not_every: Int[Array, "..."] = axes("batch #head rest rest")
    block_q: int = eqx.field(static=True)
    block_k: int = eqx.field(static=True)

    def __check_init__(self):
        table = []
        for name, block in (("q", self.block_q), ("kv", self.block_k)):
            if block < 1:
                raise ValueError(f"BlockMask: expected blocks of >= 1 token, got {block}.")
            where, position = f"{name}_position", getattr(self, f"{name}_position")
            as_array(f"BlockMask({where})", position, "integers", f"*batch {name}_len")
            table.append(ceil_div(position.shape[-1], block) + 1)
        for name in ("num_some", "num_not_every"):
            counts = getattr(self, name)
            as_array(f"BlockMask({name})", counts, "integers", "... rows columns")
            if counts.shape[-2:] != tuple(table):
                raise ValueError(
                    f"BlockMask({name}): expected a table of shape {tuple(table)}, got "
                    f"shape {counts.shape}."
                )

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        position = {"q_position": self.q_position, "kv_position": self.kv_position}
        return self.mask.visible(tile._replace(**position))

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        low, high = bounds
        rows = (low.q_index // self.block_q, high.q_index // self.block_q + 1)
        cols = (low.kv_index // self.block_k, high.kv_index // self.block_k + 1)

        def count(table):
            def at(row, col):
                row, col = jnp.broadcast_arrays(row[0, :, 0][:, None], col[0, 0])
                return table[:, 0, 0][:, row, col]

            inside = at(rows[1], cols[1]) - at(rows[0], cols[1])
            return inside - at(rows[1], cols[0]) + at(rows[0], cols[0])

        return Summary(count(self.num_some) > 0, count(self.num_not_every) == 0)
