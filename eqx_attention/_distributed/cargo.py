"""Arrays on their way from device to device."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped, UInt32


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
    """Several arrays in one piece, so that they are one message."""

    piece: Shaped[Array, " elements"]
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    dtypes: tuple[Any, ...] = eqx.field(static=True)

    def __init__(self, arrays: Sequence[Array]):
        self.shapes = tuple(x.shape for x in arrays)
        self.dtypes = tuple(x.dtype for x in arrays)
        flat = [x.ravel() for x in arrays]
        flat = [_words(x) for x in flat] if self._mixed else flat
        self.piece = jnp.concatenate(flat)

    @property
    def _mixed(self) -> bool:
        return len(set(self.dtypes)) > 1

    def arrays(self) -> list[Array]:
        out, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size = math.prod(shape)
            count = -(-size * _item(dtype) // 4) if self._mixed else size
            x = lax.slice_in_dim(self.piece, start, start + count)
            x = _of_words(x, size, dtype) if self._mixed else x
            out.append(x.reshape(shape))
            start += count
        return out

    def sent(self, devices: Devices, to: Sequence[int]) -> "Cargo":
        """What this device gets when each device `r` sends its own to device `to[r]`."""
        piece = lax.ppermute(self.piece, devices.names, tuple(enumerate(to)))
        return eqx.tree_at(lambda cargo: cargo.piece, self, piece)

    @property
    def num_bytes(self) -> int:
        return self.piece.size * self.piece.dtype.itemsize


def sent_together(
    cargoes: Sequence[Cargo], devices: Devices, to: Sequence[int]
) -> list[Cargo]:
    """Several cargoes in one message: XLA may have but one on the way at a time."""
    pieces = Cargo([cargo.piece for cargo in cargoes]).sent(devices, to).arrays()
    return [
        eqx.tree_at(lambda cargo: cargo.piece, cargo, piece)
        for cargo, piece in zip(cargoes, pieces, strict=True)
    ]


def permuted(arrays: Sequence[Array], devices: Devices, to: Sequence[int]) -> list[Array]:
    """Sends arrays from each device `r` to device `to[r]`."""
    return Cargo(arrays).sent(devices, to).arrays() if arrays else []


def _item(dtype: Any) -> int:
    return jnp.dtype(dtype).itemsize


def _words(x: Shaped[Array, " elements"]) -> UInt32[Array, " words"]:
    """The bits of an array, in whole words of 32."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    if _item(x.dtype) < 4:
        each = 4 // _item(x.dtype)
        x = jnp.pad(x, (0, -x.size % each)).reshape(-1, each)
    return lax.bitcast_convert_type(x, jnp.uint32).ravel()


def _of_words(
    words: UInt32[Array, " words"], size: int, dtype: Any
) -> Shaped[Array, " elements"]:
    bits = jnp.uint8 if dtype == jnp.bool_ else dtype
    if _item(bits) == 8:
        words = words.reshape(-1, 2)
    x = lax.bitcast_convert_type(words, bits).ravel()
    return lax.slice_in_dim(x, 0, size).astype(dtype)
