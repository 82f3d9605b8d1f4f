"""Masks and scores as kernels compute them, of a tile, without a GPU."""

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention._axes import Block
from eqx_attention._kernel import backward, lookup
from eqx_attention._kernel.factors import is_constant
from eqx_attention._kernel.hopper import LOG2E
from eqx_attention._kernel.logits import logit_of
from eqx_attention._kernel.terms import Place, pulled_logit_fn, terms_of, visible_fn
from eqx_attention._mechanism.hidden import seen_rows
from eqx_attention._mechanism.tile import TileOf
from jax.experimental.pallas import mosaic_gpu as plgpu

from .helpers import compiled
from .kernel_cases import make_case, make_request, TILES


class _Ref:
    """An array in the memory of a GPU, as far as terms look at it."""

    def __init__(self, array):
        self.array = array
        self.at = self

    def __getitem__(self, at):
        parts = [slice(x.start, x.start + x.size) if hasattr(x, "size") else x for x in at]
        return self.array[tuple(parts)]


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Terms are evaluated by numpy, so to say. What is read of tables must be in them."""

    def iota(dtype, shape, axis, *, layout):
        return jax.lax.broadcasted_iota(dtype, shape, axis)

    def read(table, index, _):
        assert index.dtype == jnp.int32
        assert 0 <= index.min() and index.max() < table.size
        return table[index]

    monkeypatch.setattr(plgpu, "broadcasted_iota", iota)
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(plgpu, "load", lambda x, *, layout, optimized: x)
    monkeypatch.setattr(lookup, "read", read)


@pytest.mark.slow
@pytest.mark.parametrize("by_key", (False, True))
@pytest.mark.parametrize("name", TILES)
def test_terms_on_a_tile(name, by_key, without_a_gpu):
    """What is computed in the kernels, of a tile, against the portable mechanisms'."""
    (q, k, v), _, options = make_case(name)
    request = make_request(q, k, v, **options)
    batch, heads, (q_len, kv_len) = q.shape[0], q.shape[2], request.lengths
    shape = (batch, heads, q_len, kv_len)
    product, cotangent = jax.random.normal(jax.random.key(1), (2, *shape))
    whole = Block((0, 0, 0, 0), shape)
    masked = TileOf(request, whole, masked=True).logits
    seen = ~jnp.isneginf(masked(product))
    want, pull = jax.vjp(TileOf(request, whole, masked=False).logits, product)
    fns = {"visible": visible_fn(request, 64), "logit": pulled_logit_fn}
    given = terms_of(request, 128, 64, fns, by_key)
    given = given.given([_Ref(x) for x in given.arrays])
    b, h, i, j = batch - 1, heads - 2 if heads > 1 else 0, q_len // 128 * 64, kv_len // 64
    place = Place(b, h, i, j // 2 * 64, (64, 128) if by_key else (128, 64), int(by_key))
    tile = (b, h, slice(i, min(i + 128, q_len)), slice(place.key, place.key + 64))
    at = {n: x.at(x.load(place, x.load(place)), place) for n, x in given.items()}

    def padded(x):
        x = x[tile]
        x = jnp.pad(x, ((0, 128 - x.shape[0]), (0, 64 - x.shape[1])))
        return x.T if by_key else x

    def real(x):
        rows, columns = np.asarray(want[tile]).shape
        return np.asarray(x.T if by_key else x)[:rows, :columns]

    visible = real(at["visible"]())
    products, cotangents = padded(product), padded(cotangent)
    got = real(at["logit"](0, products))
    gradient = real(at["logit"](1, products, cotangents))
    assert np.array_equal(visible & ~np.isneginf(got), np.asarray(seen[tile]))
    for x, y in ((got, want), (gradient, pull(cotangent)[0])):
        np.testing.assert_allclose(x, np.asarray(y[tile]), rtol=1e-4, atol=1e-4)


@jax.custom_vjp
def _clipped(x):
    """Its gradient is no linear function of that of what follows."""
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))


@jax.custom_vjp
def _tripled(x):
    """Its gradient is not that of what it computes."""
    return x


_tripled.defvjp(lambda x: (x, None), lambda _, g: (3 * g,))

_PARAMS = {"by_head": jnp.asarray([0.5, -2.0])}
_FUNCTIONS = {
    "affine": lambda x, i, j, *_: 3 - (x / 2 + 0.25 * (i - j).astype(x.dtype)) * 4,
    "positive": lambda x, i, j, *_: (x - i.astype(x.dtype) * 0.1) * 1.5 + 1 / (1 + j),
    "by head": lambda x, i, j, h, a, b, p: x * p["by_head"][h] + p["by_head"][h],
    "head chosen": lambda x, i, j, h, *_: jnp.where(h == 0, x * 2, x * 3),
    "pair chosen": lambda x, i, j, *_: jnp.where(i < j, x * 2, jnp.tanh(x)),
    "gated": lambda x, i, j, h, a, b, p: jax.nn.silu(x * 3) * p["by_head"][h] / 2 - x,
    "steps": lambda x, *_: jnp.maximum(x, 0) - jnp.clip(x, -0.5, 0.5) + jnp.abs(x) / 3,
    "powers": lambda x, i, j, *_: -(x**3) / 10 + x**2 * (i - j).astype(x.dtype) * 0.01,
    "quotient": lambda x, i, j, *_: x / (1.5 + jnp.cos(x)) / (1 + j).astype(x.dtype),
    "shared": lambda x, *_: (lambda y: y * jnp.sin(y) + y)(0.3 * x),
    "constant": lambda x, i, *_: jax.lax.stop_gradient(x) * 2 + i.astype(x.dtype),
    "clipped": lambda x, *_: _clipped(2 * x),
    "tripled": lambda x, *_: _tripled(2 * x) + 1,
}
_SCORES = {
    "alibi": eqa.ALiBi(jnp.asarray([0.5, 0.125])),
    "soft-cap": eqa.SoftCap(1.5),
    "soft-cap, learned": eqa.SoftCap(jnp.asarray(1.5)),
    "soft-cap of alibi": (eqa.ALiBi(jnp.asarray([0.5, 0.125])), eqa.SoftCap(1.5)),
    "alibi of soft-cap": (eqa.SoftCap(1.5), eqa.ALiBi(jnp.asarray([0.5, 0.125]))),
    "relative": eqa.RelativeBias(jnp.arange(16.0).reshape(8, 2), max_distance=8),
    "bias": eqa.Bias(jnp.arange(2.0 * 16 * 16).reshape(2, 16, 16) % 7),
    **{name: eqa.ScoreFn(fn, params=_PARAMS) for name, fn in _FUNCTIONS.items()},
}
_ADDED = {"alibi", "relative", "bias", "positive"}
_PULLED = {"clipped"}


def _in_a_kernel(request, product, cotangent):
    """The logits of a head, times `LOG2E`, and the gradient of the product, as a kernel of
    the backward pass computes them."""
    logit = logit_of(request, 16, 16)
    terms = terms_of(request, 16, 16, {"logit": logit.term}, by_key=True)
    loaded = terms.given([_Ref(x) for x in terms.arrays])["logit"]
    place = Place(0, 1, 0, 0, (16, 16), 1)
    at = loaded.at(loaded.load(place, loaded.load(place)), place)
    if logit.added:
        logits = (product + at()) * logit.scale * LOG2E
    else:
        logits = at(0, product)
    if logit.pulled:
        return logit, logits, at(1, product, cotangent)
    slope = at(1) if logit.sloped else 1.0
    return logit, logits, cotangent * slope * logit.scale


@pytest.mark.parametrize("scale", (0.3, "by head"))
def test_logits_and_slopes(scale, without_a_gpu, monkeypatch):
    """Against JAX's own derivative, for each score."""
    monkeypatch.setattr(lookup, "read", lambda table, index, _: table[index])
    q = jnp.zeros((1, 16, 2, 64), jnp.bfloat16)
    shape = (1, 2, 16, 16)
    product, cotangent = jax.random.normal(jax.random.key(0), (2, *shape)) * 3
    scales = scale if isinstance(scale, float) else jnp.asarray([0.3, 0.7])
    kinds = {}

    def both():
        out = {}
        for name, score in _SCORES.items():
            request = make_request(q, q, q, score=score, scale=scales)
            logits = TileOf(request, Block((0, 0, 0, 0), shape), masked=False).logits
            logit, pull = jax.vjp(logits, product)
            want = logit * LOG2E, pull(cotangent)[0]
            x, dx = product[0, 1].T, cotangent[0, 1].T
            kinds[name], *got = _in_a_kernel(request, x, dx)
            out[name] = got, [x[0, 1].T for x in want]
        return out

    for name, (got, want) in compiled(both).items():
        added = scales is scale and name in _ADDED
        assert kinds[name].added == added and kinds[name].pulled == (name in _PULLED)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)


def test_constant_factors_are_one(without_a_gpu):
    """A soft-cap multiplies with constants twice: before and after its tanh."""
    q = jnp.zeros((1, 16, 2, 64), jnp.bfloat16)
    request = make_request(q, q, q, score=eqa.SoftCap(30.0), scale=0.125)
    logit = logit_of(request, 16, 16)
    assert logit.scale == pytest.approx(0.125)
    found = {}

    def visit(x):
        if not is_constant(x):
            found[x.number] = x
            for y in x.inputs:
                visit(y)

    assert logit.term is not None
    for x in logit.term.graph.outputs:
        visit(x)
    names = [getattr(x.primitive, "name", None) for x in found.values()]
    factors = [y for x in found.values() for y in x.inputs if is_constant(y)]
    assert names.count("tanh") == 1 and "div" not in names
    factors = sorted(float(x) for x in factors if x != 1)
    assert factors == pytest.approx([0.125 / 30, 30 * LOG2E])


class _Accumulator:
    """An accumulator of the matrix units."""

    def __init__(self, shape):
        self.shape, self.value = shape, jnp.zeros(shape)

    def __setitem__(self, at, value):
        self.value = value


def _gradients(request, out, lse, dout):
    """`(dq, dk, dv)` of a request of one tile, by the arithmetic of the kernels."""
    q, k, v = request.query, request.key_, request.value
    low, dout, delta = seen_rows(request, out, lse, dout, None)
    work = backward.Work(
        request, low, delta, dout, backward.Blocks(query=16, key=16), 16, stay=False
    )
    inputs = [_Ref(x) for x in work.terms.arrays]
    refs = backward.Refs(*[None] * 9, inputs, (), None, None, None, None)
    results = []
    for head in range(q.shape[2]):
        at = work.at(refs, Place(0, head, 0, 0, (16, 16), 1), work.may_mask)
        # The kernels clean what they multiply gradients with, and so not the values.
        cleaned = (*map(jnp.nan_to_num, (q, dout, k)), v)
        queries, douts, keys, values = (
            jnp.pad(x[0, :, head], ((0, 16 - x.shape[1]), (0, 0))) for x in cleaned
        )
        low, delta = work.lse[0, head], work.delta[0, head]
        accs = _Accumulator((16, 16)), _Accumulator((16, 16))
        work.begin(at, (low, delta), (None, None), accs)
        kept = work.kept(at)
        product = accs[0].value + keys @ queries.T
        weights = work.weights(at, product, low)
        used = backward.dropped(weights, kept)
        weights = work.sloped(at, weights)
        dweights = accs[1].value + values @ douts.T
        ds = work.ds(at, product, weights, dweights, delta, kept)
        dq = (ds.T @ keys)[: q.shape[1]]
        dk = (ds @ queries)[: k.shape[1]]
        results.append((dq * work.scale, dk * work.scale, (used @ douts)[: k.shape[1]]))
    return tuple(jnp.stack(x, 1)[None] for x in zip(*results, strict=True))


def _nan_where_hidden(x, i, j, *_):
    return jnp.tanh(x) * jnp.sqrt((i - j).astype(x.dtype))


_BACKWARD = {
    "plain": {},
    "soft-cap": dict(score=eqa.SoftCap(1.5)),
    "alibi": dict(score=eqa.ALiBi(jnp.asarray([0.5, 0.125]))),
    "dropout": dict(dropout=0.3),
    "all": dict(score=(_SCORES["alibi"], eqa.SoftCap(1.5)), dropout=0.3, length=13),
    "clipped": dict(score=_SCORES["clipped"]),
    "hidden": dict(score=eqa.ScoreFn(_nan_where_hidden), dropout=0.3),
    "no mask": dict(score=_SCORES["gated"], mask=eqa.Full(), length=13),
}


def test_gradients_by_the_arithmetic_of_the_kernels(without_a_gpu, monkeypatch):
    monkeypatch.setattr(backward, "packed", lambda flags: (flags,))
    monkeypatch.setattr(backward, "where", lambda words, x, y: jnp.where(*words, x, y))
    monkeypatch.setattr(plgpu, "load", lambda x, **_: x)
    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
    key = jax.random.key(1)

    def both():
        results = {}
        for name, options in _BACKWARD.items():
            options = {"mask": eqa.Causal(), "key": key, "dropout": 0.0} | options
            shape = (1, options.pop("length", 16), 2, 8)
            q, k, v, dout = jax.random.normal(jax.random.key(0), (4, *shape))
            if name == "hidden":  # The last key is seen by none but the last query.
                options["mask"] = eqa.Causal(offset=-1)
                k, v = (x.at[0, -1].set(jnp.nan) for x in (k, v))

            def attend(q, k, v, options=options):
                return eqa.attend(q, k, v, mechanism="vanilla", return_lse=True, **options)

            (out, lse), pull = jax.vjp(attend, q, k, v)
            want = pull((dout, jnp.zeros_like(lse)))
            request = make_request(q, k, v, **options)
            results[name] = _gradients(request, out, lse, dout), want
        return results

    for name, (got, want) in compiled(both).items():
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)
