"""Masks that go by what is known of each token, by its index."""

import functools as ft
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Shaped

from .._arguments import as_array, as_integer
from .._axes import axes
from .._static import AnyArray, is_array, pdoc, Static, unwrap
from .._tokens import Bounds, Tile
from .base import AbstractMask, Summary


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
        self.q_ids = _ids("q", q_ids).astype(jnp.int32)
        kv_ids = self.q_ids if kv_ids is None else kv_ids
        self.kv_ids = _ids("kv", kv_ids).astype(jnp.int32)

    def __check_init__(self):
        _ids("q", self.q_ids)
        _ids("kv", self.kv_ids)

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

        **Raises:** `TypeError` if they are not integers; `ValueError` if one is negative or
            the documents do not fit.
        """
        where = "Segments.from_lengths"
        lengths = _sequence(f"{where}(lengths)", lengths)
        as_array(f"{where}(lengths)", lengths, "integers", "*batch segments")
        total = unwrap(as_integer(f"{where}(total)", total, 0, optional=True))
        if isinstance(lengths, Tracer):
            if total is None:
                raise ValueError(
                    f"{where}(total): expected an integer, as lengths are traced; got None."
                )
        else:
            known = np.asarray(lengths)
            sums = known.sum(-1)
            total = int(sums.max(initial=0)) if total is None else total
            if (known < 0).any():
                raise ValueError(f"{where}(lengths): expected none < 0, got {known}.")
            if (sums > total).any():
                raise ValueError(
                    f"{where}(lengths): expected documents of at most total={total} tokens "
                    f"in all, got {known}, {sums} in all."
                )
        ends = jnp.cumsum(jnp.asarray(lengths, jnp.int32), axis=-1)
        index = jnp.arange(total, dtype=jnp.int32)
        num_ended = ft.partial(jnp.searchsorted, v=index, side="right")
        return Segments(jnp.vectorize(num_ended, signature="(n)->(m)")(ends))

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return self.q_ids == self.kv_ids

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        some = (self.q_ids <= upper.kv_ids) & (self.kv_ids <= upper.q_ids)
        every = (self.q_ids == upper.kv_ids) & (self.kv_ids == upper.q_ids)
        return Summary(some, every)


def _ids(side: str, x) -> Array:
    return as_array(f"Segments({side}_ids)", x, "integers", f"*#batch {side}_len")


def _sequence(where: str, lengths) -> AnyArray:
    if is_array(lengths):
        return lengths
    integers = isinstance(lengths, Sequence) and not any(
        isinstance(n, bool) or not isinstance(n, int | np.integer) for n in lengths
    )
    if not integers:
        raise TypeError(
            f"{where}: expected a sequence of integers or an integer array (which may have "
            f"batch axes), got {lengths!r}."
        )
    return np.asarray(lengths, np.int64)


class Padding(AbstractMask):
    """The first tokens of each sequence are visible; those after them are padding."""

    _kv_lengths: Static | Int[Array, "*batch"] = axes("batch")
    _q_lengths: Static | Int[Array, "*batch"] = axes("batch")

    def __init__(
        self,
        kv_lengths: int | Int[AnyArray, "*#batch"],
        q_lengths: int | Int[AnyArray, "*#batch"] | None = None,
    ):
        """**Arguments:**

        - `kv_lengths`: how many key tokens of each sequence are visible. A Python integer,
            which is static, or an integer array that broadcasts against the batch axes.
        - `q_lengths`: likewise, how many query tokens of each sequence see anything.
            Defaults to all.

        **Raises:** `TypeError` if they are not integers; `ValueError` if a Python integer
            is negative.
        """
        self._kv_lengths = as_integer("Padding(kv_lengths)", kv_lengths, 0)
        self._q_lengths = as_integer("Padding(q_lengths)", q_lengths, 0, optional=True)

    def __check_init__(self):
        as_integer("Padding(kv_lengths)", self._kv_lengths, 0)
        as_integer("Padding(q_lengths)", self._q_lengths, 0, optional=True)

    @property
    def kv_lengths(self) -> int | Int[Array, "*batch"]:
        return unwrap(self._kv_lengths)

    @property
    def q_lengths(self) -> int | Int[Array, "*batch"] | None:
        return unwrap(self._q_lengths)

    __pdoc__ = pdoc

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        visible = tile.kv_index < self.kv_lengths
        if self.q_lengths is not None:
            visible = visible & (tile.q_index < self.q_lengths)
        return visible

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        low, high = bounds
        some = low.kv_index < upper.kv_lengths
        every = high.kv_index < self.kv_lengths
        if self.q_lengths is not None:
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
        kind = "booleans or integers"
        self.kv_valid = _valid("kv", kv_valid, kind).astype(bool)
        self.q_valid = None if q_valid is None else _valid("q", q_valid, kind).astype(bool)

    def __check_init__(self):
        _valid("kv", self.kv_valid, "booleans")
        if self.q_valid is not None:
            _valid("q", self.q_valid, "booleans")

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return self.kv_valid if self.q_valid is None else self.kv_valid & self.q_valid

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        some, every = upper.kv_valid, self.kv_valid
        if self.q_valid is not None:
            some, every = some & upper.q_valid, every & self.q_valid
        return Summary(some, every)


def _valid(side: str, x, kind: str) -> Array:
    return as_array(f"Keys({side}_valid)", x, kind, f"*#batch {side}_len")
