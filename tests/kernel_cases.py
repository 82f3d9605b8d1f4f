"""The cases that a GPU is held to, and requests as a GPU would get them."""

import dataclasses
import importlib.util
import pathlib

import eqx_attention as eqa
import jax.numpy as jnp
from eqx_attention._call import call_of
from eqx_attention._request import request_of


def _cases():
    path = pathlib.Path(__file__).parent.parent / "benchmarks" / "gpu" / "cases.py"
    spec = importlib.util.spec_from_file_location("cases", path)
    module = importlib.util.module_from_spec(spec)  # pyright: ignore
    spec.loader.exec_module(module)  # pyright: ignore
    return module


CASES = _cases()
TILES = ["segments", "dense", "predicate", "score function", "bias", "positions"]
TILES += [name for name in CASES.SUPPORT if "lookup" in name or "relative" in name]
HOPPER = [name for name, (able, *_) in CASES.SUPPORT.items() if "flash" in able]


def make_request(q, k, v, **options):
    options = {"mask": eqa.Full(), "score": (), "sinks": None, "scale": None} | options
    others = {"q_positions": "start", "kv_positions": None, "precision": None}
    return request_of(call_of(q, k, v, **(others | options)))


def on_hopper(request):
    """As it would be there, where results are written once."""
    dtype = request.query.dtype
    return dataclasses.replace(request, platform="gpu", result_dtype=dtype)


def make_case(name):
    _, shape, make = CASES.SUPPORT[name]
    options = make()
    dtype = jnp.dtype(options.pop("dtype", "bfloat16"))
    for other in ("return_lse", "nan", "nan queries"):
        options.pop(other, None)
    *arrays, dout = CASES.operands(shape, dtype, 0)
    return arrays, dout, options
