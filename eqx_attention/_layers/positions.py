"""Where the tokens of a call are, as its caller says or as its cache knows; and what of
them a cache keeps."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from .._cache import AbstractCache
from .._mask import AbstractMask


_QPositions = Literal["start", "end"] | Array


def positions(
    module: Any,
    cache: AbstractCache | None,
    q_positions: _QPositions,
    kv_positions: Array | None,
    q_seq: int,
    kv_seq: int,
) -> tuple[_QPositions, Array | None]:
    """`(q_positions, kv_positions)` of the new tokens, as `attend` takes them."""
    if cache is None:
        return q_positions, kv_positions
    name = type(module).__name__
    given = not isinstance(q_positions, str) or q_positions != "start"
    if given or kv_positions is not None:
        raise ValueError(
            f"{name}: positions must not be given with a cache: they count from its length."
        )
    if cache.length.shape != ():
        raise ValueError(
            f"{name}: cache must have no batch axes (use jax.vmap for batches); got one of "
            f"batch {cache.length.shape}."
        )
    dtype = cache.length.dtype
    q_positions = cache.length + jnp.arange(q_seq, dtype=dtype)
    return q_positions, cache.length + jnp.arange(kv_seq, dtype=dtype)


def appended(
    module: Any,
    cache: AbstractCache | None,
    key_: Array,
    value: Array,
    kv_positions: Array | None,
    lengths: Array | None,
) -> tuple[AbstractCache | None, Any, Any, Array | None, AbstractMask | None]:
    """What there is to attend to once the cache, if any, has the new tokens too:
    `(cache, key_, value, kv_positions, mask)`."""
    if cache is not None:
        cache = cache.append(key_, value, lengths=lengths)
        return cache, *cache.keys_values()
    if lengths is not None:
        raise ValueError(
            f"{type(module).__name__}: lengths are for a cache; got lengths and cache=None."
        )
    return None, key_, value, kv_positions, None
