"""What becomes of tokens in multi-head latent attention: queries and latents, and what
attends to what in each of its two forms.

Latents are of shape `(seq, 1, kv_rank + rope_size)`: one head, which holds the latent
vector and then the part of the keys that is rotated.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._errors import UnsupportedError
from .checks import check_linear
from .heads import project


_Query = Float[Array, "seq heads channels"]
_Value = Float[Array, "seq heads value_channels"]


def check_parts(module: Any) -> None:
    """That norms fit the ranks, and that there is no more to the layer than it uses."""
    name = type(module).__name__
    if module.q_rank is not None:
        check_linear(module, "query_down", module.query_size, module.q_rank)
    elif module.query_down is not None:
        got = module.query_down
        raise ValueError(f"{name}: query_down must be None if q_rank is; got {got}.")
    for norm, rank in (("query_norm", module.q_rank), ("latent_norm", module.kv_rank)):
        expected = None if rank is None else (rank,)
        got = getattr(module, norm)
        if getattr(got, "shape", None) != expected:
            raise ValueError(f"{name}: {norm} must have the shape {expected}; got {got}.")
    for up in ("key_up", "value_up"):
        if getattr(module, up).bias is not None:
            raise ValueError(f"{name}: {up} must have no bias.")


def check_cache(module: Any, cache: Any) -> None:
    if cache is None:
        return
    key_, value, _, _ = eqx.filter_eval_shape(cache.keys_values)
    got = (key_.shape[-2], key_.shape[-1], value.shape[-1])
    if got != module.cache_sizes:
        raise TypeError(
            f"{type(module).__name__}: cache must have (num_kv_heads, head_dim, value_dim) "
            f"of {module.cache_sizes}, which are its `cache_sizes`; got {got}."
        )


def query_heads(
    module: Any, x: Float[Array, "seq size"], positions: Int[Array, " seq"]
) -> _Query:
    if module.query_down is not None:
        x = jax.vmap(module.query_norm)(jax.vmap(module.query_down)(x))
    query = project(module.query_proj, x, module.num_heads)
    nope, rope = jnp.split(query, [module.nope_size], axis=-1)
    return jnp.concatenate([nope, module.rotary(rope, positions)], axis=-1)


def latent_heads(
    module: Any, x: Float[Array, "seq size"], positions: Int[Array, " seq"]
) -> tuple[Float[Array, "seq 1 latent"], Float[Array, "seq 1 0"]]:
    """What a cache keeps of tokens: the latents as keys, and no channel of a value."""
    latents = project(module.latent_proj, x, 1)
    latent, shared = jnp.split(latents, [module.kv_rank], axis=-1)
    latent = jax.vmap(jax.vmap(module.latent_norm))(latent)
    shared = module.rotary(shared, positions)
    latents = jnp.concatenate([latent, shared], axis=-1)
    return latents, latents[..., :0]


def uncompressed(
    module: Any, query: _Query, latents: Any
) -> tuple[
    _Query,
    Float[Array, "kv_seq heads channels"],
    Float[Array, "kv_seq heads value_channels"],
]:
    """`(query, key_, value)`, with a key and a value for each head."""
    if not isinstance(latents, jax.Array):
        raise UnsupportedError(
            f"{type(module).__name__}: absorbed=False computes keys and values from all "
            "that the cache holds, and so takes a cache of plain arrays, such as "
            f"StaticCache; got {type(latents).__name__}. absorbed=True takes any cache."
        )
    latent, shared = jnp.split(latents, [module.kv_rank], axis=-1)
    latent = latent[:, 0]
    key_ = project(module.key_up, latent, module.num_heads)
    shared = jnp.broadcast_to(shared, (*key_.shape[:-1], module.rope_size))
    value = project(module.value_up, latent, module.num_heads)
    return query, jnp.concatenate([key_, shared], axis=-1), value


def absorbed(
    module: Any, query: _Query, latents: Any
) -> tuple[Float[Array, "seq heads latent"], Any, Any]:
    """`(query, key_, value)`, with one key head, which is the value head too.

    The values are all channels of the latents, those of `rope_size` included: to leave
    them out of the output, as `from_latents` does, costs less than to copy the others.
    """
    nope, rope = jnp.split(query, [module.nope_size], axis=-1)
    nope = jnp.einsum("shn,hnr->shr", nope, _by_head(module, module.key_up.weight))
    return jnp.concatenate([nope, rope], axis=-1), latents, latents


def from_latents(module: Any, out: Float[Array, "seq heads latent"]) -> _Value:
    """The values that outputs of the absorbed form stand for."""
    value_up = _by_head(module, module.value_up.weight)
    return jnp.einsum("shr,hvr->shv", out[..., : module.kv_rank], value_up)


def _by_head(module: Any, weight: Float[Array, "out rank"]) -> Float[Array, "heads _ rank"]:
    return weight.reshape(module.num_heads, -1, module.kv_rank)
