"""From some tokens of all heads to all tokens of some heads, over one mesh axis."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._mechanism import counted, num_splits, Pairs, Request, Split, traced
from .._tokens import Tokens
from .peers import to_heads


def repeats(request: Request, n: int) -> int:
    """How often each key head is repeated, so that each device has those that it reads."""
    heads = request.key_.shape[2]
    return math.lcm(heads, n) // heads


def repeat_heads(x: Array, count: int) -> Array:
    return x if count == 1 else jnp.repeat(x, count, axis=2)


def leaf_to_heads(x: Any, axis: str, n: int) -> Any:
    """Of a canonical array: all of the tokens that it has, and this device's heads."""
    if not hasattr(x, "ndim"):
        return x
    tokens = _tokens_axis(x)
    if x.shape[1] == 1:
        return x if tokens is None else lax.all_gather(x, axis, axis=tokens, tiled=True)
    if tokens is None:
        size = x.shape[1] // n
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, 1)
    return lax.all_to_all(x, axis, 1, tokens, tiled=True)


def exchanged(
    request: Request, axis: str, n: int, kernel: bool, rows: Sequence[Array] = ()
) -> tuple[Request, list[Array]]:
    """The request with all tokens of this axis, and this device's heads; and so `rows`,
    which are arrays of query tokens."""
    count = repeats(request, n)
    k, v = (repeat_heads(x, count) for x in (request.key_, request.value))
    q, k, v, *rows = to_heads((request.query, k, v, *rows), axis, n, kernel)
    pairs = jax.tree.map(lambda x: leaf_to_heads(x, axis, n), _unnumbered(request))
    head = pairs.head
    if head is None:
        head = counted(((axis, n),), q.shape[2], 1)
    return _request(request, (q, k, v), pairs, head, n, counted), rows


def of_exchanged(request: Request, n: int, look: Callable) -> Any:
    """What `look` says of what `exchanged` would give."""

    def moved(x, heads: int):
        batch, length, _, channels = x.shape
        return jnp.zeros((batch, length * n, heads // n, channels), x.dtype)

    def leaf(x):
        if not hasattr(x, "ndim"):
            return x
        shape = list(x.shape)
        shape[1] = max(shape[1] // n, 1)
        tokens = _tokens_axis(x)
        if tokens is not None:
            shape[tokens] *= n
        return jnp.zeros(shape, x.dtype)

    def numbers(axes, length: int, axis: int):
        shape = [1, 1, 1, 1]
        shape[axis] = length
        return None if num_splits(axes) == 1 else jnp.zeros(shape, jnp.int32)

    def fake(request: Request):
        heads = request.query.shape[2]
        kv_heads = request.key_.shape[2] * repeats(request, n)
        k, v = (moved(x, kv_heads) for x in (request.key_, request.value))
        qkv = [moved(request.query, heads), k, v]
        pairs = jax.tree.map(leaf, _unnumbered(request))
        head = jnp.zeros((1, heads // n, 1, 1), jnp.int32)
        return look(_request(request, qkv, pairs, head, n, numbers))

    return traced(fake, request)


def _unnumbered(request: Request) -> Pairs:
    """Without the indices of tokens, which are counted anew."""
    pairs = request.pairs
    q, kv = (dataclasses.replace(x, index=None) for x in (pairs.q, pairs.kv))
    return dataclasses.replace(pairs, q=q, kv=kv)


def _request(request: Request, qkv, pairs, head, n: int, numbers: Any) -> Request:
    """Tokens are in the order of devices, and so follow one another."""
    split = Split(request.split.query[:-1], request.split.key[:-1])
    q_len, kv_len = (length * n for length in request.lengths)
    q_index, kv_index = numbers(split.query, q_len, 2), numbers(split.key, kv_len, 3)
    pairs = dataclasses.replace(
        pairs,
        q=Tokens(pairs.q.position, q_len, pairs.q.shift, q_index),
        kv=Tokens(pairs.kv.position, kv_len, pairs.kv.shift, kv_index),
        head=head,
    )
    # Each copy of a key head has a part of its gradient: these are added in float32.
    result = request.result_dtype if repeats(request, n) == 1 else request.dtype
    query, key_, value = qkv
    return dataclasses.replace(
        request,
        query=query,
        key_=key_,
        value=value,
        pairs=pairs,
        split=split,
        result_dtype=result,
    )


def _tokens_axis(x: Any) -> int | None:
    """The axis of tokens of which an array has one device's: keys are those of all, in an
    array of both queries and keys."""
    if x.shape[2] > 1:
        return 2
    return 3 if x.shape[3] > 1 else None
