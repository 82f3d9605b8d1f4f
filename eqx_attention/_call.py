"""From the options of a call to its result."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ._distributed import attention_over, of_device
from ._mechanism import AbstractMechanism, attention, Request, traced, Vanilla
from ._options import (
    as_dropout,
    as_mask,
    as_precision,
    as_scale,
    as_scores,
    check_operands,
    check_positions,
    platform_of,
)
from ._partial import with_sinks
from ._request import Call, check_supported, request_of


def call_of(
    query,
    key_,
    value,
    *,
    mask,
    score,
    sinks,
    scale,
    q_positions,
    kv_positions,
    precision,
    dropout=0.0,
    key=None,
    inference=False,
    dtype=None,
    shards=None,
) -> Call:
    check_operands(query, key_, value)
    check_positions(q_positions, "q_positions", ("start", "end"))
    check_positions(kv_positions, "kv_positions", (None,))
    dropout = as_dropout(dropout)
    dropped = dropout > 0 and not inference
    if dropped and key is None:
        raise ValueError(
            f"key: expected a PRNG key, as dropout={dropout} and inference is False; got "
            "None."
        )
    return Call(
        query,
        key_,
        value,
        as_mask(mask),
        as_scores(score),
        sinks,
        as_scale(scale),
        key if dropped else None,
        q_positions if isinstance(q_positions, str) else jnp.asarray(q_positions),
        None if kv_positions is None else jnp.asarray(kv_positions),
        dropout if dropped else 0.0,
        as_precision(precision),
        dtype,
        platform_of(shards, query, key_, value),
        shards,
    )


# Compiled once for each set of shapes and static options, also where a user does not.
@eqx.filter_jit
def run(mechanism: AbstractMechanism, call: Call) -> tuple[Array, Array]:
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    request = request_of(call)
    if is_empty(call):
        if call.shards is None:
            check_supported(mechanism, request)
        out = jnp.zeros(shape, request.dtype)
        lse = jnp.full(shape[:-1], -jnp.inf, request.dtype)
        out, lse = with_sinks(out, lse, call.sinks)
        return out.astype(call.query.dtype), lse
    if call.shards is None:
        check_supported(mechanism, request)
        out, lse = attention(mechanism, request)
        out, lse = with_sinks(out, lse, call.sinks)
    else:
        check = ft.partial(check_supported, mechanism)
        of_device(request, call.shards, check)
        out, lse = attention_over(mechanism, request, call.sinks, call.shards)
    return out.reshape(shape).astype(call.query.dtype), lse.reshape(shape[:-1])


def of_request(call: Call, look: Callable[[Request], Any]) -> Any:
    """What `look` says of what a mechanism would be asked for, on each device."""

    def inside(call: Call):
        request = request_of(call)
        if call.shards is None or is_empty(call):
            return look(request)
        return of_device(request, call.shards, look)

    return traced(inside, call)


def is_empty(call: Call) -> bool:
    """Whether there is nothing to attend with, or nothing to attend to."""
    return 0 in (*call.query.shape[:-1], call.key_.shape[-3])


@eqx.filter_jit
def weights(call: Call) -> Array:
    request = request_of(call)
    if is_empty(call):
        batch, heads = call.query.shape[:-3], call.query.shape[-2]
        return jnp.zeros((*batch, heads, *request.lengths), request.dtype)
    found = Vanilla().weights(request)
    if call.sinks is not None:
        _, lse = Vanilla().forward(request)
        _, total = with_sinks(jnp.zeros((*lse.shape, 1), lse.dtype), lse, call.sinks)
        found = found * jnp.exp(lse - total).swapaxes(1, 2)[..., None]
    batch = call.query.shape[:-3]
    return found.reshape(*batch, *found.shape[1:])
