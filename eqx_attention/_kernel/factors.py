"""Constant factors in the graph of a function of pairs, and what the function is to one of
its arguments: so that a kernel multiplies each pair by one number where the function is
written with several.

A value is a node of the graph, or a constant: an array of NumPy's, of one element. All are
of float32 here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax


_ZERO, _ONE = np.float32(0), np.float32(1)
# Factors beyond these are left as they are.
_LEAST, _MOST = 1e-30, 1e30
_SAME = frozenset(
    "broadcast_in_dim copy copy_p expand_dims reshape squeeze transpose".split()
)
_SIGNS = {"add": (1.0, 1.0), "add_any": (1.0, 1.0), "sub": (1.0, -1.0), "neg": (-1.0,)}


def is_constant(x: Any) -> bool:
    return isinstance(x, np.ndarray | np.generic)


def simplified(graph: Any, name: str, inputs: Sequence[Any]) -> Any:
    """The same value with its constant factors as one, or `None` if there is nothing to
    do."""
    if name == "mul":
        return _product(graph, *inputs)
    if name == "neg":
        return times(graph, -1.0, inputs[0])
    if name == "div" and is_constant(inputs[1]) and inputs[1].item() != 0:
        return times(graph, 1 / inputs[1].item(), inputs[0])
    return None


def factored(x: Any) -> tuple[float, Any]:
    """A constant factor of a value, and the rest: `None` if there is none."""
    if is_constant(x):
        return x.item(), None
    if _name(x) == "mul" and x.inside and is_constant(x.inputs[0]):
        return x.inputs[0].item(), x.inputs[1]
    return 1.0, x


def times(graph: Any, factor: float, x: Any) -> Any:
    """`factor * x`, with one factor."""
    if is_constant(x):
        return np.float32(factor * x.item())
    own, rest = factored(x)
    both = factor * own
    if not _LEAST < abs(both) < _MOST:
        return graph.make(lax.mul_p, (np.float32(factor), x))
    if both == 1:
        return rest
    if _name(rest) == "mul":
        # What is not of pairs takes it outside of the kernel.
        for n, y in enumerate(rest.inputs):
            if not is_constant(y) and not y.inside:
                y = graph.make(lax.mul_p, (np.float32(both), y))
                return graph.make(lax.mul_p, (y, rest.inputs[1 - n]))
    return graph.make(lax.mul_p, (np.float32(both), rest))


def _product(graph: Any, x: Any, y: Any) -> Any:
    (a, x_rest), (b, y_rest) = factored(x), factored(y)
    if x_rest is None or y_rest is None:
        return times(graph, a, y) if x_rest is None else times(graph, b, x)
    if not _LEAST < abs(a * b) < _MOST:
        return graph.make(lax.mul_p, (x, y))
    return times(graph, a * b, graph.make(lax.mul_p, (x_rest, y_rest)))


def spread(graph: Any, factor: float, x: Any) -> Any:
    """`factor * x`; of a sum, each term is multiplied if that costs a kernel nothing."""
    found = _taken(graph, factor, x)
    return times(graph, factor, x) if found is None else found


def _taken(graph: Any, factor: float, x: Any) -> Any:
    if is_constant(x) or not x.inside:
        return times(graph, factor, x)
    name = _name(x)
    if name in _SIGNS:
        terms = [_taken(graph, factor, y) for y in x.inputs]
        known = all(y is not None for y in terms)
        return _sum(graph, _SIGNS[name], terms) if known else None
    if name == "mul" and any(is_constant(y) or not y.inside for y in x.inputs):
        return times(graph, factor, x)
    return None


def _sum(graph: Any, signs: Sequence[float], terms: Sequence[Any]) -> Any:
    if len(terms) == 1:
        return times(graph, signs[0], terms[0])
    x, y = terms
    if is_constant(x) and is_constant(y):
        return np.float32(x.item() + signs[1] * y.item())
    if is_constant(y) and y.item() == 0:
        return x
    if is_constant(x) and x.item() == 0:
        return times(graph, signs[1], y)
    primitive = lax.add_p if signs[1] == 1 else lax.sub_p
    (a, x_rest), (b, y_rest) = factored(x), factored(y)
    if a == b and x_rest is not None and y_rest is not None:
        return times(graph, a, graph.make(primitive, (x_rest, y_rest)))
    return graph.make(primitive, (x, y))


def _name(x: Any) -> str:
    return getattr(getattr(x, "primitive", None), "name", "")


class Argument:
    """What values of a graph are to one of its arguments."""

    def __init__(self, graph: Any, number: int):
        self.graph, self.number = graph, number
        self._found: dict[tuple[str, int], Any] = {}

    def _once(self, what: str, x: Any, find: Callable[[Any], Any]) -> Any:
        at = (what, x.number)
        if at not in self._found:
            self._found[at] = find(x)
        return self._found[at]

    def _is(self, x: Any) -> bool:
        return x.primitive is None and x.params["argument"] == self.number

    def within(self, x: Any) -> bool:
        """Whether a value depends on it."""

        def find(x):
            return self._is(x) or any(map(self.within, x.inputs))

        return not is_constant(x) and self._once("within", x, find)

    def slope(self, x: Any) -> Any:
        """What it is multiplied with, if a value is linear in it; else `None`."""
        if is_constant(x):
            return _ZERO if x.item() == 0 else None
        return self._once("slope", x, self._slope)

    def _slope(self, x: Any) -> Any:
        if x.primitive is None:
            return _ONE if self._is(x) else None
        name, graph = _name(x), self.graph
        if name in ("mul", "div"):
            first = name == "div" or self.within(x.inputs[0])
            one, other = x.inputs if first else x.inputs[::-1]
            found = self.slope(one)
            if found is None or self.within(other):
                return None
            if name == "mul":
                return _product(graph, found, other)
            return graph.make(lax.div_p, (found, other))
        chosen = name == "select_n" and not self.within(x.inputs[0])
        if not chosen and name not in _SIGNS and name not in _SAME:
            return None
        found = [self.slope(y) for y in (x.inputs[1:] if chosen else x.inputs)]
        if any(y is None for y in found):
            return None
        if name in _SIGNS:
            return _sum(graph, _SIGNS[name], found)
        return graph.make(lax.select_n_p, (x.inputs[0], *found)) if chosen else found[0]

    def affine(self, x: Any) -> tuple[float, Any] | None:
        """A constant that it is multiplied with and what is added, if a value is that."""
        if not self.within(x):
            return 0.0, x
        return self._once("affine", x, self._affine)

    def _affine(self, x: Any) -> tuple[float, Any] | None:
        if x.primitive is None:
            return 1.0, _ZERO
        name = _name(x)
        if name == "mul" and is_constant(x.inputs[0]):
            factor, found = x.inputs[0].item(), self.affine(x.inputs[1])
            if found is None:
                return None
            return factor * found[0], spread(self.graph, factor, found[1])
        if name not in _SIGNS and name not in _SAME:
            return None
        found = [self.affine(y) for y in x.inputs]
        if any(y is None for y in found):
            return None
        factors, rests = zip(*found, strict=True)
        signs = _SIGNS.get(name, (1.0,))
        factor = sum(f * s for f, s in zip(factors, signs, strict=True))
        return factor, _sum(self.graph, signs, rests)
