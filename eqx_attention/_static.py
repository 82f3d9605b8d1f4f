"""Numbers are static, arrays are leaves."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from jax.sharding import AbstractMesh


AnyArray = jax.Array | np.ndarray


class Static(eqx.Module):
    """A Python value carried in a pytree without being one of its leaves."""

    value: Any = eqx.field(static=True)

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        return wl.pdoc(self.value, **kwargs)


def pdoc(module: eqx.Module, **kwargs) -> wl.AbstractDoc:
    """How a module prints: by the public names of its fields, those of no content omitted.

    It is the `__pdoc__` of a class, so that it also holds inside of other modules.
    """
    fields = dataclasses.fields(module)  # pyright: ignore[reportArgumentType]
    pairs = [(f.name.removeprefix("_"), getattr(module, f.name)) for f in fields]
    pairs = [
        (name, x) for name, x in pairs if not (x is None or isinstance(x, tuple) and not x)
    ]
    return wl.bracketed(
        begin=wl.TextDoc(f"{type(module).__name__}("),
        docs=wl.named_objs(pairs, **kwargs),
        sep=wl.comma,
        end=wl.TextDoc(")"),
        indent=kwargs.get("indent", 2),
    )


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


def has_arrays(tree: Any) -> bool:
    """Whether any leaf is an array, whose numbers may be known only at run time."""
    return any(map(is_array, jax.tree.leaves(tree)))


@contextlib.contextmanager
def at_trace_time() -> Iterator[None]:
    """Where what is computed from numbers that are static is known at once. It is computed
    on no mesh, of which this may be inside."""
    no_mesh = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
    with jax.ensure_compile_time_eval(), no_mesh:
        yield
