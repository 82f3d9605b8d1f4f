"""Functions given by users: evaluated elementwise, and with no hidden arrays."""

import functools as ft
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._static import has_arrays, is_array
from ._tokens import Tile


def check_function(
    where: str, fn: Callable, arguments: tuple[Any, ...], dtype: Any
) -> None:
    """Traces a user's elementwise function once, on a tile of shape (2, 3, 5).

    **Raises:** `TypeError` if it is no function, or returns another dtype or a shape that
    does not broadcast to the tile; `ValueError` if it captures arrays.
    """
    out = trace(f"{where}(fn)", fn, arguments)
    shape = getattr(out, "shape", None)
    if shape is None or not jnp.issubdtype(out.dtype, dtype):
        got = getattr(out, "dtype", type(out).__name__)
        raise TypeError(
            f"{where}(fn): expected to get a {dtype.__name__} array, got {got}."
        )
    try:
        fits = np.broadcast_shapes(shape, (2, 3, 5)) == (2, 3, 5)
    except ValueError:
        fits = False
    if not fits:
        raise TypeError(
            f"{where}(fn): expected an elementwise function: on a tile of shape "
            f"(2, 3, 5) it gave shape {shape}."
        )


def trace(where: str, fn: Callable, arguments: tuple[Any, ...]) -> Any:
    """What a user's function returns, as shapes and dtypes.

    **Raises:** `TypeError` if it is no function; `ValueError` if it captures arrays.
    """
    if not callable(fn):
        raise TypeError(f"{where}: expected a function, got {type(fn).__name__}.")
    owners = (fn.args, fn.keywords) if isinstance(fn, ft.partial) else ()
    owners = (owners, fn, getattr(fn, "__self__", None))
    if has_arrays(owners):
        _raise_captured(where)
    traced = jax.make_jaxpr(lambda *xs: _as_arrays(fn(*xs)), return_shape=True)
    jaxpr, out = traced(*arguments)
    if any(_constants(jaxpr)):
        _raise_captured(where)
    return out


def _as_arrays(out: Any) -> Any:
    """Python's own scalars are fine results, of a function that looks at nothing."""
    return np.asarray(out) if isinstance(out, bool | int | float) else out


def _constants(jaxpr: Any) -> Iterator[bool]:
    """Whether there are arrays, other than literals of no axis, in a jaxpr or its parts."""
    yield bool(getattr(jaxpr, "consts", ()))
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in inner.eqns:
        values = [v.val for v in eqn.invars if hasattr(v, "val")]
        yield any(is_array(x) and np.ndim(x) > 0 for x in values)
        for part in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                yield from _constants(part)


def _raise_captured(where: str):
    raise ValueError(
        f"{where}: the function captures arrays. Pass them as `params` (or, one value "
        "a token, as `q_features` or `kv_features`), so that they are differentiated, "
        "sliced, sharded and saved with the module."
    )


def arguments_of(module: Any, tile: Tile) -> tuple[Any, ...]:
    """What the function of a `Predicate` or a `ScoreFn` is given of a tile, in order."""
    return (
        tile.q_position,
        tile.kv_position,
        tile.head,
        module.q_features,
        module.kv_features,
        own_params(module.params),
    )


def example_arguments(q_features: PyTree, kv_features: PyTree, params: PyTree):
    """Likewise, of a tile of 2 heads, 3 queries and 5 keys, as shapes and dtypes."""

    def like(shape):
        return lambda x: jax.ShapeDtypeStruct(shape, x.dtype) if is_array(x) else x

    return (
        jax.ShapeDtypeStruct((1, 3, 1), jnp.int32),
        jax.ShapeDtypeStruct((1, 1, 5), jnp.int32),
        jax.ShapeDtypeStruct((2, 1, 1), jnp.int32),
        jax.tree.map(like((1, 3, 1)), q_features),
        jax.tree.map(like((1, 1, 5)), kv_features),
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x, params
        ),
    )


def features(where: str, tree: PyTree) -> PyTree:
    """Checks the features of tokens: arrays of at least one axis."""
    leaves = jax.tree.leaves(tree)
    if not all(is_array(x) and x.ndim > 0 for x in leaves):
        raise TypeError(
            f"{where}: expected a pytree of arrays of shape '*#batch tokens', got {tree}."
        )
    return jax.tree.map(jnp.asarray, tree)


def own_params(params: PyTree) -> PyTree:
    """Parameters as they were given: without the axes (head, query, key)."""
    return jax.tree.map(lambda x: x.reshape(x.shape[3:]) if is_array(x) else x, params)
