"""What all caches ask: of their sizes and fields, and of the tokens that are appended."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int32

from .._keys import is_stored, Keys, Quantized


def check_sizes(name: str, dtype: DTypeLike, batch: tuple[int, ...], **sizes: int) -> None:
    """Of what is to be made."""
    for what, size in (*sizes.items(), *(("batch", size) for size in batch)):
        # No values, where they are a part of the keys.
        if size < (what != "value_dim"):
            least = ">= 0" if what == "value_dim" else "positive"
            raise ValueError(f"{name}: {what} must be {least}; got {size}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: dtype must be a floating-point dtype; got {dtype}.")


def check_buffers(cache: Any, axes: str) -> None:
    """Of `key_` and `value`, whose axes have these names, but for heads and channels."""
    name = type(cache).__name__
    for what, x in (("key_", cache.key_), ("value", cache.value)):
        _check_buffer(f"{name}: {what}", x, axes)
    if cache.value.shape[:-1] != cache.key_.shape[:-1]:
        raise TypeError(
            f"{name}: value must have the axes of key_ but for the last, "
            f"{cache.key_.shape[:-1]}; got {cache.value.shape}."
        )


def _check_buffer(what: str, x: Any, axes: str) -> None:
    names = axes.split(", ")
    batched = names[0].startswith("*")
    least = len(names) - batched + 2
    fits = x.ndim >= least if batched else x.ndim == least
    stored = not is_stored(x) or isinstance(x, Quantized)
    if not (fits and stored and jnp.issubdtype(x.dtype, jnp.floating)):
        raise TypeError(
            f"{what} must be floating-point numbers of shape ({axes}, kv_heads, "
            f"channels); got {form(x)} of {x.shape}."
        )


def check_int32(cache: Any, what: str, shape: tuple[int, ...]) -> None:
    x = getattr(cache, what)
    if x.shape != shape or x.dtype != jnp.int32:
        raise TypeError(
            f"{type(cache).__name__}: {what} must be int32 of shape {shape}; got {x.dtype} "
            f"of {x.shape}."
        )


def check_new(cache: Any, key_: Keys, value: Keys) -> None:
    """That tokens have the heads, the channels and the dtype of a cache's."""
    name = type(cache).__name__
    batch = cache.length.shape
    for what, new, buffer in (("key_", key_, cache.key_), ("value", value, cache.value)):
        heads, dim = buffer.shape[-2:]
        if (*new.shape[:-3], *new.shape[-2:]) != (*batch, heads, dim):
            expected = ", ".join(map(str, (*batch, "n", heads, dim)))
            raise TypeError(
                f"{name}.append: {what} must have shape ({expected}); got {new.shape}."
            )
        if form(new) != form(buffer):
            raise TypeError(
                f"{name}.append: {what} must have the cache's dtype {form(buffer)}; got "
                f"{form(new)}."
            )


def form(x: Keys) -> str:
    """The dtype, and how it is stored."""
    if isinstance(x, Quantized):
        return f"{x.dtype} quantized to {x.stored} and {x.scale.dtype}"
    return type(x).__name__ if is_stored(x) else str(x.dtype)


def num_added(
    cache: Any, n: int, lengths: Array | None
) -> tuple[Int32[Array, "*batch"], Int32[Array, "*batch"]]:
    """`(length, added)`: of each sequence, how many tokens it has, and how many come.

    **Raises:** if `lengths` are not of the tokens given.
    """
    length = cache.length
    if lengths is None:
        return length, jnp.full_like(length, n)
    added = jnp.broadcast_to(lengths, length.shape).astype(jnp.int32)
    added = eqx.error_if(
        added,
        (added < 0) | (added > n),
        f"{type(cache).__name__}.append: lengths must be in [0, {n}], the number of tokens "
        "given.",
    )
    return length, added


@dataclasses.dataclass(frozen=True)
class CacheFull(Sequence):
    """The error message for each length that a cache may have."""

    capacity: int
    n: int
    ragged: bool

    def __len__(self) -> int:
        return self.capacity + 1

    def __getitem__(self, length):
        new = f"up to {self.n}" if self.ragged else str(self.n)
        return (
            f"cache full: capacity {self.capacity}, length {length}, asked to append "
            f"{new} tokens."
        )


def check_fits(capacity: int, n: int) -> None:
    """What the shapes tell."""
    if n > capacity:
        raise ValueError(f"cache full: capacity {capacity}, asked to append {n} tokens.")


def is_full(
    capacity: int, length: Array, added: Array
) -> tuple[Bool[Array, ""], Int32[Array, ""]]:
    """Whether there is too little room, and the length of the longest sequence for which
    there is: the number of the message of `CacheFull`."""
    full = length + added > capacity
    return full.any(), jnp.max(jnp.where(full, length, 0))


@dataclasses.dataclass(frozen=True)
class Messages(Sequence):
    """The error messages of several checks, one after another."""

    parts: tuple[Sequence, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index):
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    def check(
        self, x: Array, wrong: tuple[Array, ...], numbers: tuple[Array, ...]
    ) -> Array:
        """`x`, which is an error if anything is wrong: the first that is, with the message
        of its number."""
        index = numbers[-1]
        before = len(self)
        for part, is_wrong, number in reversed(list(zip(self.parts, wrong, numbers))):
            before -= len(part)
            index = jnp.where(is_wrong, before + number, index)
        index = jnp.clip(index, 0, len(self) - 1)
        return eqx.branched_error_if(x, jnp.stack(wrong).any(), index, self)
