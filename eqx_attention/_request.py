"""From a call, as users make it, to a request, as mechanisms read it."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._axes import axes, canonical, Sizes
from ._dropout import dropout
from ._dtype import accumulation_dtype
from ._errors import UnsupportedError
from ._keys import flat, Keys
from ._mask import AbstractMask
from ._mechanism import AbstractMechanism, Pairs, Request
from ._options import MECHANISMS
from ._partial import merge
from ._score import AbstractScore
from ._static import Static
from ._tokens import query_positions, Tokens


class Call(eqx.Module):
    """A call whose options have been checked one by one."""

    query: Array
    key_: Keys
    value: Keys
    mask: AbstractMask
    score: tuple[AbstractScore, ...]
    sinks: Array | None
    scale: Static | Array | None
    key: PRNGKeyArray | None
    q_positions: str | Array
    kv_positions: Array | None
    dropout: float = eqx.field(static=True)
    precision: str | None = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    platform: str = eqx.field(static=True)

    def sizes(self) -> Sizes:
        *batch, q_len, q_heads, _ = self.query.shape
        return Sizes(tuple(batch), q_heads, q_len, self.key_.shape[-3])


class _Positions(eqx.Module):
    """Positions on their way to canonical form."""

    q_positions: Array | None = axes("batch query")
    kv_positions: Array | None = axes("batch key")


class _Scale(eqx.Module):
    scale: Array = axes("#head")


def request_of(call: Call) -> Request:
    """**Raises:** `TypeError` if a mask or a score does not fit the shapes of the call."""
    sizes = call.sizes()
    query, key_, value = (flat(x) for x in (call.query, call.key_, call.value))
    if call.dtype is not None:
        query, key_, value = (x.astype(call.dtype) for x in (query, key_, value))
    scale = call.scale
    if scale is None:
        scale = Static(max(query.shape[-1], 1) ** -0.5)
    elif isinstance(scale, Array):
        scale = canonical(_Scale(scale), sizes, "").scale
    drop = None
    if call.key is not None:
        shape = (sizes.batch, sizes.head, sizes.query, sizes.key)
        drop = dropout(call.key, call.dropout, *shape)
    q, kv = _tokens(call, sizes)
    pairs = Pairs(
        canonical(call.mask, sizes, "mask"),
        canonical(call.score, sizes, "score"),
        scale,
        drop,
        q,
        kv,
        None,
    )
    # The gradient starts from the output, and is the better the less that was rounded. Only
    # kernels, which write each result once, do so in the dtype of the query; not where a
    # sink changes the output once more.
    result = call.query.dtype
    if call.platform != "gpu" or call.sinks is not None:
        result = accumulation_dtype(result)
    return Request(query, key_, value, pairs, call.precision, call.platform, result)


def _tokens(call: Call, sizes: Sizes) -> tuple[Tokens, Tokens]:
    kv_positions = call.kv_positions
    q_positions, shift = query_positions(
        call.q_positions, kv_positions, sizes.query, sizes.key
    )
    if kv_positions is not None:
        kv_positions = kv_positions.astype(jnp.int32)
    positions = _Positions(q_positions, kv_positions)
    positions = canonical(positions, sizes, "")
    return (
        Tokens(positions.q_positions, sizes.query, shift),
        Tokens(positions.kv_positions, sizes.key, 0),
    )


def check_supported(mechanism: AbstractMechanism, request: Request) -> None:
    reasons = mechanism.unsupported(request)
    if reasons:
        able = [n for n, m in MECHANISMS.items() if not m().unsupported(request)]
        raise UnsupportedError(
            f"{type(mechanism).__name__} does not support this call: "
            f"{'; '.join(reasons)}. Mechanisms that do: {', '.join(able) or 'none'}."
        )


def with_sinks(
    out: Float[Array, "..."], lse: Float[Array, "..."], sinks: Array | None
) -> tuple[Array, Array]:
    """Sinks join once, at the end, as the partial (0, sink)."""
    if sinks is None:
        return out, lse
    sinks = jnp.broadcast_to(sinks.astype(lse.dtype), lse.shape)
    return merge([(out, lse), (jnp.zeros_like(out), sinks)])
