"""The kernels of `Decode`, as far as a machine without a GPU goes: they lower, and where
they do not read what is stored, `explain` says why.

What they compute is checked on a GPU by benchmarks/gpu_check.py, whose cases these are.
"""

import importlib
import pathlib

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import pytest
from eqx_attention import _call, _device
from eqx_attention._keys import quantize
from eqx_attention._mechanism import flash

from .kernel_cases import make_request, on_hopper


NEW = _device.version_of_jax() >= (0, 11)
_BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
_DEFAULT = ("int8: full", "fp8 pages: several queries, alibi")
_SLOW = ("int8 pages: head_dim 256, soft-cap, sinks", "pages: nan behind the mask")


@pytest.fixture
def hopper(monkeypatch):
    """As if there were a Hopper GPU."""
    monkeypatch.setattr(flash, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(_call, "platform_of", lambda *_: "gpu")


@pytest.fixture
def decoding(monkeypatch):
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    return importlib.import_module("gpu.decoding")


def _lowers(decoding, name):
    options = decoding.options_of(name)
    query, stored, _ = jax.eval_shape(lambda: decoding.tokens_of(name, 0))

    def attend(query, stored):
        if NEW:
            assert decoding.in_a_kernel(query, stored, options)
        else:
            request = on_hopper(make_request(query, *stored))
            assert "it needs jax 0.11" in eqa.Decode().explain(request)
        return eqa.attend(query, *stored, mechanism="decode", **options)

    if not NEW:
        jax.eval_shape(attend, query, stored)
        return
    lowered = jax.jit(attend).trace(query, stored)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    bits = 8 if "8" in name.split(":")[0] else 16
    assert "mosaic_gpu" in text and f"eqx_attention_decode_{bits}bit" in text


@pytest.mark.parametrize(
    "name", (*_DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW))
)
def test_decoding_lowers(name, decoding, hopper):
    _lowers(decoding, name)


@pytest.mark.thorough
def test_all_decoding_lowers(decoding, hopper):
    for name in decoding.ALL:
        _lowers(decoding, name)


def _tokens(channels=64, tokens=128):
    return jnp.ones((1, tokens, 2, channels), jnp.bfloat16)


def _paged(x, page):
    pool = jax.tree.map(lambda x: x.reshape(-1, page, *x.shape[2:]), x)
    return eqa.Paged(pool, jnp.zeros((1, 128 // page), jnp.int32))


def test_why_there_is_no_kernel(hopper, monkeypatch):
    monkeypatch.setattr(flash, "version_of_jax", lambda: (0, 11, 2))
    eight = quantize(_tokens(), jnp.int8)
    half = eqa.Quantized(eight.values, eight.scale, jnp.float16)
    scaled = eqa.Quantized(eight.values, eight.scale.astype(jnp.bfloat16), jnp.bfloat16)
    narrow = eqa.Quantized(eight.values[..., :40], eight.scale, jnp.bfloat16)
    for x in (eight, _paged(eight, 64), _paged(_tokens(), 64)):
        assert "in a kernel" in _explain(x, x)
    for key_, value, reason in (
        (eight, _tokens(), "value would have to be in 8 bits too"),
        (narrow, eight, "key_ has 40 channels, no multiple of 64"),
        (scaled, eight, "key_ has scales in bfloat16, not float32"),
        (half, half, "value in 8 bits would have to stand for bfloat16, not float16"),
        (eight, _paged(eight, 32), "value has pages of 32 tokens, no multiple of 64"),
        (_paged(_tokens(), 32), _paged(_tokens(), 64), "key_ has pages of 32 tokens"),
        (_paged(_tokens(), 64), _tokens(), "value would have to be in pages too"),
    ):
        text = _explain(key_, value)
        assert "splits of" in text and "in no kernel: " in text and reason in text


def _explain(key_, value):
    query = jnp.ones((1, 1, 4, key_.shape[-1]), key_.dtype)
    return eqa.Decode().explain(on_hopper(make_request(query, key_, value)))
