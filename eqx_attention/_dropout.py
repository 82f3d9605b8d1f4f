"""Dropout whose bits are a function of (key, head, query index, key index) alone.

One 32-bit word a query token and one a key token, for each head, come from the key by
JAX's own hashing (`fold_in`); the bits of a pair are the two words, mixed by an integer
finaliser. So any mechanism draws the same bits for a pair, at any block size, and again
in the backward pass, from memory that is linear in the lengths.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from beartype import beartype as typechecker
from jaxtyping import Array, Bool, jaxtyped, PRNGKeyArray, UInt32

from ._axes import axes
from ._static import is_number


class Dropout(eqx.Module):
    """The words of both sides, in canonical form, and the rate."""

    q_words: UInt32[Array, "batch head query 1"] = axes("batch head query")
    kv_words: UInt32[Array, "batch head 1 key"] = axes("batch head key")
    rate: float = eqx.field(static=True)

    def keep(self) -> Bool[Array, "batch head query key"]:
        """Which pairs of a tile are kept, each with probability `1 - rate`."""
        threshold = min(round(self.rate * 2**32), 2**32 - 1)
        words = _first(self.q_words) ^ _first(self.kv_words)
        return _mixed(words) >= jnp.uint32(threshold)


def dropout(
    key: PRNGKeyArray,
    rate: float,
    batch: tuple[int, ...],
    num_heads: int,
    q_len: int,
    kv_len: int,
    first: tuple[Any, Any, Any, Any] = (0, 0, 0, 0),
) -> Dropout:
    """Batch element b has the bits of an unbatched call with the key `fold_in(key, b)`;
    with several batch axes, one `fold_in` for each axis. `first` says where a part of a
    larger call starts, along (the first axis of) the batch, heads, queries and keys."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    for n, size in enumerate(batch):
        key = _fold(key, size, first[0] if n == 0 else 0)
    keys = key.reshape(math.prod(batch))

    def words(side: int, length: int):
        sides = jax.vmap(jax.random.fold_in, (0, None))(keys, side)
        tokens = _fold(_fold(sides, num_heads, first[1]), length, first[2 + side])
        return jax.random.key_data(tokens)[..., 0]

    q_words, kv_words = words(0, q_len), words(1, kv_len)
    return Dropout(q_words[..., None], kv_words[..., None, :], rate)


@jaxtyped(typechecker=typechecker)
def dropout_mask(
    key: PRNGKeyArray,
    rate: float,
    batch_shape: tuple[int, ...],
    num_heads: int,
    q_len: int,
    kv_len: int,
) -> Bool[Array, "..."]:
    """Which attention weights dropout keeps: the bits that every mechanism uses.

    **Arguments:**

    - `key`: a PRNG key, as given to [`eqx_attention.attend`][].
    - `rate`: the probability of a weight to be dropped, in [0, 1).
    - `batch_shape`, `num_heads`, `q_len`, `kv_len`: the shape of the call.

    **Returns:**

    Booleans of shape `(*batch_shape, num_heads, q_len, kv_len)`. A weight that is kept is
    multiplied by `1 / (1 - rate)`.

    **Raises:** `ValueError` if `rate` is not in [0, 1), or a size is negative.
    """
    check_rate("dropout", rate)
    sizes = dict(batch_shape=min(batch_shape, default=0), num_heads=num_heads)
    for name, size in (sizes | dict(q_len=q_len, kv_len=kv_len)).items():
        if size < 0:
            raise ValueError(f"{name}: expected at least 0, got {size}.")
    bits = dropout(key, rate, batch_shape, num_heads, q_len, kv_len)
    return bits.keep().reshape(*batch_shape, num_heads, q_len, kv_len)


def check_rate(where: str, rate: Any) -> None:
    if not (is_number(rate) and 0 <= rate < 1):
        raise ValueError(f"{where}: expected a rate in [0, 1), got {rate}.")


def _fold(keys, size: int, first: Any = 0):
    """Adds one axis: `fold_in(key, i)` for each key and so many i, from `first` on."""
    index = jnp.asarray(first, jnp.uint32) + jnp.arange(size, dtype=jnp.uint32)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    for _ in range(keys.ndim):
        fold = jax.vmap(fold, (0, None))
    return fold(keys, index)


def _first(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The first step of the mixing: what it gives of two words' exclusive or is that of
    what it gives of each."""
    return x ^ (x >> 16)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The other steps: with the first, a bijection of 32-bit words in which each input bit
    flips half of the output bits.

    Two multiplications and three shifts; the constants are those found by Chris
    Wellons' search for hash functions of low bias
    (https://nullprogram.com/blog/2018/07/31/).
    """
    x = x * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
