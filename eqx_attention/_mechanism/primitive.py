"""Three primitives make any mechanism differentiable, and batched without `vmap`.

`forward` calls the mechanism. Its tangent is the primitive `tangent`, which is linear; the
transpose of that is the primitive `backward`, which calls the mechanism again. So reverse
mode runs the mechanism's own backward, forward mode the portable tangent, and derivatives
of either are those of the portable parts of `tangent.py`. All of them fold an axis that is
mapped over into the batch axis, so that a mechanism never sees `vmap`, which would turn
each tile that is skipped into one that is computed and thrown away.
"""

import dataclasses
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.extend.core
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array

from .._keys import dense, is_stored
from .base import AbstractMechanism, Gradients, Request
from .tangent import tangent, transpose
from .varying import vary, varying_axes


def attention(mechanism: AbstractMechanism, request: Request) -> tuple[Array, Array]:
    """`mechanism.forward(request)`, with all derivatives and batching."""
    request = vary(request, varying_axes(request))
    return eqxi.filter_primitive_bind(_forward_p, mechanism, request)


def _forward(mechanism: AbstractMechanism, request: Request):
    out, lse = mechanism.forward(request)
    return out.astype(request.result_dtype), lse


def _forward_shape(mechanism: AbstractMechanism, request: Request):
    batch, q_len, heads, _ = request.query.shape
    out = (batch, q_len, heads, request.value.shape[-1])
    return _like(request, out, request.result_dtype), _like(request, out[:-1])


def _like(request: Request, shape: tuple[int, ...], dtype: Any = None) -> ShapedArray:
    like: Any = request.query
    dtype = request.dtype if dtype is None else dtype
    if like.manual_axis_type.empty:
        return ShapedArray(shape, dtype)
    sharding = NamedSharding(like.sharding.mesh, P(*(None for _ in shape)))
    mat = {"manual_axis_type": like.manual_axis_type}
    return ShapedArray(shape, dtype, sharding=sharding, **mat)


def _forward_jvp(primals, tangents):
    mechanism, request = primals
    _, trequest = tangents
    out, lse = attention(mechanism, request)
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    names = ("query", "key_", "value")
    given = [_tangent_of(request, trequest, name) for name in names]
    tleaves = _leaf_tangents(request.pairs, trequest.pairs)
    if all(t is None for t in (*given, *tleaves.values())):
        return (out, lse), (None, None)
    key_, value = dense(request.key_), dense(request.value)
    request = dataclasses.replace(request, key_=key_, value=value)
    tqkv = tuple(
        _or_zeros(getattr(request, name), t) for name, t in zip(names, given, strict=True)
    )
    wrt = tuple(tleaves)
    arguments = (mechanism, request, out, lse, tqkv, tuple(tleaves.values()), wrt)
    return (out, lse), eqxi.filter_primitive_bind(_tangent_p, *arguments)


def _tangent_of(request: Request, trequest: Request, name: str):
    tangent = getattr(trequest, name)
    if not is_stored(getattr(request, name)):
        return tangent
    if jax.tree.leaves(tangent):
        kind = type(getattr(request, name)).__name__
        raise ValueError(
            f"{name}: expected an array, as there is a derivative with respect to it; got "
            f"{kind}, which is not differentiable. Use a cache that stores arrays, or "
            "`jax.lax.stop_gradient`."
        )
    return None


def _tangent_shape(mechanism, request, out, lse, tangents, tleaves, wrt):
    return _forward_shape(mechanism, request)


def _tangent_jvp(primals, tangents):
    out = eqxi.filter_primitive_bind(_tangent_p, *primals)
    return out, _portable_jvp(tangent, primals, tangents)


def _tangent_transpose(inputs, cotangents):
    mechanism, request, out, lse, tangents, tleaves, wrt = inputs
    linear = (*tangents, *tleaves)
    undefined = [isinstance(x, ad.UndefinedPrimal) for x in linear]
    keep = [n for n, u in enumerate(undefined[3:]) if u]
    dout, dlse = cotangents
    dout = _or_zeros(out, dout)
    arguments = (mechanism, request, out, lse, dout, dlse, tuple(wrt[n] for n in keep))
    dq, dk, dv, found = eqxi.filter_primitive_bind(_backward_p, *arguments)
    grads = dict(zip([0, 1, 2, *(3 + n for n in keep)], (dq, dk, dv, *found)))
    cts = [
        grads[n].astype(x.aval.dtype) if u else None
        for n, (x, u) in enumerate(zip(linear, undefined))
    ]
    nothing = jax.tree.map(lambda _: None, (mechanism, request, out, lse))
    return (*nothing, tuple(cts[:3]), tuple(cts[3:]), jax.tree.map(lambda _: None, wrt))


def _backward(mechanism, request, out, lse, dout, dlse, wrt) -> Gradients:
    grads = mechanism.backward(request, out, lse, dout, dlse, wrt)
    dq, dk, dv = (x.astype(request.result_dtype) for x in grads[:3])
    return dq, dk, dv, grads[3]


def _backward_shape(mechanism, request, out, lse, dout, dlse, wrt):
    leaves = jax.tree.leaves(request.pairs)
    inputs = (request.query, request.key_, request.value)
    dq, dk, dv = (_like(request, x.shape, request.result_dtype) for x in inputs)
    return dq, dk, dv, tuple(_like(request, leaves[n].shape) for n in wrt)


def _backward_jvp(primals, tangents):
    out = eqxi.filter_primitive_bind(_backward_p, *primals)
    return out, _portable_jvp(transpose, primals, tangents)


def _portable_jvp(fn, primals, tangents):
    """The tangent of a function of pytrees; tangents that are `None` are zero."""
    flat, treedef = jax.tree.flatten(primals)
    flat_t = treedef.flatten_up_to(tangents)
    moving = [n for n, t in enumerate(flat_t) if t is not None]

    def of_moving(xs):
        new = list(flat)
        for n, x in zip(moving, xs, strict=True):
            new[n] = x
        return fn(*jax.tree.unflatten(treedef, new))

    xs, ts = [flat[n] for n in moving], [flat_t[n] for n in moving]
    return jax.jvp(of_moving, (xs,), (ts,))[1]


def _leaf_tangents(pairs, tpairs) -> dict[int, Array]:
    """The tangents that are not zero, by the numbers of their leaves."""
    leaves, treedef = jax.tree.flatten(pairs)
    tangents = treedef.flatten_up_to(tpairs)
    return {
        n: t
        for n, (x, t) in enumerate(zip(leaves, tangents, strict=True))
        if t is not None and eqx.is_inexact_array(x)
    }


def _or_zeros(x, tangent):
    zeros = jnp.zeros(x.shape, x.dtype)
    return vary(zeros, varying_axes(x)) if tangent is None else tangent


def _folder(args: tuple, axes: tuple):
    """`(fold, unfold)` for an axis that is mapped over: into the batch axis and back."""
    flat, treedef = jax.tree.flatten(args)
    flat_axes = treedef.flatten_up_to(axes)
    size = next(x.shape[a] for x, a in zip(flat, flat_axes) if a is not None)
    batch = _unmapped_shape(args[1].query, axes[1].query)[0]

    def fold_array(x, axis, whole: bool = True):
        if not eqx.is_array(x):
            return x
        if axis is None and x.shape[0] == 1 and not whole:
            return x
        x = x[None] if axis is None else jnp.moveaxis(x, axis, 0)
        x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
        return x.reshape(size * batch, *x.shape[2:])

    def fold(x, axis, whole: bool = True):
        if is_stored(x):
            return x.folded(axis, size, fold_array)
        return fold_array(x, axis, whole)

    def unfold(x):
        return x.reshape(size, batch, *x.shape[1:])

    return fold, unfold


def _fold_request(fold, request: Request, axes: Request, whole=frozenset()) -> Request:
    """Leaves of `request.pairs` that are shared by the batch stay so, but for those whose
    numbers are in `whole`."""
    leaves, treedef = jax.tree.flatten(request.pairs)
    leaf_axes = treedef.flatten_up_to(axes.pairs)
    leaves = [fold(x, a, n in whole) for n, (x, a) in enumerate(zip(leaves, leaf_axes))]
    return Request(
        fold(request.query, axes.query),
        fold(request.key_, axes.key_),
        fold(request.value, axes.value),
        jax.tree.unflatten(treedef, leaves),
        request.precision,
        request.platform,
        request.result_dtype,
        request.split,
    )


def _unmapped_shape(x, axis) -> tuple[int, ...]:
    return x.shape if axis is None else x.shape[:axis] + x.shape[axis + 1 :]


def _forward_batch(args, axes):
    fold, unfold = _folder(args, axes)
    out, lse = attention(args[0], _fold_request(fold, args[1], axes[1]))
    return (unfold(out), unfold(lse)), (0, 0)


def _tangent_batch(args, axes):
    fold, unfold = _folder(args, axes)
    mechanism, request, out, lse, tangents, tleaves, wrt = args
    _, at, at_out, at_lse, at_tangents, at_tleaves, _ = axes
    leaves, treedef = jax.tree.flatten(request.pairs)
    leaf_axes = treedef.flatten_up_to(at.pairs)
    mapped = [leaf_axes[n] is not None or a is not None for n, a in zip(wrt, at_tleaves)]
    whole = frozenset(n for n, m in zip(wrt, mapped) if m)
    found = eqxi.filter_primitive_bind(
        _tangent_p,
        mechanism,
        _fold_request(fold, request, at, whole),
        fold(out, at_out),
        fold(lse, at_lse),
        tuple(fold(t, a) for t, a in zip(tangents, at_tangents)),
        tuple(fold(t, a, m) for t, a, m in zip(tleaves, at_tleaves, mapped)),
        wrt,
    )
    return tuple(map(unfold, found)), (0, 0)


def _backward_batch(args, axes):
    # Each element that is mapped over has a gradient of its own, also for a leaf that all
    # of them share.
    fold, unfold = _folder(args, axes)
    mechanism, request, *rows, wrt = args
    _, at, *at_rows, _ = axes
    dq, dk, dv, dleaves = eqxi.filter_primitive_bind(
        _backward_p,
        mechanism,
        _fold_request(fold, request, at, frozenset(wrt)),
        *(fold(x, a) for x, a in zip(rows, at_rows)),
        wrt,
    )
    leaves, treedef = jax.tree.flatten(request.pairs)
    leaf_axes = treedef.flatten_up_to(at.pairs)
    shared = [_unmapped_shape(leaves[n], leaf_axes[n])[0] == 1 for n in wrt]
    dleaves = tuple(
        unfold(d).sum(1, keepdims=True) if s else unfold(d) for d, s in zip(dleaves, shared)
    )
    out = (unfold(dq), unfold(dk), unfold(dv), dleaves)
    return out, jax.tree.map(lambda _: 0, out)


def _primitive(name: str, impl, shape, jvp, batch, transpose=None):
    primitive = jax.extend.core.Primitive(name)
    primitive.multiple_results = True
    run: Any = eqxi.filter_primitive_def(impl)
    primitive.def_impl(run)
    primitive.def_abstract_eval(eqxi.filter_primitive_def(shape))
    ad.primitive_jvps[primitive] = eqxi.filter_primitive_jvp(jvp)
    batching.primitive_batchers[primitive] = eqxi.filter_primitive_batching(batch)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    if transpose is not None:
        rule = eqxi.filter_primitive_transpose(transpose)
        ad.primitive_transposes[primitive] = rule
    return primitive


_forward_p = _primitive(
    "eqx_attention", _forward, _forward_shape, _forward_jvp, _forward_batch
)
_tangent_p = _primitive(
    "eqx_attention_tangent",
    tangent,
    _tangent_shape,
    _tangent_jvp,
    _tangent_batch,
    _tangent_transpose,
)
_backward_p = _primitive(
    "eqx_attention_backward", _backward, _backward_shape, _backward_jvp, _backward_batch
)
