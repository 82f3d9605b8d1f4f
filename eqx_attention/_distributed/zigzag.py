"""From the order that tokens have anyway to a layout, and back, between the devices.

Device `d` holds chunks `2d` and `2d + 1`; laid out, device `r` holds `r` and `2n - 1 - r`,
of which one is even. So all even chunks are one permutation, and all odd ones another.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._mechanism import Request
from .cargo import Devices, permuted
from .hop import roles


def to_zigzag(arrays: Sequence[tuple[Array, int]], devices: Devices) -> list[Array]:
    """Given are arrays, each with its axis of tokens."""
    firsts, seconds = _halves(arrays)
    even = permuted(firsts, devices, _homes(devices.count, 0))
    odd = permuted(seconds, devices, _homes(devices.count, 1))
    return _joined(arrays, even, odd, devices)


def from_zigzag(arrays: Sequence[tuple[Array, int]], devices: Devices) -> list[Array]:
    """The inverse of `to_zigzag`."""
    firsts, seconds = _halves(arrays)
    is_even = devices.me() % 2 == 0
    even = [jnp.where(is_even, a, b) for a, b in zip(firsts, seconds, strict=True)]
    odd = [jnp.where(is_even, b, a) for a, b in zip(firsts, seconds, strict=True)]
    back = [_inverse(_homes(devices.count, parity)) for parity in (0, 1)]
    firsts, seconds = (
        permuted(xs, devices, to) for xs, to in zip((even, odd), back, strict=True)
    )
    return [
        jnp.concatenate(halves, axis)
        for (_, axis), *halves in zip(arrays, firsts, seconds, strict=True)
    ]


def columns_to_zigzag(x: Array, n: int) -> Array:
    """The same for the last axis of what holds the keys of all devices, on each."""
    order = [c for r in range(n) for c in (r, 2 * n - 1 - r)]
    return _reordered(x, order)


def columns_from_zigzag(x: Array, n: int) -> Array:
    order = [c for r in range(n) for c in (r, 2 * n - 1 - r)]
    return _reordered(x, _inverse(order))


def _reordered(x: Array, order: Sequence[int]) -> Array:
    size = x.shape[3] // len(order)
    chunks = [lax.slice_in_dim(x, c * size, (c + 1) * size, axis=3) for c in order]
    return jnp.concatenate(chunks, axis=3)


def _homes(n: int, parity: int) -> tuple[int, ...]:
    """Where the even (odd) chunk of each device goes."""
    chunks = (2 * d + parity for d in range(n))
    return tuple(c if c < n else 2 * n - 1 - c for c in chunks)


def _inverse(to: Sequence[int]) -> tuple[int, ...]:
    return tuple(to.index(r) for r in range(len(to)))


def _halves(arrays: Sequence[tuple[Array, int]]) -> tuple[list[Array], list[Array]]:
    halves = [jnp.split(x, 2, axis) for x, axis in arrays]
    return [a for a, _ in halves], [b for _, b in halves]


def _joined(arrays, even: list[Array], odd: list[Array], devices: Devices) -> list[Array]:
    is_even = devices.me() % 2 == 0
    return [
        jnp.concatenate([jnp.where(is_even, a, b), jnp.where(is_even, b, a)], axis)
        for (_, axis), a, b in zip(arrays, even, odd, strict=True)
    ]


class Exchange:
    """Brings a request into the zigzag layout, and what comes of it back."""

    def __init__(self, request: Request, devices: Devices, needed: bool):
        """If it is not `needed`, then everything stays as it is."""
        self.devices, self.needed = devices, needed
        self.roles = roles(request, devices.count)
        self.request = request
        if needed:
            self.request = self._moved(request)

    def _moved(self, request: Request) -> Request:
        leaves, treedef = jax.tree.flatten(request.pairs)
        moving = [n for n in range(len(leaves)) if self._axis(n)]
        names = ("query", "key_", "value")
        arrays = [(getattr(request, name), 1) for name in names]
        arrays += [(leaves[n], self._axis(n)) for n in moving]
        found = to_zigzag(arrays, self.devices)
        for n, x in zip(moving, found[len(names) :], strict=True):
            leaves[n] = x
        for n, role in enumerate(self.roles):
            if role.keys == "columns":
                leaves[n] = columns_to_zigzag(leaves[n], self.devices.count)
        inputs = dict(zip(names, found))
        pairs = jax.tree.unflatten(treedef, leaves)
        return dataclasses.replace(request, **inputs, pairs=pairs)

    def there(self, *arrays: Array) -> list[Array]:
        """Given are arrays that have their tokens second."""
        if not self.needed:
            return list(arrays)
        return to_zigzag([(x, 1) for x in arrays], self.devices)

    def back(self, *arrays: Array) -> list[Array]:
        if not self.needed:
            return list(arrays)
        return from_zigzag([(x, 1) for x in arrays], self.devices)

    def leaves_back(self, leaves: Sequence[Array], numbers: Sequence[int]) -> list[Array]:
        """Given are gradients of leaves of the pairs, with their numbers."""
        out = dict(zip(numbers, leaves, strict=True))
        if not self.needed:
            return list(leaves)
        for n in numbers:
            if self.roles[n].keys == "columns":
                out[n] = columns_from_zigzag(out[n], self.devices.count)
        moving = [n for n in numbers if self._axis(n)]
        arrays = [(out[n], self._axis(n)) for n in moving]
        out |= dict(zip(moving, from_zigzag(arrays, self.devices), strict=True))
        return [out[n] for n in numbers]

    def _axis(self, n: int) -> int:
        """The axis of those tokens of a leaf that are split; 0 if it has none."""
        role = self.roles[n]
        return 2 if role.rows else 3 if role.keys == "sent" else 0
