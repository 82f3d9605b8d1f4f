"""Kernels multiply weights of 0 with tokens that are not seen, which may hold NaN."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._mask import And, Causal, Full, SlidingWindow
from .._score import ALiBi, SoftCap
from .base import Request


def again_if_nan(
    forward: Callable[[Request], tuple[Array, Array]], request: Request
) -> tuple[Array, Array]:
    """`forward(request)`; once more, if its lse has a NaN, on values that have none.

    `forward` gives an lse of NaN also where it gives an output of NaN. Keys take the place
    of their values: those with a value that is not finite turn NaN, and so does what sees
    them.
    """
    out, lse = forward(request)
    if isinstance(request.pairs.mask, Full) and not request.pairs.score:
        return out, lse

    def again():
        bad = ~jnp.isfinite(request.value).all(-1, keepdims=True)
        nan = jnp.asarray(jnp.nan, request.key_.dtype)
        cleaned = dataclasses.replace(
            request,
            key_=jnp.where(bad, nan, request.key_),
            value=jnp.where(bad, 0, request.value),
        )
        return forward(cleaned)

    return lax.cond(jnp.isnan(lse).any(), again, lambda: (out, lse))


def without_nan(request: Request, lse: Array) -> Request:
    """For the gradient, which tells what is seen by lse: NaN where a key of NaN is."""
    if isinstance(request.pairs.mask, Full):
        return request
    key_, value = (jnp.where(jnp.isfinite(x), x, 0) for x in (request.key_, request.value))
    return dataclasses.replace(seen_queries(request, lse), key_=key_, value=value)


def may_hide(request: Request) -> bool:
    """Whether a score may give -inf: a row may then see nothing of what the mask shows."""
    return any(not isinstance(s, ALiBi | SoftCap) for s in request.pairs.score)


def seen_queries(request: Request, lse: Array) -> Request:
    """Queries that see nothing may hold NaN: they become zeros."""
    if never_empty(request):
        return request
    query = jnp.where(jnp.isneginf(lse)[..., None], 0, request.query)
    return dataclasses.replace(request, query=query)


def seen_rows(
    request: Request, out: Array, lse: Array, dout: Array, dlse: Array | None
) -> tuple[Array, Array, Array]:
    """What the gradient needs of each row, `(lse, dout, delta)`: as `rows_of`, and zeros
    where rows that see nothing may have gradients of NaN."""
    dout = dout.astype(lse.dtype)
    if not never_empty(request):
        dout = jnp.where(jnp.isneginf(lse)[..., None], 0, dout)
    low, delta = rows_of(out, lse, dout, dlse)
    return low, dout, delta


def rows_of(out: Array, lse: Array, dout: Array, dlse: Array | None) -> tuple[Array, Array]:
    """What is subtracted from the logits of each row, and from gradients of its weights:
    `(lse, delta)`. Rows that see nothing get the log-sum-exp +inf, so that all their
    weights are 0, and a delta of 0."""
    empty = jnp.isneginf(lse)
    delta = (dout.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    return jnp.where(empty, jnp.inf, lse), jnp.where(empty, 0, delta)


def never_empty(request: Request) -> bool:
    """Whether it is known at trace time that each query sees a key."""
    pairs, (q_len, kv_len) = request.pairs, request.lengths
    if may_hide(request):
        return False
    counted = pairs.q.counted and pairs.kv.counted
    if not counted or pairs.q.shift != pairs.kv.shift:
        return isinstance(pairs.mask, Full)
    parts = pairs.mask.masks if isinstance(pairs.mask, And) else (pairs.mask,)

    def sees_own(mask):
        match mask:
            case Causal(offset=int(offset)):
                return offset >= 0
            case SlidingWindow(left=None | int(), right=None | int()):
                return q_len <= kv_len
            case Full():
                return True
        return False

    return all(map(sees_own, parts))
