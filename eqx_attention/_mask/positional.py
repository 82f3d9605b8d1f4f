"""Masks that go by the positions of tokens."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._arguments import as_integer
from .._axes import axes
from .._static import AnyArray, pdoc, Static, unwrap
from .._tokens import Bounds, Tile
from .base import AbstractMask, Or, Summary


_Number = Static | Int[Array, "..."]


class Causal(AbstractMask):
    r"""A query sees the keys at its own position and before it.

    That is, $j \le i + \text{offset}$.
    """

    _offset: _Number = axes("batch")

    def __init__(self, offset: int | Int[AnyArray, "..."] = 0):
        """**Arguments:**

        - `offset`: how many positions after its own a query sees (negative: how many
            before it are hidden). A Python integer, which is static, or an integer array
            that broadcasts against the batch axes. Default 0.
        """
        self._offset = as_integer("Causal(offset)", offset)

    def __check_init__(self):
        as_integer("Causal(offset)", self._offset)

    @property
    def offset(self) -> int | Int[Array, "..."]:
        return unwrap(self._offset)

    __pdoc__ = pdoc

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return tile.kv_position - tile.q_position <= self.offset

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        low, high = bounds
        return Summary(
            low.kv_position - high.q_position <= upper.offset,
            high.kv_position - low.q_position <= self.offset,
        )


class SlidingWindow(AbstractMask):
    r"""A query sees the keys near it: $-\text{left} \le j - i \le \text{right}$.

    Counts exclude the query itself: `SlidingWindow(255)` sees 256 keys.

    ??? cite

        [Longformer: The Long-Document Transformer](https://arxiv.org/abs/2004.05150)

        ```bibtex
        @article{beltagy2020longformer,
            title={Longformer: The Long-Document Transformer},
            author={Beltagy, Iz and Peters, Matthew E. and Cohan, Arman},
            journal={arXiv:2004.05150},
            year={2020}
        }
        ```
    """

    _left: _Number = axes("batch")
    _right: _Number = axes("batch")

    def __init__(
        self,
        left: int | None | Int[AnyArray, "..."],
        right: int | None | Int[AnyArray, "..."] = 0,
    ):
        """**Arguments:**

        - `left`: how many positions before its own a query sees. `None` is unbounded.
        - `right`: how many positions after its own a query sees. `None` is unbounded.
            Default 0.

        Each is a Python integer, which is static, or an integer array that broadcasts
        against the batch axes (so that one scan runs over layers of several windows).

        **Raises:** `ValueError` if a Python integer is negative.
        """
        self._left = as_integer("SlidingWindow(left)", left, 0, optional=True)
        self._right = as_integer("SlidingWindow(right)", right, 0, optional=True)

    def __check_init__(self):
        as_integer("SlidingWindow(left)", self._left, 0, optional=True)
        as_integer("SlidingWindow(right)", self._right, 0, optional=True)

    @property
    def left(self) -> int | None | Int[Array, "..."]:
        return unwrap(self._left)

    @property
    def right(self) -> int | None | Int[Array, "..."]:
        return unwrap(self._right)

    __pdoc__ = pdoc

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        distance = tile.kv_position - tile.q_position
        yes = jnp.ones((1, 1, 1), bool)
        left = yes if self.left is None else distance >= -self.left
        right = yes if self.right is None else distance <= self.right
        return left & right

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        least = bounds.lower.kv_position - bounds.upper.q_position
        most = bounds.upper.kv_position - bounds.lower.q_position
        some, every = jnp.ones((2, 1, 1, 1), bool)
        if self.left is not None:
            some, every = some & (most >= -upper.left), every & (least >= -self.left)
        if self.right is not None:
            some, every = some & (least <= upper.right), every & (most <= self.right)
        return Summary(some, every)


class Prefix(AbstractMask):
    r"""Every query sees the keys at the first positions: $j < \text{length}$."""

    _length: _Number = axes("batch")

    def __init__(self, length: int | Int[AnyArray, "..."]):
        """**Arguments:**

        - `length`: how many positions, from 0, are visible. A Python integer, which is
            static, or an integer array that broadcasts against the batch axes.

        **Raises:** `ValueError` if a Python integer is negative.
        """
        self._length = as_integer("Prefix(length)", length, 0)

    def __check_init__(self):
        as_integer("Prefix(length)", self._length, 0)

    @property
    def length(self) -> int | Int[Array, "..."]:
        return unwrap(self._length)

    __pdoc__ = pdoc

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return tile.kv_position < self.length

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        return Summary(
            bounds.lower.kv_position < upper.length,
            bounds.upper.kv_position < self.length,
        )


def PrefixLM(length: int | Int[Array, "..."]) -> Or:
    """Causal attention, except that the first `length` positions are seen by all queries.

    This is `Causal() | Prefix(length)`; see [`eqx_attention.Prefix`][].

    ??? cite

        [Exploring the Limits of Transfer Learning with a Unified Text-to-Text
        Transformer](https://arxiv.org/abs/1910.10683)

        ```bibtex
        @article{raffel2020exploring,
            title={Exploring the Limits of Transfer Learning with a Unified Text-to-Text
                   Transformer},
            author={Raffel, Colin and Shazeer, Noam and Roberts, Adam and Lee, Katherine
                    and Narang, Sharan and Matena, Michael and Zhou, Yanqi and Li, Wei
                    and Liu, Peter J.},
            journal={Journal of Machine Learning Research},
            volume={21},
            year={2020}
        }
        ```
    """
    return Or((Causal(), Prefix(length)))


class Chunked(AbstractMask):
    r"""A query sees its own chunk of positions.

    That is, $\lfloor j / \text{size} \rfloor = \lfloor i / \text{size} \rfloor$.
    """

    _size: _Number = axes("batch")

    def __init__(self, size: int | Int[AnyArray, "..."]):
        """**Arguments:**

        - `size`: how many positions a chunk has. A Python integer, which is static, or an
            integer array that broadcasts against the batch axes.

        **Raises:** `ValueError` if a Python integer is not positive.
        """
        self._size = as_integer("Chunked(size)", size, 1)

    def __check_init__(self):
        as_integer("Chunked(size)", self._size, 1)

    @property
    def size(self) -> int | Int[Array, "..."]:
        return unwrap(self._size)

    __pdoc__ = pdoc

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return tile.q_position // self.size == tile.kv_position // self.size

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        # `size` belongs to no token, so `self` and `upper` hold the same.
        q_low, q_high = (b.q_position // self.size for b in bounds)
        kv_low, kv_high = (b.kv_position // self.size for b in bounds)
        some = (q_low <= kv_high) & (kv_low <= q_high)
        every = (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
        return Summary(some, every)
