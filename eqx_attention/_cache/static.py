import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from beartype import beartype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, jaxtyped

from .._mask import AbstractMask, Padding
from .base import AbstractCache


@dataclasses.dataclass(frozen=True)
class _CacheFull(Sequence):
    """The error message for each length that a cache may have."""

    capacity: int
    new: str

    def __len__(self) -> int:
        return self.capacity + 1

    def __getitem__(self, length):
        return (
            f"cache full: capacity {self.capacity}, length {length}, asked to append "
            f"{self.new} tokens."
        )


class StaticCache(AbstractCache):
    """A cache of a fixed number of tokens, in order: slot `i` holds token `i`.

    !!! Example

        ```python
        import eqx_attention as eqa
        import jax.numpy as jnp

        cache = eqa.StaticCache.init(capacity=128, num_kv_heads=2, head_dim=64)
        cache = cache.append(jnp.ones((5, 2, 64)), jnp.ones((5, 2, 64)))
        out = cache.attend(jnp.ones((1, 8, 64)), mask=eqa.Causal())
        ```

    In a jitted loop, donate the cache (`eqx.filter_jit(donate="all")`, or
    `jax.jit(donate_argnums=...)`): `append` then writes in place.
    """

    key_: Float[Array, "*batch capacity kv_heads head_dim"]
    value: Float[Array, "*batch capacity kv_heads value_dim"]
    length: Int32[Array, "*batch"]

    def __check_init__(self):
        for name, x in (("key_", self.key_), ("value", self.value)):
            if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(
                    f"StaticCache: {name} must be floating-point numbers of shape "
                    f"(*batch, capacity, kv_heads, channels); got {x.dtype} of {x.shape}."
                )
        *batch, _, _, _ = self.key_.shape
        if self.value.shape[:-1] != self.key_.shape[:-1]:
            raise TypeError(
                "StaticCache: value must have the axes of key_ but for the last, "
                f"{self.key_.shape[:-1]}; got {self.value.shape}."
            )
        if self.length.shape != tuple(batch) or self.length.dtype != jnp.int32:
            raise TypeError(
                f"StaticCache: length must be int32 of shape {tuple(batch)}; got "
                f"{self.length.dtype} of {self.length.shape}."
            )

    @classmethod
    @jaxtyped(typechecker=beartype)
    def init(
        cls,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        batch: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
    ) -> "StaticCache":
        value_dim = head_dim if value_dim is None else value_dim
        for name, size in (
            ("capacity", capacity),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            *(("batch", size) for size in batch),
        ):
            if size < 1:
                raise ValueError(f"StaticCache: {name} must be positive; got {size}.")
        if value_dim < 0:
            raise ValueError(f"StaticCache: value_dim must be >= 0; got {value_dim}.")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"StaticCache: dtype must be a floating-point dtype; got {dtype}."
            )
        shape = (*batch, capacity, num_kv_heads)
        return cls(
            key_=jnp.zeros((*shape, head_dim), dtype),
            value=jnp.zeros((*shape, value_dim), dtype),
            length=jnp.zeros(batch, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        return self.key_.shape[-3]

    @jax.named_scope("eqa.StaticCache.append")
    @jaxtyped(typechecker=beartype)
    def append(
        self,
        key_: Float[Array, "*batch n kv_heads head_dim"],
        value: Float[Array, "*batch n kv_heads value_dim"],
        *,
        lengths: Int[Array, "*#batch"] | None = None,
    ) -> "StaticCache":
        for name, new, buffer in (
            ("key_", key_, self.key_),
            ("value", value, self.value),
        ):
            *batch, _, heads, dim = buffer.shape
            if (*new.shape[:-3], *new.shape[-2:]) != (*batch, heads, dim):
                expected = ", ".join(map(str, (*batch, "n", heads, dim)))
                raise TypeError(
                    f"StaticCache.append: {name} must have shape ({expected}); got "
                    f"{new.shape}."
                )
            if new.dtype != buffer.dtype:
                raise TypeError(
                    f"StaticCache.append: {name} must have the cache's dtype "
                    f"{buffer.dtype}; got {new.dtype}."
                )
        n = key_.shape[-3]
        if n > self.capacity:
            raise ValueError(
                f"cache full: capacity {self.capacity}, asked to append {n} tokens."
            )
        ragged = lengths is not None
        if lengths is None:
            added = jnp.full_like(self.length, n)
        else:
            added = jnp.broadcast_to(lengths, self.length.shape).astype(jnp.int32)
            added = eqx.error_if(
                added,
                (added < 0) | (added > n),
                f"StaticCache.append: lengths must be in [0, {n}], the number of tokens "
                "given.",
            )
        full = self.length + added > self.capacity
        # The message tells the longest of the sequences that are full.
        start = eqx.branched_error_if(
            self.length,
            full,
            jnp.max(jnp.where(full, self.length, 0)),
            _CacheFull(self.capacity, f"up to {n}" if ragged else str(n)),
        )
        write = _write_ragged if ragged else _write
        for _ in self.length.shape:
            write = jax.vmap(write)
        return StaticCache(
            key_=write(self.key_, key_, start, added),
            value=write(self.value, value, start, added),
            length=start + added,
        )

    def keys_values(self) -> tuple[Array, Array, None, AbstractMask]:
        return self.key_, self.value, None, Padding(self.length)


def _write(buffer: Array, new: Array, start: Array, _) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, axis=0)


def _write_ragged(buffer: Array, new: Array, start: Array, added: Array) -> Array:
    index = jnp.arange(new.shape[0], dtype=start.dtype)
    # Padding goes past the end, where it is dropped.
    slot = jnp.where(index < added, start + index, buffer.shape[0])
    return buffer.at[slot].set(new, mode="drop", unique_indices=False)
