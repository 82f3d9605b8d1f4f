"""Numbers are static, arrays are leaves."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


class Static(eqx.Module):
    """A Python value carried in a pytree without being one of its leaves."""

    value: Any = eqx.field(static=True)

    def __repr__(self) -> str:
        return repr(self.value)


def static_or_leaf(x: Any) -> Any:
    """What a module stores for an argument that is a Python value or an array.

    Python's and NumPy's scalars (and `None`) are metadata; arrays are leaves.
    """
    if isinstance(x, Static):
        return x
    if isinstance(x, np.generic):
        return Static(x.item())
    if x is None or isinstance(x, bool | int | float):
        return Static(x)
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def unwrap(x: Any) -> Any:
    """The inverse of `static_or_leaf`."""
    return x.value if isinstance(x, Static) else x


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)
