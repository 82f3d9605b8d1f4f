"""Arrays on their way from device to device."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


class Devices(eqx.Module):
    """The devices of a ring: the mesh axes along which they lie, and how many they are."""

    names: tuple[str, ...] = eqx.field(static=True)
    count: int = eqx.field(static=True)

    def me(self) -> Array:
        """The number of this device."""
        return lax.axis_index(self.names)

    def onward(self, shift: int) -> tuple[int, ...]:
        """To which device each one sends what goes `shift` devices on."""
        return tuple((r + shift) % self.count for r in range(self.count))


class Cargo(eqx.Module):
    """Several arrays, all of one dtype in one piece: then they are one message."""

    pieces: tuple[Shaped[Array, " elements"], ...]
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    dtypes: tuple[Any, ...] = eqx.field(static=True)

    def __init__(self, arrays: Sequence[Array]):
        self.shapes = tuple(x.shape for x in arrays)
        self.dtypes = tuple(x.dtype for x in arrays)
        self.pieces = tuple(
            jnp.concatenate([x.ravel() for x in arrays if x.dtype == dtype])
            for dtype in dict.fromkeys(self.dtypes)
        )

    def arrays(self) -> list[Array]:
        ends = dict.fromkeys(self.dtypes, 0)
        pieces = dict(zip(ends, self.pieces, strict=True))
        out = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            start, size = ends[dtype], math.prod(shape)
            x = lax.slice_in_dim(pieces[dtype], start, start + size)
            out.append(x.reshape(shape))
            ends[dtype] = start + size
        return out

    def sent(self, devices: Devices, to: Sequence[int]) -> "Cargo":
        """What this device gets when each device `r` sends its own to device `to[r]`."""
        routes = tuple(enumerate(to))
        pieces = tuple(lax.ppermute(x, devices.names, routes) for x in self.pieces)
        return eqx.tree_at(lambda c: c.pieces, self, pieces)

    @property
    def num_bytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in self.pieces)


def permuted(arrays: Sequence[Array], devices: Devices, to: Sequence[int]) -> list[Array]:
    """Sends arrays from each device `r` to device `to[r]`."""
    return Cargo(arrays).sent(devices, to).arrays() if arrays else []
