from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from beartype import beartype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, jaxtyped

from .._keys import EightBits, Keys
from .._mask import AbstractMask, Causal, Keys as KeyMask, Prefix, SlidingWindow
from .base import AbstractCache
from .checks import (
    check_buffers,
    check_int32,
    check_new,
    check_sizes,
    num_added,
)
from .write import along, write


class RollingCache(AbstractCache):
    """A cache of the last tokens of a sequence, and of its first: memory is bounded,
    whatever the length.

    A query sees the `window` tokens before its own, itself, and the `num_first` first
    tokens of the sequence (which keep attention stable beyond the window, as attention
    sinks): what a call without a cache sees by
    `Causal() & (SlidingWindow(window) | Prefix(num_first))`. The cache sees to that by
    itself, and never shows more; a mask of one's own narrows it further.

    The tokens of a chunk see their own windows, also where they push out the tokens that
    the first of them needs: there is room for `chunk` tokens beside the window. A prompt
    that is longer is appended in several chunks.

    !!! Example

        ```python
        import eqx_attention as eqa
        import jax.numpy as jnp

        cache = eqa.RollingCache.init(64, num_kv_heads=2, head_dim=8, num_first=4)
        for _ in range(100):
            cache = cache.append(jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)))
            out = cache.attend(jnp.ones((1, 4, 8)), mask=eqa.Causal())
        ```

    ??? cite

        [Mistral 7B](https://arxiv.org/abs/2310.06825) (the rolling buffer), [Efficient
        Streaming Language Models with Attention Sinks](https://arxiv.org/abs/2309.17453)
        (the first tokens).

        ```bibtex
        @inproceedings{xiao2024streaming,
            author={Xiao, Guangxuan and Tian, Yuandong and Chen, Beidi and Han, Song and
                    Lewis, Mike},
            title={Efficient Streaming Language Models with Attention Sinks},
            booktitle={International Conference on Learning Representations},
            year={2024},
        }
        ```
    """

    key_: Float[Array, "*batch slots kv_heads head_dim"] | EightBits
    value: Float[Array, "*batch slots kv_heads value_dim"] | EightBits
    length: Int32[Array, "*batch"]
    num_first: int = eqx.field(static=True)
    chunk: int = eqx.field(static=True)

    def __check_init__(self):
        check_buffers(self, "*batch, slots")
        check_int32(self, "length", tuple(self.key_.shape[:-3]))
        for name, x, least in (
            ("num_first", self.num_first, 0),
            ("chunk", self.chunk, 1),
            ("window", self.window, 0),
        ):
            if isinstance(x, bool) or not isinstance(x, int) or x < least:
                raise ValueError(
                    f"RollingCache: {name} must be an integer of at least {least}; got {x}."
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
        num_first: int = 0,
        chunk: int = 1,
        batch: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
    ) -> "RollingCache":
        """Makes an empty cache.

        **Arguments:**

        - `capacity`: The window: how many tokens before its own a query sees, beside
            the first ones. It is the `left` of a [`eqx_attention.SlidingWindow`][].
        - `num_kv_heads`: How many heads keys and values have.
        - `head_dim`: The number of channels of a key head.
        - `value_dim`: The number of channels of a value head. Defaults to `head_dim`.
        - `num_first`: How many of the first tokens are kept for ever. Defaults to none.
            (Keyword only argument.)
        - `chunk`: How many tokens may be appended at once. Memory is for `num_first +
            capacity + chunk` tokens. Defaults to one. (Keyword only argument.)
        - `batch`: The batch axes. Defaults to none. (Keyword only argument.)
        - `dtype`: The dtype of the keys and values. (Keyword only argument.)

        **Raises:** a `ValueError` if a size is not positive (`num_first` may be zero).
        """
        value_dim = head_dim if value_dim is None else value_dim
        check_sizes(
            "RollingCache",
            dtype,
            batch,
            capacity=capacity,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
        )
        shape = (*batch, max(num_first, 0) + capacity + max(chunk, 1), num_kv_heads)
        return cls(
            key_=jnp.zeros((*shape, head_dim), dtype),
            value=jnp.zeros((*shape, value_dim), dtype),
            length=jnp.zeros(batch, jnp.int32),
            num_first=num_first,
            chunk=chunk,
        )

    @property
    def window(self) -> int:
        """How many tokens a query sees before itself, beside the first ones."""
        return self.key_.shape[-3] - self.num_first - self.chunk

    @property
    def capacity(self) -> int:
        """The same: sequences may be of any length."""
        return self.window

    @property
    def recent(self) -> int:
        """The same as `chunk`."""
        return self.chunk

    @jax.named_scope("eqa.RollingCache.append")
    @jaxtyped(typechecker=beartype)
    def append(
        self,
        key_: Float[Keys, "*batch n kv_heads head_dim"],
        value: Float[Keys, "*batch n kv_heads value_dim"],
        *,
        lengths: Int[Array, "*#batch"] | None = None,
    ) -> "RollingCache":
        check_new(self, key_, value)
        n = key_.shape[-3]
        if n > self.chunk:
            raise ValueError(
                f"RollingCache.append: expected at most chunk={self.chunk} tokens at once, "
                f"got {n}: their queries would miss tokens that these push out. Append "
                "them in several chunks, or make the cache with a larger chunk."
            )
        start, added = num_added(self, n, lengths)
        index = along(start, n)
        slots = jnp.where(index < self.num_first, index, self._slot(index))
        if n == 1 and lengths is None:
            slots = slots[..., 0]
        return RollingCache(
            key_=write(self.key_, key_, slots, added),
            value=write(self.value, value, slots, added),
            length=start + added,
            num_first=self.num_first,
            chunk=self.chunk,
        )

    def _slot(self, index: Array) -> Array:
        """Of the tokens after the first ones."""
        return self.num_first + (index - self.num_first) % (self.window + self.chunk)

    def keys_values(self) -> tuple[Any, Any, Int32[Array, "*batch slots"], AbstractMask]:
        slots = along(jnp.zeros_like(self.length), self.key_.shape[-3])
        size = self.window + self.chunk
        length = self.length[..., None]
        # The latest token of each slot that is not one of the first ones.
        rounds = jnp.maximum(length - 1 - slots, 0) // size
        first = slots < self.num_first
        positions = jnp.where(first, slots, slots + rounds * size)
        mask = KeyMask(slots < length)
        near = SlidingWindow(self.window)
        if self.num_first > 0:
            near = Causal() & (near | Prefix(self.num_first))
        return self.key_, self.value, positions, mask & near
