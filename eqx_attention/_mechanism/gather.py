"""Keys that are split over devices: all of them, on each device."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._tokens import Tokens
from .base import Pairs, Request


Pair = tuple[Array, Array]


def num_splits(axes: tuple[tuple[str, int], ...]) -> int:
    """Over how many devices the axes of a `Split` split tokens."""
    return math.prod(size for _, size in axes)


def counted(axes: tuple[tuple[str, int], ...], length: int, axis: int) -> Array | None:
    """Inside of a `jax.shard_map`, the numbers of so many heads (`axis` 1), queries (2) or
    keys (3) that one device has, if these axes split them; `None` if they count from 0."""
    if num_splits(axes) == 1:
        return None
    shape = [1, 1, 1, 1]
    shape[axis] = length
    first = lax.axis_index(tuple(name for name, _ in axes)) * length
    return (first + jnp.arange(length, dtype=jnp.int32)).reshape(shape)


def keys_are_split(request: Request) -> tuple[str, ...]:
    """Why a mechanism that computes on one device refuses a request, if it does."""
    if num_splits(request.split.key) == 1:
        return ()
    names = ", ".join(repr(name) for name, _ in request.split.key)
    return (f"keys are split over {names}, and it computes with those of one device",)


def gather_keys(
    request: Request, *more: Pair, in_order: bool = False
) -> tuple[Request, tuple[Pair, ...]]:
    """The request with the keys of all devices; and, likewise, pairs of arrays that are as
    `key_` and `value` are. It is linear in each. `in_order` says that the first device has
    the first keys, and so on."""
    axes = tuple(name for name, _ in request.split.key)
    if num_splits(request.split.key) == 1:
        return request, more
    gathered = [gather_pair(pair, axes) for pair in ((request.key_, request.value), *more)]
    if in_order:
        request = _counted_keys(request)
    pairs = jax.tree.map(lambda x: gather_leaf(x, axes), request.pairs)
    return _with_all_keys(request, gathered[0], pairs), tuple(gathered[1:])


def again(request: Request, dout: Array) -> Request:
    """The same keys and values, in the backward pass: XLA would keep what it moved in the
    forward pass until then, and not move it again."""
    kv = (request.key_, request.value)
    (key_, value), _ = lax.optimization_barrier((kv, dout))
    return dataclasses.replace(request, key_=key_, value=value)


def traced(look: Callable, *args: Any) -> Any:
    """What `look(*args)` says of shapes and types, without computing anything."""
    found = []

    def run(*args):
        found.append(look(*args))
        return ()

    eqx.filter_eval_shape(run, *args)
    return found[0]


def of_gathered(request: Request, look: Callable) -> Any:
    """What `look` says of what `gather_keys` would give, of keys in order."""
    n = num_splits(request.split.key)

    def wider(x, axis: int):
        shape = (*x.shape[:axis], x.shape[axis] * n, *x.shape[axis + 1 :])
        return jnp.zeros(shape, x.dtype)

    def gathered(request: Request):
        leaf = lambda x: wider(x, 3) if _has_keys(x) else x  # noqa: E731
        kv = wider(request.key_, 1), wider(request.value, 1)
        request = _counted_keys(request)
        whole = _with_all_keys(request, kv, jax.tree.map(leaf, request.pairs))
        return look(whole)

    return traced(gathered, request)


def _counted_keys(request: Request) -> Request:
    kv = dataclasses.replace(request.pairs.kv, index=None)
    return dataclasses.replace(request, pairs=dataclasses.replace(request.pairs, kv=kv))


def _with_all_keys(request: Request, kv: Pair, pairs: Pairs) -> Request:
    length = request.key_.shape[1] * num_splits(request.split.key)
    tokens = Tokens(pairs.kv.position, length, pairs.kv.shift, pairs.kv.index)
    return dataclasses.replace(
        request,
        key_=kv[0],
        value=kv[1],
        pairs=dataclasses.replace(pairs, kv=tokens),
        split=request.split._replace(key=()),
    )


def gather_pair(pair: Pair, axes: tuple[str, ...]) -> Pair:
    """Two arrays `"batch kv_len kv_heads channels"`, in one collective if they may be."""
    k, v = pair
    if k.dtype != v.dtype:
        return tuple(lax.all_gather(x, axes, axis=1, tiled=True) for x in pair)
    both = lax.all_gather(jnp.concatenate(pair, axis=-1), axes, axis=1, tiled=True)
    return both[..., : k.shape[-1]], both[..., k.shape[-1] :]


def gather_leaf(x: Any, axes: tuple[str, ...]) -> Any:
    """One canonical array, if it is of keys."""
    return lax.all_gather(x, axes, axis=3, tiled=True) if _has_keys(x) else x


def _has_keys(x: Any) -> bool:
    """Whether an array is of keys, and not one of both queries and keys: these have the
    keys of all devices already."""
    return hasattr(x, "ndim") and x.shape[3] > 1 and x.shape[2] == 1
