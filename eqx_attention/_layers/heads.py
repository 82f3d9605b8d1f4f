"""What becomes of tokens before they attend: projected, split into heads, normalised."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._dtype import accumulation_dtype


_Heads = Float[Array, "seq heads channels"]


def project(
    linear: Callable[..., Array], x: Float[Array, "seq size"], num_heads: int
) -> _Heads:
    out = jax.vmap(linear)(x)
    return out.reshape(out.shape[0], num_heads, out.shape[1] // num_heads)


def rms_norm(size: int, dtype: Any) -> eqx.nn.RMSNorm:
    return eqx.nn.RMSNorm(size, eps=1e-6, use_bias=False, dtype=dtype)


def normalise(
    heads: _Heads, kind: Literal["rms", "l2"] | None, norm: eqx.nn.RMSNorm | None
) -> _Heads:
    """Normalises each head of each token; `norm` has the weights of `"rms"`."""
    if norm is not None:
        return jax.vmap(jax.vmap(norm))(heads)
    if kind == "l2":
        x = heads.astype(accumulation_dtype(heads.dtype))
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        # The constant is for heads of zeros: its square root is nothing beside a length.
        return (x * jax.lax.rsqrt(square + 1e-12)).astype(heads.dtype)
    return heads


def process(fn: Callable[..., Any], *heads: Array) -> tuple[Array, ...]:
    """Applies the user's `process_heads` to the query, key and value heads, of which there
    may be fewer of keys than of queries."""
    out = fn(*heads)
    for old, new in zip(heads, out, strict=True):
        if old.shape != new.shape:
            raise ValueError(
                "process_heads must not change the shape of the heads: expected "
                f"{old.shape}; got {new.shape}."
            )
    return out
