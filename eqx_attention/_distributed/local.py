"""From a request of whole arrays to what one device holds of it, and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array

from .._axes import ceil_div
from .._mask import Padding
from .._mechanism import (
    AbstractMechanism,
    attention,
    counted,
    Request,
    Split,
    traced,
    varying_axes,
)
from .._partial import merge, with_sinks
from .._static import is_array
from .._tokens import Tokens
from .ring import check_layout, laid_out
from .sharding import Shards


_Result = tuple[Array, Array]


def attention_over(
    mechanism: AbstractMechanism, request: Request, sinks: Array | None, shards: Shards
) -> _Result:
    """`(out, lse)` of a request that is split over a mesh, with sinks.

    Of whole arrays, if `shards` is not `inside` a `jax.shard_map`: then it makes one.
    """

    def local(request: Request, sinks: Array | None) -> _Result:
        request = laid_out(mechanism, localised(request, shards))
        merged = shards.sharding.merged
        if merged:
            request = dataclasses.replace(request, result_dtype=request.dtype)
        out, lse = attention(mechanism, request)
        if merged:
            out, lse = merge_over(out, lse, merged)
        return with_sinks(out, lse, sinks)

    if shards.inside:
        return local(request, sinks)
    q_len = request.lengths[0]
    check_layout(mechanism, request.lengths, shards.size(shards.sharding.common))
    whole = padded(request, shards)
    axes = shards.sharding
    out_spec = P(_entry(axes.batch), _entry(axes.query_sequence), _entry(axes.heads))
    out, lse = _over_mesh(local, (out_spec, out_spec), shards, whole, sinks)
    if whole.lengths[0] == q_len:
        return out, lse
    # An axis of type Explicit cannot split a length that it does not divide.
    spec = P(_entry(axes.batch), None, _entry(axes.heads))
    out, lse = (_placed(x, spec, shards) for x in (out, lse))
    return out[:, :q_len], lse[:, :q_len]


def of_device(request: Request, shards: Shards, look: Callable) -> Any:
    """What `look` says of what one device would hold of a request.

    **Raises:** `ValueError` if a size does not divide.
    """
    if shards.inside:
        return traced(lambda request: look(localised(request, shards)), request)
    found = []

    def inside(request: Request, sinks: None):
        found.append(look(localised(request, shards)))
        return ()

    def over_mesh(request: Request):
        _over_mesh(inside, (), shards, padded(request, shards), None)
        return found[0]

    return traced(over_mesh, request)


def padded(request: Request, shards: Shards) -> Request:
    """Tokens of zeros, that nothing sees, so that the devices have equally many.

    **Raises:** `ValueError` if the batch or the heads do not divide.
    """
    _check_sizes(request, shards)
    axes = shards.sharding
    q_len, kv_len = request.lengths
    q_new = _padded_length(q_len, shards, axes.query_sequence)
    kv_new = _padded_length(kv_len, shards, axes.key_sequence)
    if (q_new, kv_new) == (q_len, kv_len):
        return request

    def leaf(x):
        if not is_array(x):
            return x
        widths = [(0, 0)] * x.ndim
        for axis, old, new in ((2, q_len, q_new), (3, kv_len, kv_new)):
            if x.shape[axis] > 1:
                widths[axis] = (0, new - old)
        # Like the last token, so that ranges of blocks stay as narrow as they are.
        return jnp.pad(x, widths, mode="edge")

    def tokens(x, new: int):
        return jnp.pad(x, ((0, 0), (0, new - x.shape[1]), (0, 0), (0, 0)))

    pairs = jax.tree.map(leaf, request.pairs)
    # Queries that are padding must not see what no other does, which may hold NaN.
    padding = Padding(kv_len) if q_new == q_len else Padding(kv_len, q_len)
    pairs = dataclasses.replace(pairs, mask=pairs.mask & padding)
    return dataclasses.replace(
        request,
        query=tokens(request.query, q_new),
        key_=tokens(request.key_, kv_new),
        value=tokens(request.value, kv_new),
        pairs=pairs,
    )


def localised(request: Request, shards: Shards) -> Request:
    """Inside of a `jax.shard_map`, of the arrays that one device holds: says which part of
    the whole they are.

    **Raises:** `ValueError` if a device has fewer tokens than can be told from none.
    """
    axes = shards.sharding
    if shards.size(axes.common) > 1 and min(request.lengths) < 2:
        raise ValueError(
            "query, key_: expected at least 2 tokens a device, of both, as "
            f"{axes.common} split both; got (q_len, kv_len) = {request.lengths}."
        )

    def tokens(old: Tokens, names: tuple[str, ...], length: int, axis: int) -> Tokens:
        index, position = counted(shards.sized(names), length, axis), old.position
        if position is not None and position.shape[axis] != length:
            # Of the one token that there was before it was padded.
            shape = (*position.shape[:axis], length, *position.shape[axis + 1 :])
            position = jnp.broadcast_to(position, shape)
        return Tokens(position, length, old.shift, index)

    pairs, (q_len, kv_len) = request.pairs, request.lengths
    pairs = dataclasses.replace(
        pairs,
        q=tokens(pairs.q, axes.query_sequence, q_len, 2),
        kv=tokens(pairs.kv, axes.key_sequence, kv_len, 3),
        head=counted(shards.sized(axes.heads), request.query.shape[2], 1),
    )
    split = Split(shards.sized(axes.query_sequence), shards.sized(axes.common))
    return dataclasses.replace(request, pairs=pairs, split=split)


def merge_over(out: Array, lse: Array, axes: tuple[str, ...]) -> _Result:
    """Merges what devices have of disjoint keys: one collective, of both in one array.

    Its derivatives are those of the merge, which are exact, by way of the devices' own
    log-sum-exps; the collective transposes to no other one.
    """
    packed = jnp.concatenate([out, lse[..., None]], axis=-1)
    # Each device then has the same, and its type says so; if types are not checked, the
    # transpose is the sum of what all devices have.
    to = "invarying" if varying_axes(packed) else "varying"
    parts = lax.all_gather(packed, axes, to=to)
    return merge([(part[..., :-1], part[..., -1]) for part in parts])


def _over_mesh(fn: Any, out_specs: Any, shards: Shards, request: Request, sinks: Any):
    """`fn(request, sinks)` of each device's part."""
    axes = shards.sharding
    batch, heads = _entry(axes.batch), _entry(axes.heads)
    query, key = _entry(axes.query_sequence), _entry(axes.key_sequence)

    def leaf(x):
        entries = [batch, heads, query, key]
        if axes.common and min(x.shape[2:4]) > 1:
            entries[3] = None
        entries = [e if n > 1 else None for e, n in zip(entries, x.shape)]
        return P(*entries)

    qkv = (request.query, request.key_, request.value)
    pairs, rest = eqx.partition(request.pairs, is_array)
    arrays = (qkv, pairs, sinks)
    specs = (
        (P(batch, query, heads), P(batch, key, heads), P(batch, key, heads)),
        jax.tree.map(leaf, pairs),
        None if sinks is None else P(heads),
    )

    def body(arrays):
        (query, key_, value), pairs, sinks = arrays
        parts = dict(query=query, key_=key_, value=value, pairs=eqx.combine(pairs, rest))
        return fn(dataclasses.replace(request, **parts), sinks)

    mesh, ambient = shards.mesh, jax.sharding.get_abstract_mesh()
    manual = set(ambient.manual_axes)
    arrays = jax.tree.map(lambda x, spec: _placed(x, spec, shards), arrays, specs)
    return jax.shard_map(
        body,
        mesh=None if manual else mesh,
        in_specs=(specs,),
        out_specs=out_specs,
        axis_names=set(mesh.axis_names) - manual,
    )(arrays)


def _placed(x: Array, spec: P, shards: Shards) -> Array:
    """Axes of type Explicit split an array only as its type says."""
    explicit = shards.explicit
    if not explicit:
        return x
    entries = [(e,) if isinstance(e, str) else e or () for e in spec]
    spec = P(*(_entry(tuple(n for n in e if n in explicit)) for e in entries))
    return jax.sharding.reshard(x, NamedSharding(shards.mesh, spec))


def _entry(names: tuple[str, ...]) -> tuple[str, ...] | None:
    return names or None


def _padded_length(length: int, shards: Shards, axes: tuple[str, ...]) -> int:
    n = shards.size(axes)
    each = ceil_div(length, n)
    # A device that has one token could not tell arrays of tokens from those of none.
    if n > 1 and axes == shards.sharding.common:
        each = max(each, 2)
    return n * each


def _check_sizes(request: Request, shards: Shards):
    batch, _, q_heads, _ = request.query.shape
    axes, kv_heads = shards.sharding, request.key_.shape[2]
    for name, size, split in (
        ("the product of the batch axes", batch, axes.batch),
        ("q_heads", q_heads, axes.heads),
        ("kv_heads", kv_heads, axes.heads),
    ):
        if size % shards.size(split):
            raise ValueError(
                f"sharding: expected {name} to be a multiple of {shards.size(split)}, the "
                f"number of devices along {split}; got {size}."
            )
