"""What a file may name: types, functions and constants. It can name nothing else."""

import functools as ft
import inspect
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision


_DTYPES = """bool_ int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64
    float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz
    float8_e5m2 float8_e5m2fnuz float8_e8m0fnu bfloat16 float16 float32 float64 complex64
    complex128""".split()
_ACTIVATIONS = """relu relu6 gelu silu sigmoid softplus elu celu selu glu leaky_relu
    hard_tanh hard_sigmoid hard_silu log_sigmoid mish squareplus sparse_plus soft_sign
    identity tanh""".split()


@ft.cache
def classes() -> dict[str, type]:
    """The classes that a file may name, by the names it may use."""
    out = {}
    for prefix, module in (("eqx.nn.", eqx.nn), ("", sys.modules["eqx_attention"])):
        for name, cls in vars(module).items():
            known = isinstance(cls, type) and issubclass(cls, eqx.Module)
            if known and not inspect.isabstract(cls) and not name.startswith("_"):
                out[prefix + name] = cls
    return out


@ft.cache
def functions() -> dict[str, Callable]:
    """The functions that a file may name without its reader providing them."""
    out = {f"jax.nn.{name}": getattr(jax.nn, name) for name in _ACTIVATIONS}
    identity = inspect.signature(eqx.nn.MLP.__init__).parameters["final_activation"]
    return out | {"jax.numpy.tanh": jnp.tanh, "eqx.nn.identity": identity.default}


@ft.cache
def dtypes() -> dict[str, type]:
    """JAX's scalar types by the names of their dtypes."""
    types = [getattr(jnp, name) for name in _DTYPES if hasattr(jnp, name)]
    return {np.dtype(t).name: t for t in types}


@ft.cache
def constants() -> dict[str, dict[str, Any]]:
    """The values that JSON has no form for, by their kind and name."""
    return {
        "float": {x: float(x) for x in ("nan", "inf", "-inf")},
        "precision": dict(Precision.__members__),
        "dtype": {name: np.dtype(t) for name, t in dtypes().items()},
        "numpy": {name: np.dtype(t).type for name, t in dtypes().items()},
        "jax.numpy": dtypes(),
    }
