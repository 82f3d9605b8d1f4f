"""The kernels of `Decode`, as far as a machine without a GPU goes: they lower, and where
they do not read what is stored, `explain` says why.

What they compute is checked on a GPU by benchmarks/gpu_check.py, whose cases these are.
"""

import importlib
import pathlib
import re

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import _call, _device
from eqx_attention._axes import Block, over_batch
from eqx_attention._kernel.row_tiles import Counted, Listed, row_tiles
from eqx_attention._keys import quantize
from eqx_attention._tokens import tile

from .kernel_cases import make_request, on_hopper


NEW = _device.version_of_jax() >= (0, 11)
_BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
_DEFAULT = ("int8: full", "fp8 pages: several queries, alibi")
_SLOW = ("int8 pages: head_dim 256, soft-cap, sinks", "pages: nan behind the mask")


@pytest.fixture
def hopper(monkeypatch):
    """As if there were a Hopper GPU."""
    monkeypatch.setattr(_device, "compute_capability", lambda: (9, 0))
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


def _needed(text):
    """Of the lowered module of one function, the lines on which its result depends, but for
    those that move nothing."""
    body = text.split("func.func private @run", 1)[1].split("func.func", 1)[0]
    names = re.compile(r"%\w+")
    made, (_, last) = {}, body.rsplit("return", 1)
    for line in body.splitlines():
        if found := re.match(r"\s*(%\w+)(?::\d+)? = (.*)", line):
            made[found[1]] = found[2]
    todo, seen = names.findall(last), {}
    while todo:
        name = todo.pop()
        if name in made and name not in seen:
            seen[name] = made[name]
            todo += names.findall(made[name].split("backend_config")[0])
    still = ("reshape", "constant", "broadcast_in_dim", "call @_pad")
    return [x for x in seen.values() if not x.removeprefix("stablehlo.").startswith(still)]


@pytest.mark.parametrize("kind", ("static", "paged", "int8"))
def test_nothing_runs_but_the_kernel(kind, hopper):
    """In a step: one sequence that several multiprocessors share, and several."""
    if not NEW:
        request = on_hopper(make_request(*3 * [_tokens()]))
        assert "it needs jax 0.11" in eqa.Decode().explain(request)
        return
    for batch in (1, 3):
        cache = _cache(kind, batch)
        query = jnp.ones((batch, 1, 4, 64), jnp.bfloat16)

        def attend(query, cache):
            if kind != "paged":
                return cache.attend(query, mask=eqa.Causal(), mechanism="decode")
            # As the cache does, but for a check that cannot be lowered here.
            pages = (eqa.Paged(x, cache.table) for x in (cache.key_, cache.value))
            mask = eqa.Padding(cache.length)
            return eqa.attend(query, *pages, mask=mask, mechanism="decode")

        lowered = jax.jit(attend).trace(query, cache)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        (only,) = _needed(re.sub(r'(module|backend_config) = "[^"]*"', "", text))
        assert "custom_call @mosaic_gpu" in only
        assert "callback" not in text


def _cache(kind, batch):
    if kind == "paged":
        empty = eqa.PagedCache.init(
            512, 2, 64, page_size=64, batch=(batch,), dtype=jnp.bfloat16
        )
    else:
        empty = eqa.StaticCache.init(512, 2, 64, batch=(batch,), dtype=jnp.bfloat16)
    return eqa.QuantizedCache(empty) if kind == "int8" else empty


def _visible(request):
    """(batch, query, key)"""
    (q_len, kv_len), pairs = request.lengths, request.pairs
    whole = Block((0, 0, 0, 0), (len(request.query), 1, q_len, kv_len))
    tokens = tile(pairs.q, pairs.kv, pairs.head, whole)
    out = over_batch(lambda tree: tree[0].visible(tree[1]), (pairs.mask, tokens))
    return jnp.broadcast_to(out[:, 0], (out.shape[0], q_len, kv_len))


@pytest.mark.parametrize("kv_len", (256, 200))
def test_tiles_that_are_counted(kv_len):
    """All that is visible is in them, also where little or nothing is, and of those that
    are said to be FULL, all is."""
    lengths = jnp.array([0, 1, 64, 65, kv_len - 1, kv_len, kv_len + 9])
    size, some = len(lengths), eqa.Padding(lengths)
    last = lengths[:, None] - 3 + jnp.arange(3)[None]
    far = jnp.array([[5, 150, 7]] * size)
    query, keys = jnp.ones((size, 3, 4, 8)), jnp.ones((size, kv_len, 2, 8))
    for mask, positions in (
        (some, last),
        (eqa.Full(), last),
        (some & eqa.Causal(), last),
        (eqa.Causal(-70) & some & eqa.SlidingWindow(90), far),
        (eqa.SlidingWindow(140, 3), last),
        (eqa.SlidingWindow(None, 64) & some, far),
        (eqa.SlidingWindow(130, None), "end"),
    ):
        request = make_request(query, keys, keys, mask=mask, q_positions=positions)
        tiles = row_tiles(request, 2, 64)
        assert isinstance(tiles, Counted)
        seen = np.asarray(_visible(request))
        arrays = [np.asarray(x) for x in tiles.arrays]
        for b, row in ((b, row) for b in range(size) for row in range(2)):
            own = seen[b if len(seen) > 1 else 0, 2 * row : 2 * row + 2]
            parts = [own[:, n : n + 64] for n in range(0, kv_len, 64)]
            at = (b, 0, row)
            whole, count = tiles.counts(arrays, at)
            first = [int(tiles.first_key(arrays, at, n)) // 64 for n in range(count)]
            full = [x.all() and x.shape[1] == 64 for x in parts]
            assert sorted(first[:whole]) == [n for n, x in enumerate(full) if x]
            assert len(set(first)) == len(first)
            assert set(first) >= {n for n, x in enumerate(parts) if x.any()}
    keys_of = eqa.Keys(jnp.ones((size, kv_len), bool))
    wide = eqa.SlidingWindow(3, 2**31 - 2)  # Which positions are not to be added to.
    for mask in (some & keys_of, wide, eqa.Causal(2**30)):
        request = make_request(query, keys, keys, mask=mask, q_positions=last)
        assert isinstance(row_tiles(request, 2, 64), Listed)


def _tokens(channels=64, tokens=128):
    return jnp.ones((1, tokens, 2, channels), jnp.bfloat16)


def _paged(x, page):
    pool = jax.tree.map(lambda x: x.reshape(-1, page, *x.shape[2:]), x)
    return eqa.Paged(pool, jnp.zeros((1, 128 // page), jnp.int32))


def test_why_there_is_no_kernel(hopper, monkeypatch):
    monkeypatch.setattr(_device, "version_of_jax", lambda: (0, 11, 2))
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
