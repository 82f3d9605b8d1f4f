"""Decode, and keys in stored form."""

import functools as ft

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from eqx_attention import testing
from eqx_attention._keys import quantize
from eqx_attention.testing import Shape

from .helpers import assert_close, compiled, fast_jit, operands


SHAPE = Shape((3,), 3, 37, 4, 2, 8, 6)
PAGE = 4
FP8 = jnp.float8_e4m3fn
THOROUGH = pytest.mark.thorough


def _first_is_tree(q, kv, head, q_feature, kv_feature, params):
    return (kv < 30) | (kv == 30 + q)


MASKS = {
    "lengths": eqa.Padding(jnp.array([37, 12, 0])),
    "causal": eqa.Causal() & eqa.SlidingWindow(9),
    "tree": eqa.Dense(jnp.arange(37)[None] <= jnp.array([[33], [35], [3]])),
    "guesses": eqa.Predicate(_first_is_tree) & eqa.Keys(jnp.arange(37) % 3 > 0),
}
SCORES = (eqa.SoftCap(2.0), eqa.ALiBi.standard(4))
SINKS = jnp.array([0.3, -1.0, 2.0, 0.0])


@pytest.mark.parametrize("n", (0, *(pytest.param(n, marks=THOROUGH) for n in range(1, 15))))
def test_conformance(n):
    """Against the independent float64 reference, with gradients."""
    cases = testing.cases(3 * (n + 1), seed=7, dtype="float64")[3 * n :]
    report = testing.check(eqa.Decode(num_splits=3), cases=cases).raise_on_failure()
    assert len(report.passed) == len(cases)


@pytest.mark.parametrize("num_splits", (None, 5))
def test_decode(num_splits):
    """Masks, scores, sinks, grouped heads; and the gradients of all."""
    q, k, v = operands(SHAPE)

    def everything(mechanism, q, k, v, scores):
        out = {}
        for name, mask in MASKS.items():
            score = scores if name == "causal" else ()
            out[name] = eqa.attend(
                q,
                k,
                v,
                mask=mask,
                score=score,
                sinks=SINKS if name == "tree" else None,
                q_positions="end" if name == "causal" else "start",
                mechanism=mechanism,
                return_lse=True,
            )
        return out

    def loss(args, mechanism):
        out, lse = everything(mechanism, *args)["causal"]
        return (out**2).sum() + jnp.sin(lse).sum()

    def both(mechanism, *args):
        return everything(mechanism, *args), eqx.filter_grad(loss)(args, mechanism)

    expected = compiled(ft.partial(both, eqa.Vanilla()), q, k, v, SCORES)
    found = compiled(ft.partial(both, eqa.Decode(num_splits)), q, k, v, SCORES)
    assert_close(found, expected, 2e-5)


def _stored(k, v, kind, seed=0):
    """`(key_, value)` in a stored form, and the arrays that they stand for."""
    *batch, length, _, _ = k.shape
    blocks = -(-length // PAGE)
    rng = np.random.default_rng(seed)
    num = int(np.prod(batch)) * blocks
    table = jnp.asarray(rng.permutation(num + 2)[:num].reshape(*batch, blocks), jnp.int32)

    def pages(x):
        pad = [(0, 0)] * len(batch) + [(0, blocks * PAGE - length), (0, 0), (0, 0)]
        x = jnp.pad(x, pad).reshape(-1, PAGE, *x.shape[-2:])
        pool = jnp.full((num + 2, *x.shape[1:]), 1e3, x.dtype)
        return pool.at[table.reshape(-1)].set(x)

    stored, dense = [], []
    for x in (k, v):
        if kind == "paged":
            stored.append(eqa.Paged(pages(x), table))
        elif kind == "int8":
            stored.append(quantize(x, jnp.int8))
        else:
            stored.append(eqa.Paged(quantize(pages(x), FP8), table))
        if kind != "paged":
            eight = quantize(x, jnp.int8 if kind == "int8" else FP8)
            values = eight.values
            if kind != "int8":
                values = jax.lax.bitcast_convert_type(values, FP8)
            x = values.astype(jnp.float32) * eight.scale[..., None]
        dense.append(x)
    return stored, dense


@pytest.mark.parametrize(
    "kind",
    (
        "fp8 paged",
        pytest.param("paged", marks=THOROUGH),
        pytest.param("int8", marks=THOROUGH),
    ),
)
def test_stored(kind):
    """Stored keys are exactly the keys that they stand for; also mapped over, and in the
    gradients of queries and scores."""
    q, k, v = operands(SHAPE)
    (key_, value), (k, v) = _stored(k, v, kind)
    # Paged keys end with the last page.
    mask = eqa.Padding(jnp.array([37, 12, 0]))
    sinks, score = SINKS, eqa.SoftCap(2.0)
    attend = ft.partial(eqa.attend, mask=mask, score=score, sinks=sinks)

    def loss(q, k, v, mechanism):
        return (attend(q, k, v, mechanism=mechanism) ** 2).sum()

    @fast_jit
    def everything(q, k, v, key_, value):
        expected = attend(q, k, v, mechanism="vanilla")
        outs = [
            attend(q, key_, value, mechanism=mechanism)
            for mechanism in ("decode", eqa.Decode(4), eqa.Blockwise(2, 7), "auto")
        ]
        one = lambda q, k, v, n: eqa.attend(  # noqa: E731
            q, k, v, mask=eqa.Padding(n), score=score, sinks=sinks
        )
        axes = jax.tree.map(lambda _: 0, (key_, value))
        if kind != "int8":  # The pool is shared.
            axes = eqx.tree_at(lambda t: [x.pool for x in t], axes, replace=[None, None])
        lengths = jnp.array([37, 12, 0])
        outs.append(jax.vmap(one, (0, *axes, 0))(q, key_, value, lengths))
        # Each has a pool of its own.
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), (q, key_, value))
        outs += list(jax.vmap(attend)(*twice))
        grads = [
            jax.grad(loss)(q, *kv, m)
            for kv, m in (((k, v), "vanilla"), ((key_, value), "decode"))
        ]
        return expected, outs, grads

    expected, outs, grads = everything(q, k, v, key_, value)
    for out in outs:
        assert_close(out, expected, 1e-6)
    assert_close(grads[1], grads[0], 1e-6)


@pytest.mark.parametrize("stored", (jnp.int8, FP8))
def test_quantization_bound(stored):
    x = jr.normal(jr.key(0), (5, 3, 16)) * jnp.array([1e-3, 1.0, 1e3])[None, :, None]
    x = x.at[0, 0].set(0)
    eight = quantize(x, stored)
    back = eqa.Quantized(eight.values[None], eight.scale[None]).block((0, 0, 0), (1, 5, 3))
    error, top = jnp.abs(back[0] - x), jnp.abs(x).max(-1, keepdims=True)
    bound = top / 254 if stored is jnp.int8 else jnp.maximum(jnp.abs(x) / 16, top / 2**17)
    assert jnp.all(error <= bound * 1.00001)
    assert eight.stored == stored and eight.values.dtype.itemsize == 1


def test_skips():
    """What lies beyond the length of a sequence is not computed."""
    q, k, v = operands(SHAPE)
    calls = []

    def seen(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
        jax.debug.callback(lambda kv: calls.append(int(np.min(kv))), kv_pos)
        return logit

    mechanism = eqa.Decode(num_splits=4)
    score = eqa.ScoreFn(seen)
    for n, expected in ((37, [0, 10, 20, 27]), (12, [0, 10]), (0, [])):
        calls.clear()
        more = dict(mask=eqa.Padding(jnp.array(n)), score=score, mechanism=mechanism)
        jax.block_until_ready(eqa.attend(q[0], k[0], v[0], **more))
        jax.effects_barrier()
        assert sorted(calls) == expected


def _temporaries(fn, *args) -> int:
    stats = jax.jit(fn).lower(*args).compile().memory_analysis()
    assert stats is not None
    return stats.temp_size_in_bytes


@pytest.mark.parametrize("kind", ("paged", "int8", "fp8 paged"))
def test_memory(kind):
    """No temporary is larger than what one split of the cache is made an array of."""
    heads, dim, capacity, splits = 2, 16, 8192, 32
    if kind == "int8":
        cache = eqa.QuantizedCache.init(capacity, heads, dim)
    else:
        cache = eqa.PagedCache.init(capacity, heads, dim, page_size=PAGE * 4)
        cache = eqa.QuantizedCache(cache, FP8) if kind == "fp8 paged" else cache
    query = jnp.ones((1, 4, dim))
    attend = lambda c, q: c.attend(q, mechanism=eqa.Decode(splits))  # noqa: E731
    split = 2 * capacity // splits * heads * dim * 4
    # Of keys and of values: as they are taken, and with heads first, of 32 splits.
    assert _temporaries(attend, cache, query) < 5 * split


def test_choice():
    q, k, v = operands(Shape((), 1, 2**15, 4, 2, 64, 64))
    few = eqa.Attention().explain(q, k, v)
    assert few.startswith("decode: ") and "few queries" in few
    (key_, value), _ = _stored(*operands(SHAPE)[1:], "paged")
    q, *_ = operands(SHAPE)
    stored = eqa.Attention().explain(q, key_, value)
    assert stored.startswith("decode: ") and "as they are stored" in stored
    assert "vanilla: it needs arrays" in stored
    many = operands(Shape((3,), 9, 37, 4, 2, 8, 6))[0]
    assert eqa.Attention().explain(many, key_, value).startswith("blockwise: ")


def test_last_token():
    """Where the query is the last token, Causal() is left out, so that what knows lengths
    but no positions (cuDNN, on a GPU) can do it."""
    asked = []

    class Asks(eqa.AbstractMechanism):
        def unsupported(self, request):
            asked.append(request.pairs.mask)
            return ()

        def forward(self, request):
            return eqa.Vanilla().forward(request)

        def backward(self, request, out, lse, dout, dlse, wrt):
            raise NotImplementedError

        def blocks(self, request):
            raise NotImplementedError

        def explain(self, request):
            return "asks"

    cache = eqa.StaticCache.init(8, 2, 4)
    query = jnp.ones((2, 4, 4))
    for q, mask, kind in (
        (query[:1], eqa.Causal(), eqa.Padding),
        (query, eqa.Causal(), eqa.And),
        (query[:1], eqa.Causal() & eqa.SlidingWindow(2), eqa.And),
        (query[:1], eqa.Causal(-1), eqa.And),
    ):
        jax.eval_shape(lambda q: cache.attend(q, mask=mask, mechanism=Asks()), q)
        assert type(asked.pop()) is kind
    cache = eqa.StaticCache.init(9, 2, 4)  # What is compiled already does not ask.
    config = eqa.AttentionConfig(mask=eqa.Causal(), mechanism=Asks())
    mha = eqa.MultiheadAttention(4, 16, num_kv_heads=2, attention=config, key=jr.key(0))
    x = jnp.ones((2, 16))
    jax.eval_shape(lambda x: mha(x, x, x, cache=cache)[0], x[:1])
    assert type(asked.pop()) is eqa.Padding
    jax.eval_shape(lambda x: mha(x, x, x, cache=cache)[0], x)
    assert type(asked.pop()) is eqa.And


def test_refusals():
    q, k, v = operands(Shape((), 129, 4, 2, 2, 8, 8))
    with pytest.raises(eqa.UnsupportedError, match="at most 128, and there are 129"):
        eqa.attend(q, k, v, mechanism="decode")
    with pytest.raises(ValueError, match="num_splits.*at least 1, got 0"):
        eqa.Decode(0)
    with pytest.raises(TypeError, match="num_splits"):
        eqa.Decode(2.0)  # pyright: ignore
    q, k, v = operands(SHAPE)
    (key_, value), _ = _stored(k, v, "paged")
    with pytest.raises(eqa.UnsupportedError, match="key_ is Paged.*decode"):
        eqa.attend(q, key_, value, mechanism="vanilla")
    with pytest.raises(eqa.UnsupportedError, match="value is Paged"):
        eqa.attend(
            q, jnp.pad(k, ((0, 0), (0, 3), (0, 0), (0, 0))), value, mechanism="vanilla"
        )

    def loss(pool):
        return eqa.attend(q, eqa.Paged(pool, key_.table), value).sum()

    with pytest.raises(ValueError, match="key_: .*Paged, which is not differentiable"):
        jax.grad(loss)(key_.pool)


def test_bad_stored():
    eight = quantize(jnp.ones((3, 2, 4)), jnp.int8)
    pool, table = jnp.ones((5, PAGE, 2, 4)), jnp.zeros((2, 3), jnp.int32)
    for make, match in (
        (lambda: eqa.Quantized(eight.values, eight.scale[..., 0]), r"scale.*\(3, 2\)"),
        (lambda: eqa.Quantized(eight.values, eight.values[..., 0]), "scale.*int8"),
        (lambda: eqa.Quantized(jnp.ones((3, 2, 4)), eight.scale), "values.*float32"),
        (lambda: eqa.Quantized(eight.values[0], eight.scale[0]), "values.*shape"),
        (lambda: eqa.Quantized(*jax.tree.leaves(eight), jnp.int8), "dtype.*int8"),
        (lambda: eqa.Paged(pool[0], table), "pool.*shape"),
        (lambda: eqa.Paged(pool.astype(jnp.int8), table), "pool.*int8"),
        (lambda: eqa.Paged(pool, table.astype(jnp.float32)), "table"),
    ):
        with pytest.raises(TypeError, match=match):
            make()
    paged = eqa.Paged(pool, table)
    assert paged.shape == (2, 12, 2, 4) and paged.ndim == 4
    assert paged.dtype == jnp.float32 and paged.astype(jnp.bfloat16).dtype == jnp.bfloat16
    # A table of one batch for queries of another.
    with pytest.raises(TypeError):
        eqa.attend(jnp.ones((3, 1, 2, 4)), paged, paged)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        eqa.attend(jnp.ones((2, 1, 3, 4)), paged, paged)
