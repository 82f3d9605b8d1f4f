"""Keys and values in the form in which caches store them: pages, and small integers."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ._axes import slice_at


class AbstractKeys(eqx.Module):
    """Keys, or values, in the form in which they are stored, to be given to
    [`eqx_attention.attend`][] in the place of arrays.

    It has the `shape` and the `dtype` that the array would have, and gives parts of it. A
    mechanism either computes from such parts or refuses; none makes an array of the whole.
    Only derivatives do: those with respect to anything but what is stored. What is stored
    is not differentiable.
    """

    dtype: eqx.AbstractVar[Any]
    """The dtype of what `block` gives."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`(*batch, kv_len, kv_heads, channels)`."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @abstractmethod
    def block(
        self, starts: tuple[Any, Any, Any], sizes: tuple[int, int, int]
    ) -> Float[Array, "batch tokens heads channels"]:
        """A part of the array, where there is one batch axis.

        **Arguments:**

        - `starts`: the first batch element, token and head; each an integer or an array.
        - `sizes`: how many of each.
        """

    @abstractmethod
    def astype(self, dtype: Any) -> "AbstractKeys":
        """The same, stored as it is, with blocks in another dtype."""

    @abstractmethod
    def flat(self) -> "AbstractKeys":
        """The same, with one batch axis."""

    @abstractmethod
    def folded(self, axes: Any, size: int, fold: Callable) -> "AbstractKeys":
        """The same, with an axis that is mapped over made a part of the batch axis.

        **Arguments:**

        - `axes`: the axis that is mapped over, or `None`, for each array.
        - `size`: of that axis.
        - `fold`: does this to an array `(batch, ...)`, given its axis.
        """


class Quantized(AbstractKeys):
    """Keys or values in 8 bits: `values * scale`, with a scale for each token and head.

    ??? cite

        [LLM.int8(): 8-bit Matrix Multiplication for Transformers at
        Scale](https://arxiv.org/abs/2208.07339)

        ```bibtex
        @inproceedings{dettmers2022llmint8,
            title={{LLM}.int8(): 8-bit Matrix Multiplication for Transformers at Scale},
            author={Dettmers, Tim and Lewis, Mike and Belkada, Younes and
                    Zettlemoyer, Luke},
            booktitle={Advances in Neural Information Processing Systems},
            year={2022}
        }
        ```
    """

    values: Array
    """int8; or uint8, the bits of float8_e4m3fn, which not every operation knows."""
    scale: Array
    dtype: Any = eqx.field(static=True)

    def __init__(self, values: Array, scale: Array, dtype: DTypeLike = jnp.float32):
        """**Arguments:**

        - `values`: int8 or float8_e4m3fn, `"*batch kv_len kv_heads channels"`.
        - `scale`: floating-point numbers, `"*batch kv_len kv_heads"`.
        - `dtype`: of the keys that these stand for. Default float32.

        **Raises:** `TypeError` if the dtypes or the shapes are not these.
        """
        if values.dtype == _FP8:
            values = lax.bitcast_convert_type(values, jnp.uint8)
        self.values = values
        self.scale = scale
        self.dtype = jnp.dtype(dtype)

    def __check_init__(self):
        if self.values.dtype != jnp.uint8:
            check_stored_dtype("Quantized(values)", self.values.dtype)
        if self.values.ndim < 3:
            raise TypeError(
                "Quantized(values): expected the shape (*batch, kv_len, kv_heads, "
                f"channels), got {self.values.shape}."
            )
        expected = self.values.shape[:-1]
        floats = jnp.issubdtype(self.scale.dtype, jnp.floating)
        if self.scale.shape != expected or not floats:
            raise TypeError(
                "Quantized(scale): expected floating-point numbers of the shape "
                f"{expected}, one for each token and head, got {self.scale.dtype} of "
                f"{self.scale.shape}."
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise TypeError(
                f"Quantized(dtype): expected a floating-point dtype, got {self.dtype}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def stored(self) -> Any:
        """The dtype of what is stored: int8 or float8_e4m3fn."""
        return _FP8 if self.values.dtype == jnp.uint8 else self.values.dtype

    def block(
        self, starts: tuple[Any, Any, Any], sizes: tuple[int, int, int]
    ) -> Float[Array, "batch tokens heads channels"]:
        return dequantized(jax.tree.map(lambda x: _part(x, starts, sizes), self))

    def astype(self, dtype: Any) -> "Quantized":
        return Quantized(self.values, self.scale, dtype)

    def flat(self) -> "Quantized":
        batch = math.prod(self.values.shape[:-3])
        rest = self.values.ndim - 3
        return jax.tree.map(lambda x: x.reshape(batch, *x.shape[rest:]), self)

    def folded(self, axes: Any, size: int, fold: Callable) -> "Quantized":
        return jax.tree.map(fold, self, axes)


class Paged(AbstractKeys):
    """Keys or values in pages, which sequences may share.

    The `t`-th token of a sequence is the `t % page_size`-th of the page
    `table[t // page_size]`.

    ??? cite

        [Efficient Memory Management for Large Language Model Serving with
        PagedAttention](https://arxiv.org/abs/2309.06180)

        ```bibtex
        @inproceedings{kwon2023pagedattention,
            title={Efficient Memory Management for Large Language Model Serving with
                   {PagedAttention}},
            author={Kwon, Woosuk and Li, Zhuohan and Zhuang, Siyuan and Sheng, Ying and
                    Zheng, Lianmin and Yu, Cody Hao and Gonzalez, Joseph E. and
                    Zhang, Hao and Stoica, Ion},
            booktitle={ACM Symposium on Operating Systems Principles},
            year={2023}
        }
        ```
    """

    pool: Array | Quantized
    table: Int[Array, "*batch blocks"]
    dtype: Any = eqx.field(static=True)

    def __init__(
        self,
        pool: Array | Quantized,
        table: Int[Array, "*batch blocks"],
        dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `pool`: `"pages page_size kv_heads channels"`, floating-point numbers or an
            [`eqx_attention.Quantized`][].
        - `table`: the page of each run of `page_size` tokens, by number. Numbers that are
            no page's mean that there is none: no mask may make its tokens visible.
        - `dtype`: of the keys that these stand for. Default: that of `pool`.

        **Raises:** `TypeError` if the dtypes or the shapes are not these.
        """
        self.pool = pool
        self.table = table
        self.dtype = jnp.dtype(pool.dtype if dtype is None else dtype)

    def __check_init__(self):
        pool, table = self.pool, self.table
        if pool.ndim != 4 or not jnp.issubdtype(pool.dtype, jnp.floating):
            raise TypeError(
                "Paged(pool): expected floating-point numbers of the shape (pages, "
                f"page_size, kv_heads, channels), got {pool.dtype} of {pool.shape}."
            )
        if table.ndim < 1 or not jnp.issubdtype(table.dtype, jnp.integer):
            raise TypeError(
                "Paged(table): expected integers of the shape (*batch, blocks), got "
                f"{table.dtype} of {table.shape}."
            )

    @property
    def page_size(self) -> int:
        return self.pool.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, blocks = self.table.shape
        return (*batch, blocks * self.page_size, *self.pool.shape[2:])

    def block(
        self, starts: tuple[Any, Any, Any], sizes: tuple[int, int, int]
    ) -> Float[Array, "batch tokens heads channels"]:
        batch, tokens, heads = sizes
        table = slice_at(self.table, (starts[0], 0), (batch, self.table.shape[1]))
        index = jnp.asarray(starts[1], jnp.int32) + jnp.arange(tokens, dtype=jnp.int32)
        page = jnp.take(table, index // self.page_size, axis=1, mode="clip")
        offset = jnp.broadcast_to(index % self.page_size, page.shape)
        head = jnp.broadcast_to(jnp.asarray(starts[2], jnp.int32), page.shape)
        at = jnp.stack([page.astype(jnp.int32), offset, head], axis=-1)

        def gather(x):
            window = (1, 1, heads, *x.shape[3:])
            dims = lax.GatherDimensionNumbers(
                offset_dims=tuple(range(2, x.ndim)),
                collapsed_slice_dims=(0, 1),
                start_index_map=(0, 1, 2),
            )
            return lax.gather(x, at, dims, window, mode=lax.GatherScatterMode.CLIP)

        part = jax.tree.map(gather, self.pool)
        return dequantized(part).astype(self.dtype)

    def astype(self, dtype: Any) -> "Paged":
        return Paged(self.pool, self.table, dtype)

    def flat(self) -> "Paged":
        *batch, blocks = self.table.shape
        table = self.table.reshape(math.prod(batch), blocks)
        return Paged(self.pool, table, self.dtype)

    def folded(self, axes: Any, size: int, fold: Callable) -> "Paged":
        """Pools that are mapped over become one, of all their pages."""
        table, pages = fold(self.table, axes.table), self.pool.shape[0]
        leaves, treedef = jax.tree.flatten(self.pool)
        at = treedef.flatten_up_to(axes.pool)
        if all(a is None for a in at):
            return Paged(self.pool, table, self.dtype)

        def joined(x, a):
            shape = x.shape if a is None else jnp.moveaxis(x, a, 0).shape[1:]
            x = x[None] if a is None else jnp.moveaxis(x, a, 0)
            x = jnp.broadcast_to(x, (size, *shape))
            return x.reshape(size * shape[0], *shape[1:])

        leaves = [joined(x, a) for x, a in zip(leaves, at, strict=True)]
        pages = leaves[0].shape[0] // size
        first = jnp.arange(size, dtype=table.dtype) * pages
        first = jnp.repeat(first, table.shape[0] // size)[:, None]
        table = jnp.where(table < 0, table, table + first)
        return Paged(jax.tree.unflatten(treedef, leaves), table, self.dtype)


# What arrays may be instead; free to a type checker, as most code has one or the other.
if TYPE_CHECKING:
    Keys = Any
    EightBits = Any
else:
    Keys = Array | AbstractKeys
    EightBits = Quantized


def is_stored(*keys: Any) -> bool:
    return any(isinstance(x, AbstractKeys) for x in keys)


def flat(x: Keys) -> Keys:
    """With one batch axis."""
    if is_stored(x):
        return x.flat()
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def key_block(x: Keys, starts: tuple[Any, Any, Any], sizes: tuple[int, int, int]) -> Array:
    """Some (batch elements, tokens, heads) of an array or of what is stored."""
    if is_stored(x):
        return x.block(starts, sizes)
    return _part(x, starts, sizes)


def _part(x: Array, starts: tuple[Any, Any, Any], sizes: tuple[int, int, int]) -> Array:
    rest = x.shape[3:]
    if sizes == x.shape[:3]:
        return x
    return slice_at(x, (*starts, *(0 for _ in rest)), (*sizes, *rest))


def dense(x: Keys) -> Array:
    """The whole array."""
    return x.block((0, 0, 0), x.shape[:3]) if is_stored(x) else x


def dequantized(x: Array | Quantized) -> Array:
    if not isinstance(x, Quantized):
        return x
    values = x.values
    if x.stored == _FP8:
        values = lax.bitcast_convert_type(values, _FP8)
    return (values.astype(x.scale.dtype) * x.scale[..., None]).astype(x.dtype)


def check_stored_dtype(where: str, dtype: Any) -> None:
    if jnp.dtype(dtype) not in _LARGEST:
        expected = " or ".join(x.name for x in _LARGEST)
        raise TypeError(f"{where}: expected {expected}, got {jnp.dtype(dtype)}.")


def quantize(x: Float[Array, "... channels"], stored: DTypeLike) -> Quantized:
    """The nearest that 8 bits can say, each token and head by a scale of its own.

    Each number differs by at most `max(abs(x)) / 254` of its token and head in int8, and
    by at most 1/16 of itself in float8_e4m3fn (if it is not tiny).
    """
    largest = _LARGEST[jnp.dtype(stored)]
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=-1, initial=0) / largest
    scaled = wide / jnp.where(scale == 0, 1, scale)[..., None]
    if jnp.issubdtype(stored, jnp.integer):
        scaled = jnp.clip(jnp.round(scaled), -largest, largest)
    return Quantized(scaled.astype(stored), scale, x.dtype)


_FP8 = jnp.dtype(jnp.float8_e4m3fn)
_LARGEST = {jnp.dtype(jnp.int8): 127.0, _FP8: 448.0}
