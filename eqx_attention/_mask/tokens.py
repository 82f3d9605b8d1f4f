"""Masks that go by what is known of each token, by its index."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Shaped

from .._axes import axes
from .._static import AnyArray, is_array
from .._tokens import Bounds, Tile
from .base import AbstractMask, Summary


def _tokens(where: str, x, least_rank: int, boolean: bool = False):
    if not is_array(x):
        raise TypeError(f"{where}: expected an array, got {type(x).__name__}.")
    x = jnp.asarray(x)
    kinds = "a boolean or integer" if boolean else "an integer"
    good = jnp.issubdtype(x.dtype, jnp.integer) or (boolean and x.dtype == jnp.bool_)
    if not good:
        raise TypeError(f"{where}: expected {kinds} array, got {x.dtype}.")
    if x.ndim < least_rank:
        raise TypeError(
            f"{where}: expected an array of at least {least_rank} axis, got shape "
            f"{x.shape}."
        )
    return x.astype(bool) if boolean else x.astype(jnp.int32)


class Segments(AbstractMask):
    """A query sees the keys of its own segment: the documents of a packed sequence.

    Segments need not be contiguous or sorted (but where they are, blockwise mechanisms
    skip the tiles between them).
    """

    q_ids: Int[Array, "*batch q_len"] = axes("batch query")
    kv_ids: Int[Array, "*batch kv_len"] = axes("batch key")

    def __init__(
        self,
        q_ids: Int[AnyArray, "*#batch q_len"],
        kv_ids: Int[AnyArray, "*#batch kv_len"] | None = None,
    ):
        """**Arguments:**

        - `q_ids`: the segment of each query token, by index.
        - `kv_ids`: the segment of each key token. Defaults to `q_ids`.

        **Raises:** `TypeError` if they are not integer arrays; and, when used, if they are
            not as long as the queries (the keys).
        """
        self.q_ids = _tokens("Segments(q_ids)", q_ids, 1)
        kv_ids = q_ids if kv_ids is None else kv_ids
        self.kv_ids = _tokens("Segments(kv_ids)", kv_ids, 1)

    @staticmethod
    def from_lengths(
        lengths: Sequence[int] | Int[AnyArray, "*batch segments"],
        total: int | None = None,
    ) -> "Segments":
        """The segments of documents laid one after another.

        **Arguments:**

        - `lengths`: how many tokens each document has, in order.
        - `total`: how many tokens there are. Defaults to the sum of `lengths`, which then
            must not be traced. Tokens beyond the documents form one more segment.

        **Raises:** `ValueError` if a length is negative or the documents do not fit.
        """
        concrete = not isinstance(lengths, Tracer)
        if concrete:
            known = np.asarray(lengths)
            sums = known.sum(-1)
            if (known < 0).any():
                raise ValueError(f"Segments.from_lengths(lengths): negative: {known}.")
            if total is None:
                total = int(sums.max())
            if (sums > total).any():
                raise ValueError(
                    f"Segments.from_lengths(lengths): the documents have {sums} tokens "
                    f"in all, which is more than total={total}."
                )
        if total is None:
            raise ValueError(
                "Segments.from_lengths(total): expected an integer, as `lengths` is traced."
            )
        ends = jnp.cumsum(jnp.asarray(lengths, jnp.int32), axis=-1)
        index = jnp.arange(total, dtype=jnp.int32)
        ids = (index[:, None] >= ends[..., None, :]).sum(-1, dtype=jnp.int32)
        return Segments(ids)

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return self.q_ids == self.kv_ids

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        some = (self.q_ids <= upper.kv_ids) & (self.kv_ids <= upper.q_ids)
        every = (self.q_ids == upper.kv_ids) & (self.kv_ids == upper.q_ids)
        return Summary(some, every)


class Padding(AbstractMask):
    """The first tokens of each sequence are visible; those after them are padding."""

    kv_lengths: Int[Array, "*batch"] = axes("batch")
    q_lengths: Int[Array, "*batch"] | None = axes("batch")

    def __init__(
        self,
        kv_lengths: Int[AnyArray, "*#batch"],
        q_lengths: Int[AnyArray, "*#batch"] | None = None,
    ):
        """**Arguments:**

        - `kv_lengths`: how many key tokens of each sequence are visible.
        - `q_lengths`: how many query tokens of each sequence see anything. Defaults to all.

        **Raises:** `TypeError` if they are not integer arrays.
        """
        self.kv_lengths = _tokens("Padding(kv_lengths)", kv_lengths, 0)
        if q_lengths is not None:
            q_lengths = _tokens("Padding(q_lengths)", q_lengths, 0)
        self.q_lengths = q_lengths

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        visible = tile.kv_index < self.kv_lengths
        if self.q_lengths is not None:
            visible = visible & (tile.q_index < self.q_lengths)
        return visible

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        low, high = bounds
        some = low.kv_index < upper.kv_lengths
        every = high.kv_index < self.kv_lengths
        if self.q_lengths is not None and upper.q_lengths is not None:
            some = some & (low.q_index < upper.q_lengths)
            every = every & (high.q_index < self.q_lengths)
        return Summary(some, every)


class Keys(AbstractMask):
    """Each key token is visible or not, as is given: padding on any side."""

    kv_valid: Bool[Array, "*batch kv_len"] = axes("batch key")
    q_valid: Bool[Array, "*batch q_len"] | None = axes("batch query")

    def __init__(
        self,
        kv_valid: Shaped[AnyArray, "*#batch kv_len"],
        q_valid: Shaped[AnyArray, "*#batch q_len"] | None = None,
    ):
        """**Arguments:**

        - `kv_valid`: which key tokens are visible: booleans, or integers of which all but
            0 are `True`.
        - `q_valid`: which query tokens see anything. Defaults to all.

        **Raises:** `TypeError` if they are not boolean or integer arrays; and, when used,
            if they are not as long as the keys (the queries).
        """
        self.kv_valid = _tokens("Keys(kv_valid)", kv_valid, 1, boolean=True)
        if q_valid is not None:
            q_valid = _tokens("Keys(q_valid)", q_valid, 1, boolean=True)
        self.q_valid = q_valid

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return self.kv_valid if self.q_valid is None else self.kv_valid & self.q_valid

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        some, every = upper.kv_valid, self.kv_valid
        if self.q_valid is not None and upper.q_valid is not None:
            some, every = some & upper.q_valid, every & self.q_valid
        return Summary(some, every)
