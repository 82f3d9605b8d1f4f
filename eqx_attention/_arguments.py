"""Arguments that are arrays or numbers: checked, and as modules store them."""

from typing import Any

import jax
import jax.numpy as jnp

from ._static import is_array, Static, static_or_leaf


_KINDS = {
    "booleans": (jnp.bool_,),
    "integers": (jnp.integer,),
    "booleans or integers": (jnp.bool_, jnp.integer),
    "floating-point numbers": (jnp.floating,),
}


def as_array(where: str, x: Any, kind: str, shape: str) -> jax.Array:
    """A leaf that is always an array.

    **Arguments:**

    - `where`: the argument, for error messages.
    - `x`: what was given.
    - `kind`: what it must hold, one of the words above.
    - `shape`: the names of its axes. If the first is `...` or starts with `*`, then there
        may be any number of axes in its place.
    """
    if not is_array(x) or not any(jnp.issubdtype(x.dtype, k) for k in _KINDS[kind]):
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{where}: expected an array of {kind}, got {got}.")
    names = shape.split()
    more = names[0].startswith(("...", "*"))
    least = len(names) - more
    if x.ndim < least or (x.ndim > least and not more):
        raise TypeError(
            f"{where}: expected an array of shape {shape!r}, got shape {x.shape}."
        )
    return jnp.asarray(x)


def as_integer(
    where: str, x: Any, least: int | None = None, optional: bool = False
) -> Static | jax.Array:
    """A Python integer (or `None`, if `optional`), which is static, or an array of
    integers `"*#batch"`, which is a leaf."""
    x = static_or_leaf(x)
    if isinstance(x, Static):
        value = x.value
        if value is None and optional:
            return x
        if isinstance(value, bool) or not isinstance(value, int):
            also = " or None" if optional else ""
            raise TypeError(f"{where}: expected an integer{also}, got {value!r}.")
        if least is not None and value < least:
            raise ValueError(f"{where}: expected at least {least}, got {value}.")
        if not -(2**31) < value < 2**31:
            raise ValueError(f"{where}: expected a 32-bit integer, got {value}.")
        return x
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.integer):
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{where}: expected an integer or an integer array, got {got}.")
    return x.astype(jnp.int32)
