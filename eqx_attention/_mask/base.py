import functools as ft
from abc import abstractmethod
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import wadler_lindig as wl
from jaxtyping import Array, Bool

from .._static import is_array
from .._tokens import Bounds, Tile


class Summary(NamedTuple):
    """What is known of tiles without looking at their pairs.

    - `some`: may any pair of the tile be visible? If not, the tile is `EMPTY`.
    - `every`: are all of them surely visible? If so, the tile is `FULL`.

    A tile that is neither is `PARTIAL`. To say `some` too often or `every` too rarely only
    costs time; the opposite is wrong.
    """

    some: Bool[Array, "#head #q_blocks #kv_blocks"]
    every: Bool[Array, "#head #q_blocks #kv_blocks"]


class AbstractMask(eqx.Module):
    """Says which (query token, key token) pairs are visible. `True` is visible.

    Masks are closed under `&`, `|` and `~`. They are elementwise: whether a pair is
    visible depends on the two tokens (their indices, positions and features), the head
    and the batch element alone, so that any mechanism may slice either side and evaluate
    the mask on the slice.

    Each array in a mask is a leaf, and each Python number is static metadata. Fields that
    hold arrays declare the axes of these.
    """

    @abstractmethod
    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        """Evaluates the mask on a tile.

        **Arguments:**

        - `self`: the mask, each of whose arrays is sliced to the tile and has the axes
            `(head, query, key, *rest)`, of size one where it does not have the axis.
        - `tile`: the indices, positions and heads of the tile.

        **Returns:**

        Booleans that broadcast to the tile.
        """

    @abstractmethod
    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        """Evaluates the mask on the ranges of all tiles at once.

        **Arguments:**

        - `self`, `upper`: the mask, each of whose arrays holds the least (the greatest)
            value in each tile: axes `(head, query block, key block, *rest)`.
        - `bounds`: likewise, the least and greatest indices and positions.
        """

    def __and__(self, other: Any) -> "AbstractMask":
        return _combined(And, self, other)

    def __rand__(self, other: Any) -> "AbstractMask":
        return _combined(And, other, self)

    def __or__(self, other: Any) -> "AbstractMask":
        return _combined(Or, self, other)

    def __ror__(self, other: Any) -> "AbstractMask":
        return _combined(Or, other, self)

    # So that `array & mask` of NumPy leaves the matter to `__rand__`.
    __array_ufunc__ = None

    def __invert__(self) -> "AbstractMask":
        return self.mask if isinstance(self, Not) else Not(self)


class Full(AbstractMask):
    """Every pair is visible."""

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return jnp.ones((1, 1, 1), bool)

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        yes = jnp.ones((1, 1, 1), bool)
        return Summary(yes, yes)


class And(AbstractMask):
    """The pairs that all of several masks see. Made by `mask1 & mask2`."""

    masks: tuple[AbstractMask, ...]

    def __check_init__(self):
        _check_masks(type(self).__name__, self.masks)

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        return _joined("& ", self.masks, **kwargs)

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return ft.reduce(jnp.logical_and, [m.visible(tile) for m in self.masks])

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        pairs = zip(self.masks, upper.masks, strict=True)
        parts = [m.summary(u, bounds) for m, u in pairs]
        some = ft.reduce(jnp.logical_and, [s.some for s in parts])
        return Summary(some, ft.reduce(jnp.logical_and, [s.every for s in parts]))


class Or(AbstractMask):
    """The pairs that at least one of several masks sees. Made by `mask1 | mask2`."""

    masks: tuple[AbstractMask, ...]

    def __check_init__(self):
        _check_masks(type(self).__name__, self.masks)

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        return _joined("| ", self.masks, **kwargs)

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return ft.reduce(jnp.logical_or, [m.visible(tile) for m in self.masks])

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        pairs = zip(self.masks, upper.masks, strict=True)
        parts = [m.summary(u, bounds) for m, u in pairs]
        some = ft.reduce(jnp.logical_or, [s.some for s in parts])
        return Summary(some, ft.reduce(jnp.logical_or, [s.every for s in parts]))


class Not(AbstractMask):
    """The pairs that a mask does not see. Made by `~mask`."""

    mask: AbstractMask

    def __check_init__(self):
        _check_masks("Not", (self.mask,))

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        return wl.TextDoc("~") + wl.pdoc(self.mask, **kwargs)

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        return ~self.mask.visible(tile)

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        some, every = self.mask.summary(upper.mask, bounds)
        return Summary(~every, ~some)


def _joined(operator: str, masks: tuple[AbstractMask, ...], **kwargs) -> wl.AbstractDoc:
    """`(mask1 & mask2)`, broken before an operator where it is too long for a line."""
    docs = [wl.pdoc(mask, **kwargs) for mask in masks]
    inner = wl.join(wl.BreakDoc(" ") + wl.TextDoc(operator), docs)
    return (wl.TextDoc("(") + inner + wl.TextDoc(")")).group()


def _combined(cls: type[And] | type[Or], *masks: Any) -> Any:
    """What `&` and `|` make of two masks, or of a mask and a boolean array."""
    from .dense import Dense  # which is a mask, and so is defined after this file

    parts = []
    for mask in masks:
        mask = Dense(mask) if is_array(mask) else mask
        if not isinstance(mask, AbstractMask):
            return NotImplemented
        parts.extend(mask.masks if isinstance(mask, cls) else (mask,))
    return cls(tuple(parts))


def _check_masks(name: str, masks: Any):
    if not isinstance(masks, tuple) or not masks:
        raise ValueError(f"{name}(masks): expected a non-empty tuple of masks.")
    for m in masks:
        if not isinstance(m, AbstractMask):
            raise TypeError(f"{name}: expected masks, got {type(m).__name__}.")
