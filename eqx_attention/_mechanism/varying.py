"""Inside of a `jax.shard_map`, a type says over which mesh axes an array varies."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.extend.core
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec as P

from .._static import is_array


_T = TypeVar("_T")


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which any array of a tree varies. None outside a `shard_map`."""
    arrays = [x for x in jax.tree.leaves(tree) if is_array(x)]
    types = [jax.typeof(x).manual_axis_type for x in arrays]
    return frozenset().union(*(t.varying for t in types))


def vary(tree: _T, axes: frozenset[str]) -> _T:
    """The same values, as arrays that vary over these mesh axes; the transpose is a sum
    over them. Mixing types is an error where loops carry what they compute."""

    def leaf(x):
        missing = axes - varying_axes(x) if is_array(x) else ()
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(leaf, tree) if axes else tree


def like(x: Any, shape: tuple[int, ...], dtype: Any) -> ShapedArray:
    """The type of an array that varies over the mesh axes over which `x` does."""
    if x.manual_axis_type.empty:
        return ShapedArray(shape, dtype)
    sharding = NamedSharding(x.sharding.mesh, P(*(None for _ in shape)))
    mat = {"manual_axis_type": x.manual_axis_type}
    return ShapedArray(shape, dtype, sharding=sharding, **mat)


def untyped(fn: Callable, *args: Any) -> Any:
    """`fn(*args)`, which knows nothing of such types: kernels, for instance, whose loops
    carry what they compute. It must not communicate, and is not to be differentiated.

    What it gives varies over all axes over which any argument does.
    """
    axes = varying_axes(args)
    if not axes:
        return fn(*args)
    return eqxi.filter_primitive_bind(_untyped_p, fn, vary(args, axes))


def _run(fn, args):
    return fn(*args)


def _type(fn, args):
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, ShapedArray)]
    plain = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    args = jax.tree.map(lambda x: plain(x) if isinstance(x, ShapedArray) else x, args)
    out = eqx.filter_eval_shape(fn, *args)
    return jax.tree.map(lambda x: like(arrays[0], x.shape, x.dtype), out)


def _lower(ctx, *args, **params):
    run = mlir.lower_fun(_flat_run, multiple_results=True)
    avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    return run(ctx.replace(avals_in=avals), *args, **params)


_untyped_p = jax.extend.core.Primitive("eqx_attention_untyped")
_untyped_p.multiple_results = True
_flat_run: Any = eqxi.filter_primitive_def(_run)
_untyped_p.def_impl(_flat_run)
_untyped_p.def_abstract_eval(eqxi.filter_primitive_def(_type))
mlir.register_lowering(_untyped_p, _lower)
