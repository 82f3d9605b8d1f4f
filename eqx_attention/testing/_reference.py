"""Attention as it is defined: dense, naive, in float64.

Nothing here is shared with the mechanisms, their tiles, slices or backward passes: what a
mask or a score means is written down a second time, from its definition alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

import eqx_attention as eqa

from ._visible import Pairs, pairs_of, visible_at


# Compiling takes most of the time, and takes half as long with few optimisations.
FAST_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}


class Gradients(NamedTuple):
    """What [`eqx_attention.testing.reference_gradients`][] returns.

    **Fields:**

    - `out`: `"*batch q_len q_heads value_dim"`.
    - `lse`: `"*batch q_len q_heads"`.
    - `arguments`: a dictionary with the keys `query`, `key_`, `value`, `score` and, where
        they were given as arrays, `sinks` and `scale`. Each is the gradient of an
        argument, of its structure and shape; leaves that are not floating-point arrays
        are `None`.
    """

    out: np.ndarray
    lse: np.ndarray
    arguments: dict[str, Any]


def t5_bucket(
    relative: Int[Array, "*shape"],
    num_buckets: int,
    bidirectional: bool,
    max_distance: int,
) -> Int[Array, "*shape"]:
    """T5's bucket of a relative position `kv - q`, in exact integer arithmetic."""
    offset = jnp.zeros_like(relative)
    distance = jnp.maximum(-relative, 0)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative > 0, num_buckets, 0).astype(relative.dtype)
        distance = jnp.abs(relative)
    exact = num_buckets // 2
    rest = num_buckets - exact
    # floor(log(n / exact) / log(max_distance / exact) * rest) >= j, without logarithms.
    first = [
        next(
            n
            for n in range(exact, max_distance + 1)
            if n**rest * exact**j >= max_distance**j * exact**rest
        )
        for j in range(1, rest)
    ]
    large = jnp.full_like(distance, exact)
    for n in first:
        large = large + (distance >= n).astype(distance.dtype)
    return offset + jnp.where(distance < exact, distance, large)


def _apply(score: Any, logits: Array, at: Pairs) -> Array:
    relative = jnp.asarray(at.kv_pos - at.q_pos)
    ones = (1,) * len(at.batch)
    match score:
        case eqa.ALiBi():
            slopes = jnp.reshape(score.slopes, (*ones, -1, 1, 1))
            return logits - slopes * jnp.abs(relative).astype(logits.dtype)
        case eqa.SoftCap():
            return score.cap * jnp.tanh(logits / score.cap)
        case eqa.RelativeBias():
            bucket = t5_bucket(
                relative,
                score.table.shape[0],
                score.bidirectional,
                score.max_distance,
            )
            return logits + jnp.moveaxis(score.table[bucket[..., 0, :, :]], -1, -3)
        case eqa.Bias():
            return logits + at.pair(score.array)
        case eqa.ScoreFn():
            return score.fn(logits, *at.arguments(score))
        case _:
            raise TypeError(f"the reference does not know {type(score).__name__}.")


def _cast(tree: Any, dtype: Any) -> Any:
    def one(x):
        is_array = isinstance(x, np.ndarray | jax.Array)
        if not is_array or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        if isinstance(x, Tracer):
            return x.astype(dtype)
        return jnp.asarray(np.asarray(x).astype(dtype))  # compiles nothing

    return jax.tree.map(one, tree)


def dense_attention(
    arguments: dict[str, Any],
    *,
    at: Pairs,
    visible: Any,
    kept: Any,
    product: Any,
    statistics: Any,
) -> tuple[Array, Array]:
    """Attention with every weight in memory; products in one dtype, the rest in another."""
    query, key_, value = (arguments[n] for n in ("query", "key_", "value"))
    score, sinks, scale = (arguments.get(n) for n in ("score", "sinks", "scale"))
    q_heads, kv_heads = query.shape[-2], key_.shape[-2]
    ones = (1,) * len(at.batch)

    # Query head h reads head h // (q_heads // kv_heads).
    reads = np.arange(q_heads) // (q_heads // kv_heads)
    key_, value = key_[..., reads, :], value[..., reads, :]
    # Keys that nobody sees may hold NaN.
    seen = jnp.swapaxes(jnp.any(visible, axis=-2), -1, -2)[..., None]
    key_ = jnp.where(seen, key_, jnp.zeros_like(key_)).astype(product)
    value = jnp.where(seen, value, jnp.zeros_like(value)).astype(product)

    logits = jnp.einsum("...qhd,...khd->...hqk", query.astype(product), key_)
    logits = logits.astype(statistics)
    if scale is None:
        logits = logits * query.shape[-1] ** -0.5
    elif isinstance(scale, int | float):
        logits = logits * scale
    else:
        logits = logits * jnp.reshape(scale, (*ones, -1, 1, 1)).astype(statistics)
    for s in score if isinstance(score, tuple) else (score,):
        logits = _apply(_cast(s, statistics), logits, at)

    visible = jnp.logical_and(visible, logits > -jnp.inf)
    logits = jnp.where(visible, logits, jnp.zeros_like(logits))
    columns = jnp.where(visible, logits, -jnp.inf)
    if sinks is not None:
        sink = jnp.reshape(sinks, (*ones, q_heads, 1, 1)).astype(statistics)
        sink = jnp.broadcast_to(sink, (*columns.shape[:-1], 1))
        columns = jnp.concatenate([columns, sink], axis=-1)
    largest = jax.lax.stop_gradient(jnp.max(columns, axis=-1, keepdims=True))
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    weights = jnp.where(visible, jnp.exp(logits - largest), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - largest)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, largest + jnp.log(total))[..., 0]
    weights = weights / total * kept.astype(statistics)
    out = jnp.einsum("...hqk,...khd->...qhd", weights.astype(product), value)
    return out, jnp.moveaxis(lse, -2, -1)


_dropout_mask = eqx.filter_jit(  # pyright: ignore[reportCallIssue]
    eqa.dropout_mask, compiler_options=FAST_COMPILE
)


def prepare(
    query: Any,
    key_: Any,
    *,
    mask: Any = None,
    dropout: float = 0.0,
    key: Any = None,
    q_positions: Any = "start",
    kv_positions: Any = None,
) -> dict[str, Any]:
    """Everything that `dense_attention` is told and that has no gradient.

    `kept` is what dropout multiplies each weight by.
    """
    *batch, q_len, q_heads, _ = query.shape
    kv_len = key_.shape[-3]
    shape = (*batch, q_heads, q_len, kv_len)
    kept = np.ones(shape)
    if dropout > 0:
        sizes = (tuple(batch), q_heads, q_len, kv_len)
        with jax.ensure_compile_time_eval():
            kept = np.asarray(_dropout_mask(key, dropout, *sizes)) / (1 - dropout)
    at = pairs_of(batch, q_heads, q_len, kv_len, q_positions, kv_positions)
    visible = np.broadcast_to(visible_at(mask, at), shape)
    return dict(at=at, visible=visible, kept=kept)


def reference(
    query: Float[Array, "*batch q_len q_heads head_dim"],
    key_: Float[Array, "*batch kv_len kv_heads head_dim"],
    value: Float[Array, "*batch kv_len kv_heads value_dim"],
    *,
    mask: Any = None,
    score: Any = (),
    sinks: Float[Array, " q_heads"] | None = None,
    scale: Any = None,
    dropout: float = 0.0,
    key: Any = None,
    q_positions: Any = "start",
    kv_positions: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention by its definition, with every weight in memory and in float64.

    It is slow and plain on purpose, and is what every mechanism is measured against. It
    computes in double precision whether or not that is enabled. What it does with the
    floating-point arguments is traceable and differentiable (with `jax.grad`, if double
    precision is enabled around it; or by
    [`eqx_attention.testing.reference_gradients`][]). The mask's arrays, the positions
    and the key of dropout must be concrete.

    **Arguments:** as those of [`eqx_attention.attend`][], without those that say how to
    compute. `dropout` is by [`eqx_attention.dropout_mask`][].

    **Returns:** the output, `"*batch q_len q_heads value_dim"`; with `return_lse=True` a
    tuple of it and the logarithm of the sum of the exponentials of the logits,
    `"*batch q_len q_heads"`. Both are float64. A row that sees no key has output zero and
    an lse of minus infinity (with sinks: the sink).

    **Raises:** a `TypeError` for a mask or a score of a class that is not one of this
    library's.
    """
    options = prepare(
        query,
        key_,
        mask=mask,
        dropout=dropout,
        key=key,
        q_positions=q_positions,
        kv_positions=kv_positions,
    )
    arguments = dict(query=query, key_=key_, value=value, score=score)
    arguments |= dict(sinks=sinks, scale=scale)
    with jax.enable_x64(True):
        out, lse = dense_attention(
            _cast(arguments, jnp.float64),
            **options,
            product=jnp.float64,
            statistics=jnp.float64,
        )
    return (out, lse) if return_lse else out


def pull_back(
    fn: Callable[[dict[str, Any]], tuple[Array, Array | None]],
    arguments: dict[str, Any],
    dout: Array,
    dlse: Array | None,
) -> tuple[Array, Array | None, PyTree]:
    """Values of `fn` and the gradient of `sum(out * dout) + sum(lse * dlse)`.

    If `fn` returns no lse then `dlse` is ignored.
    """
    inexact, rest = eqx.partition(arguments, eqx.is_inexact_array)
    (out, lse), vjp = jax.vjp(lambda x: fn(eqx.combine(x, rest)), inexact)
    if lse is None:
        cotangent = None
    else:
        cotangent = jnp.zeros_like(lse) if dlse is None else dlse.astype(lse.dtype)
    (gradients,) = vjp((dout.astype(out.dtype), cotangent))
    return out, lse, gradients


def _dense_gradients(
    arguments: dict[str, Any],
    prepared: dict[str, Any],
    dout: Array,
    dlse: Array | None,
    product: Any,
    statistics: Any,
) -> tuple[Array, Array | None, PyTree]:
    """`dense_attention` and its gradients."""
    return pull_back(
        lambda x: dense_attention(x, **prepared, product=product, statistics=statistics),
        arguments,
        dout,
        dlse,
    )


# Cases that differ in their mask or positions alone share a program.
dense_gradients = eqx.filter_jit(  # pyright: ignore[reportCallIssue]
    _dense_gradients, compiler_options=FAST_COMPILE
)


def gradients_of(
    arguments: dict[str, Any], prepared: dict[str, Any], dout: Any, dlse: Any = None
) -> Gradients:
    """The gradients by all arguments, of what `prepare` returned, in float64."""
    with jax.enable_x64(True):
        zero = np.zeros(dout.shape[:-1])
        cotangents = _cast((dout, zero if dlse is None else dlse), jnp.float64)
        arguments = _cast(arguments, jnp.float64)
        dtypes = (jnp.float64, jnp.float64)
        result = dense_gradients(arguments, prepared, *cotangents, *dtypes)
        return Gradients(*jax.tree.map(np.asarray, result))


def reference_gradients(
    query: Float[Array, "*batch q_len q_heads head_dim"],
    key_: Float[Array, "*batch kv_len kv_heads head_dim"],
    value: Float[Array, "*batch kv_len kv_heads value_dim"],
    *,
    dout: Float[Array, "*batch q_len q_heads value_dim"],
    dlse: Float[Array, "*batch q_len q_heads"] | None = None,
    mask: Any = None,
    score: Any = (),
    sinks: Float[Array, " q_heads"] | None = None,
    scale: Any = None,
    dropout: float = 0.0,
    key: Any = None,
    q_positions: Any = "start",
    kv_positions: Any = None,
) -> Gradients:
    """[`eqx_attention.testing.reference`][] and its gradients, by JAX's own rules.

    **Arguments:** as those of [`eqx_attention.testing.reference`][], and

    - `dout`: the cotangent of the output.
    - `dlse`: the cotangent of the lse. Defaults to zero.

    **Returns:** a [`eqx_attention.testing.Gradients`][] of float64 arrays of NumPy: the
    values, and the gradients of `sum(out * dout) + sum(lse * dlse)` for the query, the
    keys, the values, the sinks, the scale if it is an array, and each floating-point
    array of the scores.

    **Raises:** as [`eqx_attention.testing.reference`][].
    """
    options = prepare(
        query,
        key_,
        mask=mask,
        dropout=dropout,
        key=key,
        q_positions=q_positions,
        kv_positions=kv_positions,
    )
    arguments = dict(query=query, key_=key_, value=value, score=score)
    arguments |= {n: x for n, x in dict(sinks=sinks, scale=scale).items() if x is not None}
    return gradients_of(arguments, options, dout, dlse)
