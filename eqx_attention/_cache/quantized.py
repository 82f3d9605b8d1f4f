from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from beartype import beartype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, jaxtyped

from .._keys import check_stored_dtype, Keys, quantize, Quantized
from .._mask import AbstractMask
from .base import AbstractCache
from .static import StaticCache


class QuantizedCache(AbstractCache):
    """A cache that stores keys and values in 8 bits, in the slots of any other cache.

    Each token's key and value of each head has a scale of its own: the largest of its
    channels is stored exactly. Attention reads one block of the cache at a time, and
    computes as if the keys were what the 8 bits stand for.

    !!! Example

        ```python
        import eqx_attention as eqa
        import jax.numpy as jnp

        pages = eqa.PagedCache.init(1024, num_kv_heads=2, head_dim=64, batch=(3,))
        cache = eqa.QuantizedCache(pages)
        cache = cache.append(jnp.ones((3, 5, 2, 64)), jnp.ones((3, 5, 2, 64)))
        out = cache.attend(jnp.ones((3, 1, 8, 64)))
        ```

    ??? cite

        [KVQuant](https://arxiv.org/abs/2401.18079)

        ```bibtex
        @inproceedings{hooper2024kvquant,
            author={Hooper, Coleman and Kim, Sehoon and Mohammadzadeh, Hiva and
                    Mahoney, Michael W. and Shao, Yakun Sophia and Keutzer, Kurt and
                    Gholami, Amir},
            title={{KVQ}uant: Towards 10 Million Context Length {LLM} Inference with {KV}
                   Cache Quantization},
            booktitle={Advances in Neural Information Processing Systems},
            year={2024},
        }
        ```
    """

    cache: AbstractCache
    stored: Any = eqx.field(static=True)

    @jaxtyped(typechecker=beartype)
    def __init__(self, cache: AbstractCache, stored: DTypeLike = jnp.int8):
        """**Arguments:**

        - `cache`: The cache whose slots are used, empty or not: the keys and values that
            it holds are quantized. Its dtype is that of the tokens to come.
        - `stored`: The dtype of what is stored, `jnp.int8` or `jnp.float8_e4m3fn`.
            Defaults to int8.

        **Raises:** a `TypeError` if `stored` is another dtype, or if `cache` is quantized
            to another.
        """
        check_stored_dtype("QuantizedCache: stored", stored)
        self.stored = jnp.dtype(stored)

        def quantized(x):
            return x if isinstance(x, Quantized) else quantize(x, stored)

        where = lambda c: (c.key_, c.value)  # noqa: E731
        self.cache = eqx.tree_at(where, cache, tuple(map(quantized, where(cache))))

    def __check_init__(self):
        for name in ("key_", "value"):
            x = getattr(self.cache, name)
            if not isinstance(x, Quantized) or x.stored != self.stored:
                got = x.stored if isinstance(x, Quantized) else x.dtype
                raise TypeError(
                    f"QuantizedCache: cache must store {name} as {self.stored}; got {got}."
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
        stored: DTypeLike = jnp.int8,
        batch: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
    ) -> "QuantizedCache":
        """Makes an empty cache, in the slots of an [`eqx_attention.StaticCache`][].

        **Arguments:** as [`eqx_attention.AbstractCache.init`][], and:

        - `stored`: as for the constructor. (Keyword only argument.)
        """
        sizes = (capacity, num_kv_heads, head_dim, value_dim)
        return cls(StaticCache.init(*sizes, batch=batch, dtype=dtype), stored)

    @property
    def key_(self) -> Quantized:
        return self.cache.key_

    @property
    def value(self) -> Quantized:
        return self.cache.value

    @property
    def length(self) -> Int32[Array, "*batch"]:
        return self.cache.length

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    @property
    def recent(self) -> int | None:
        return self.cache.recent

    @jax.named_scope("eqa.QuantizedCache.append")
    @jaxtyped(typechecker=beartype)
    def append(
        self,
        key_: Float[Keys, "*batch n kv_heads head_dim"],
        value: Float[Keys, "*batch n kv_heads value_dim"],
        *,
        lengths: Int[Array, "*#batch"] | None = None,
    ) -> "QuantizedCache":
        for name, x, buffer in (("key_", key_, self.key_), ("value", value, self.value)):
            if x.dtype != buffer.dtype:
                raise TypeError(
                    f"QuantizedCache.append: {name} must have the cache's dtype "
                    f"{buffer.dtype}; got {x.dtype}."
                )
        key_, value = (
            x if isinstance(x, Quantized) else quantize(x, self.stored)
            for x in (key_, value)
        )
        cache = self.cache.append(key_, value, lengths=lengths)
        return QuantizedCache(cache, self.stored)

    def keys_values(
        self,
    ) -> tuple[Any, Any, Int[Array, "*batch slots"] | None, AbstractMask]:
        return self.cache.keys_values()
