import equinox as eqx
import jax
import jax.numpy as jnp
from beartype import beartype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, jaxtyped

from .._keys import EightBits, Keys
from .._mask import AbstractMask, Padding
from .base import AbstractCache
from .checks import (
    CacheFull,
    check_buffers,
    check_fits,
    check_int32,
    check_new,
    check_sizes,
    is_full,
    num_added,
)
from .write import along, write


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

    key_: Float[Array, "*batch capacity kv_heads head_dim"] | EightBits
    value: Float[Array, "*batch capacity kv_heads value_dim"] | EightBits
    length: Int32[Array, "*batch"]

    def __check_init__(self):
        check_buffers(self, "*batch, capacity")
        check_int32(self, "length", tuple(self.key_.shape[:-3]))

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
        check_sizes(
            "StaticCache",
            dtype,
            batch,
            capacity=capacity,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
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

    @property
    def recent(self) -> None:
        return None

    @jax.named_scope("eqa.StaticCache.append")
    @jaxtyped(typechecker=beartype)
    def append(
        self,
        key_: Float[Keys, "*batch n kv_heads head_dim"],
        value: Float[Keys, "*batch n kv_heads value_dim"],
        *,
        lengths: Int[Array, "*#batch"] | None = None,
    ) -> "StaticCache":
        check_new(self, key_, value)
        n, ragged = key_.shape[-3], lengths is not None
        check_fits(self.capacity, n)
        length, added = num_added(self, n, lengths)
        messages = CacheFull(self.capacity, n, ragged)
        full = is_full(self.capacity, length, added)
        start = eqx.branched_error_if(length, *full, messages)
        slots = along(start, n) if ragged else start
        return StaticCache(
            key_=write(self.key_, key_, slots, added),
            value=write(self.value, value, slots, added),
            length=start + added,
        )

    def keys_values(self) -> tuple[Keys, Keys, None, AbstractMask]:
        return self.key_, self.value, None, Padding(self.length)
