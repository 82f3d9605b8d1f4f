"""Where the tokens of a call are: as its caller says, or as its cache knows."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from .._cache import AbstractCache


_QPositions = Literal["start", "end"] | Array


def positions(
    cache: AbstractCache | None,
    q_positions: _QPositions,
    kv_positions: Array | None,
    q_seq: int,
    kv_seq: int,
) -> tuple[_QPositions, Array | None]:
    """`(q_positions, kv_positions)` of the new tokens, as `attend` takes them."""
    if cache is None:
        return q_positions, kv_positions
    given = not isinstance(q_positions, str) or q_positions != "start"
    if given or kv_positions is not None:
        raise ValueError(
            "MultiheadAttention: q_positions and kv_positions must not be given with a "
            "cache: they count from its length."
        )
    if cache.length.shape != ():
        raise ValueError(
            "MultiheadAttention: cache must have no batch axes (use jax.vmap for "
            f"batches); got one of batch {cache.length.shape}."
        )
    dtype = cache.length.dtype
    q_positions = cache.length + jnp.arange(q_seq, dtype=dtype)
    return q_positions, cache.length + jnp.arange(kv_seq, dtype=dtype)
