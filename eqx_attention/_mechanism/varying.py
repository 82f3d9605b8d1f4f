"""Inside of a `jax.shard_map`, a type says over which mesh axes an array varies."""

from typing import Any, TypeVar

import jax
from jax import lax

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
