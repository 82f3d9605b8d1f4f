"""The conformance kit is itself held to what can be worked out by hand."""

import functools
import math

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import testing
from eqx_attention.testing import Case, check, Shape
from eqx_attention.testing._reference import t5_bucket


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


#
# Masks, pair by pair
#


_Q, _K = 5, 7
_q_ids = np.array([[0, 0, 1, 1, 2], [3, 1, 1, 0, 0]])
_kv_ids = np.array([[0, 1, 1, 1, 2, 2, 4], [0, 0, 0, 1, 1, 3, 3]])
_valid = np.array([[1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 1]])
_q_valid = np.array([1, 1, 0, 1, 0])
_dense = np.random.default_rng(0).random((2, 1, _Q, _K)) < 0.5


def _every_other(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return ((q_pos + kv_pos + head) % 2 == 0) | (q_feature < kv_feature + params)


# Each mask, and the same as a function of (batch, head, query index, key index, query
# position, key position).
_PAIRS = {
    "full": (eqa.Full(), lambda b, h, i, j, q, k: True),
    "causal": (eqa.Causal(), lambda b, h, i, j, q, k: k <= q),
    "causal offset": (eqa.Causal(-2), lambda b, h, i, j, q, k: k <= q - 2),
    "causal array": (
        eqa.Causal(jnp.array(1, jnp.int32)),
        lambda b, h, i, j, q, k: k <= q + 1,
    ),
    "window": (
        eqa.SlidingWindow(2, 1),
        lambda b, h, i, j, q, k: q - 2 <= k <= q + 1,
    ),
    "window left": (eqa.SlidingWindow(1), lambda b, h, i, j, q, k: k in (q - 1, q)),
    "window right": (
        eqa.SlidingWindow(None, 2),
        lambda b, h, i, j, q, k: k <= q + 2,
    ),
    "window unbounded": (
        eqa.SlidingWindow(3, None),
        lambda b, h, i, j, q, k: k >= q - 3,
    ),
    "window arrays": (
        eqa.SlidingWindow(jnp.array([0, 2], jnp.int32), jnp.array([1, 0], jnp.int32)),
        lambda b, h, i, j, q, k: q - (0, 2)[b] <= k <= q + (1, 0)[b],
    ),
    "prefix": (eqa.Prefix(3), lambda b, h, i, j, q, k: k < 3),
    "prefix lm": (eqa.PrefixLM(2), lambda b, h, i, j, q, k: k < 2 or k <= q),
    "chunked": (
        eqa.Chunked(3),
        lambda b, h, i, j, q, k: math.floor(q / 3) == math.floor(k / 3),
    ),
    "segments": (
        eqa.Segments(jnp.asarray(_q_ids, jnp.int32), jnp.asarray(_kv_ids, jnp.int32)),
        lambda b, h, i, j, q, k: _q_ids[b, i] == _kv_ids[b, j],
    ),
    "padding": (
        eqa.Padding(jnp.array([4, 0], jnp.int32), jnp.array([5, 3], jnp.int32)),
        lambda b, h, i, j, q, k: j < (4, 0)[b] and i < (5, 3)[b],
    ),
    "keys": (
        eqa.Keys(jnp.asarray(_valid, jnp.int32), jnp.asarray(_q_valid, jnp.int32)),
        lambda b, h, i, j, q, k: bool(_valid[b, j] and _q_valid[i]),
    ),
    "dense": (
        eqa.Dense(jnp.asarray(_dense)),
        lambda b, h, i, j, q, k: _dense[b, 0, i, j],
    ),
    "bare array": (jnp.asarray(_dense), lambda b, h, i, j, q, k: _dense[b, 0, i, j]),
    "predicate": (
        eqa.Predicate(
            _every_other,
            q_features=jnp.asarray(_q_ids, jnp.int32),
            kv_features=jnp.asarray(_kv_ids, jnp.int32),
            params=jnp.array(-1, jnp.int32),
        ),
        lambda b, h, i, j, q, k: (q + k + h) % 2 == 0 or _q_ids[b, i] < _kv_ids[b, j] - 1,
    ),
    "and": (
        eqa.Causal() & eqa.Chunked(2),
        lambda b, h, i, j, q, k: k <= q and q // 2 == k // 2,
    ),
    "or": (
        eqa.Prefix(1) | eqa.Dense(jnp.asarray(_dense)),
        lambda b, h, i, j, q, k: k < 1 or _dense[b, 0, i, j],
    ),
    "not": (
        ~(eqa.Causal() | eqa.Prefix(2)),
        lambda b, h, i, j, q, k: not (k <= q or k < 2),
    ),
}

_POSITIONS = {
    "start": ("start", None, lambda b, i: i, lambda b, j: j),
    "end": ("end", None, lambda b, i: i + _K - _Q, lambda b, j: j),
    "arrays": (
        jnp.array([[-3, 0, 0, 5, 2], [1, 2, 3, 4, 5]], jnp.int32),
        jnp.array([4, 3, 2, 1, 0, -1, -2], jnp.int32),
        lambda b, i: ((-3, 0, 0, 5, 2), (1, 2, 3, 4, 5))[b][i],
        lambda b, j: 4 - j,
    ),
    "end of an array": (
        "end",
        jnp.arange(10, 10 + _K, dtype=jnp.int32),
        lambda b, i: i + 10 + _K - _Q,
        lambda b, j: 10 + j,
    ),
}


@pytest.mark.parametrize("positions", _POSITIONS)
@pytest.mark.parametrize("name", _PAIRS)
def test_masks_pair_by_pair(name, positions):
    mask, visible = _PAIRS[name]
    q_positions, kv_positions, q_of, kv_of = _POSITIONS[positions]
    got = testing.visible_pairs(
        mask, (2,), 3, _Q, _K, q_positions=q_positions, kv_positions=kv_positions
    )
    assert got.shape == (2, 3, _Q, _K)
    for b, h, i, j in np.ndindex(got.shape):
        expected = visible(b, h, i, j, q_of(b, i), kv_of(b, j))
        assert got[b, h, i, j] == expected, (b, h, i, j)


def test_block_masks_are_known():
    mask = eqa.block_mask(eqa.Causal(), 8, 8)
    got = testing.visible_pairs(mask, (), 2, 8, 8)
    assert (got == np.tri(8, dtype=bool)).all()


def test_positions_by_an_unknown_name():
    with pytest.raises(ValueError, match="'middle'"):
        testing.visible_pairs(eqa.Full(), (), 1, 2, 2, q_positions="middle")


def test_t5_buckets():
    def bucket(distance, **kwargs):
        return int(t5_bucket(jnp.array([distance], jnp.int32), **kwargs)[0])

    both = dict(num_buckets=32, bidirectional=True, max_distance=128)
    known = {0: 0, -1: 1, 1: 17, -7: 7, 8: 24, -16: 10, 64: 30, -127: 15, 5000: 31}
    assert {d: bucket(d, **both) for d in known} == known
    past = dict(num_buckets=32, bidirectional=False, max_distance=128)
    known = {0: 0, 1: 0, -15: 15, -16: 16, -20: 17, -127: 31, -128: 31, -9999: 31}
    assert {d: bucket(d, **past) for d in known} == known


#
# The reference, in loops
#


def _inputs(seed=0, batch=2, q_len=4, kv_len=6, q_heads=4, kv_heads=2, dim=3, v_dim=5):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((batch, q_len, q_heads, dim))
    key_ = rng.standard_normal((batch, kv_len, kv_heads, dim))
    value = rng.standard_normal((batch, kv_len, kv_heads, v_dim))
    return query, key_, value


def _loops(query, key_, value, visible, logit, sinks=None, scale=None, weight=None):
    """Attention without an array operation. `logit(x, b, h, i, j)` is the score."""
    batch, q_len, q_heads, dim = query.shape
    _, kv_len, kv_heads, v_dim = value.shape
    out = np.zeros((batch, q_len, q_heads, v_dim))
    lse = np.full((batch, q_len, q_heads), -np.inf)
    for b, i, h in np.ndindex(batch, q_len, q_heads):
        group = h // (q_heads // kv_heads)
        numbers = {}
        for j in range(kv_len):
            if visible(b, h, i, j):
                x = sum(query[b, i, h, d] * key_[b, j, group, d] for d in range(dim))
                x *= dim**-0.5 if scale is None else scale[h]
                numbers[j] = math.exp(logit(x, b, h, i, j))
        total = sum(numbers.values()) + (0 if sinks is None else math.exp(sinks[h]))
        if total > 0:
            lse[b, i, h] = math.log(total)
        for j, number in numbers.items() if total > 0 else ():
            kept = 1 if weight is None else weight[b, h, i, j]
            out[b, i, h] += number / total * kept * value[b, j, group]
    return out, lse


def _scaled(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    added = q_feature * kv_feature + jnp.take(params["b"], head)
    return logit * params["a"].astype(logit.dtype) + added.astype(logit.dtype)


_bias = np.random.default_rng(1).standard_normal((1, 4, 4, 6))
_bias[0, 1, 2] = -np.inf
_slopes = np.array([0.1, 0.2, 0.3, 0.4])
_table = np.random.default_rng(2).standard_normal((8, 4))
_q_feature = np.random.default_rng(3).standard_normal((2, 4))
_kv_feature = np.random.default_rng(4).standard_normal(6)

_LOOPS = {
    "nothing": ((), lambda x, b, h, i, j: x),
    "alibi": (
        lambda: eqa.ALiBi(jnp.asarray(_slopes)),
        lambda x, b, h, i, j: x - _slopes[h] * abs(i - j),
    ),
    "soft cap": (
        lambda: eqa.SoftCap(0.7),
        lambda x, b, h, i, j: 0.7 * math.tanh(x / 0.7),
    ),
    "relative bias": (
        lambda: eqa.RelativeBias(jnp.asarray(_table), bidirectional=True, max_distance=16),
        # Of 8 buckets 4 are for each side: distances 0, 1, [2, 5] and more.
        lambda x, b, h, i, j: (
            x + _table[min(abs(j - i), 2) + (abs(j - i) > 5) + 4 * (j > i), h]
        ),
    ),
    "bias": (
        lambda: eqa.Bias(jnp.asarray(_bias)),
        lambda x, b, h, i, j: x + _bias[0, h, i, j],
    ),
    "function": (
        lambda: eqa.ScoreFn(
            _scaled,
            q_features=jnp.asarray(_q_feature),
            kv_features=jnp.asarray(_kv_feature),
            params={"a": jnp.asarray(0.5), "b": jnp.asarray(_slopes)},
        ),
        lambda x, b, h, i, j: 0.5 * x + _q_feature[b, i] * _kv_feature[j] + _slopes[h],
    ),
    "two": (
        lambda: (eqa.SoftCap(0.7), eqa.ALiBi(jnp.asarray(_slopes))),
        lambda x, b, h, i, j: 0.7 * math.tanh(x / 0.7) - _slopes[h] * abs(i - j),
    ),
}


@pytest.mark.parametrize("score", _LOOPS)
def test_reference_is_what_loops_compute(score, x64):
    query, key_, value = map(jnp.asarray, _inputs())
    make, logit = _LOOPS[score]
    got = testing.reference(
        query,
        key_,
        value,
        mask=eqa.Causal(-1),
        score=make() if callable(make) else make,
        return_lse=True,
    )
    expected = _loops(*_inputs(), lambda b, h, i, j: j <= i - 1, logit)
    assert got[0].dtype == got[1].dtype == jnp.float64
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=1e-14)


def test_reference_with_sinks_scale_and_dropout(x64, key):
    query, key_, value = map(jnp.asarray, _inputs())
    sinks, scale = np.array([0.5, -1.0, 2.0, 0.0]), np.array([1.0, 0.1, -0.3, 0.7])
    kept = eqa.dropout_mask(key, 0.4, (2,), 4, 4, 6)
    got = testing.reference(
        query,
        key_,
        value,
        mask=eqa.Prefix(4),
        sinks=jnp.asarray(sinks),
        scale=jnp.asarray(scale),
        dropout=0.4,
        key=key,
        return_lse=True,
    )
    expected = _loops(
        *_inputs(),
        lambda b, h, i, j: j < 4,
        lambda x, b, h, i, j: x,
        sinks,
        scale,
        np.asarray(kept) / 0.6,
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=1e-14)


def test_reference_by_hand():
    query = jnp.array([[[2.0]]])  # one query, one head, one dimension
    key_ = jnp.array([[[0.0]], [[1.0]], [[5.0]]])
    value = jnp.array([[[1.0]], [[3.0]], [[100.0]]])
    attend = functools.partial(testing.reference, query, key_, value, return_lse=True)
    out, lse = attend(mask=eqa.Prefix(2))
    e = math.exp(2)
    assert float(out[0, 0, 0]) == pytest.approx((1 + 3 * e) / (1 + e), abs=1e-15)
    assert float(lse[0, 0]) == pytest.approx(math.log(1 + e), abs=1e-15)
    out, lse = attend(mask=eqa.Prefix(2), sinks=jnp.array([1.0]), scale=0.5)
    assert float(out[0, 0, 0]) == pytest.approx(
        (1 + 3 * math.e) / (1 + 2 * math.e), abs=1e-15
    )
    assert float(lse[0, 0]) == pytest.approx(math.log(1 + 2 * math.e), abs=1e-15)
    out, lse = attend(mask=~eqa.Full())
    assert (float(out[0, 0, 0]), float(lse[0, 0])) == (0, -math.inf)
    out, lse = attend(mask=~eqa.Full(), sinks=jnp.array([1.5]))
    assert (float(out[0, 0, 0]), float(lse[0, 0])) == (0, 1.5)


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reference_is_in_double_precision_whatever_comes(ambient, dtype):
    inputs = [jnp.asarray(x, dtype) for x in _inputs()]
    exact = [np.asarray(x).astype(np.float64) for x in inputs]
    expected, _ = _loops(*exact, lambda b, h, i, j: True, lambda x, b, h, i, j: x)
    with jax.enable_x64(ambient):
        out = testing.reference(*inputs)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-14)


#
# The reference's gradients
#


def test_gradients_against_finite_differences(x64, key):
    query, key_, value = map(jnp.asarray, _inputs())
    arguments = dict(
        query=query,
        key_=key_,
        value=value,
        score=(
            eqa.SoftCap(jnp.asarray(1.1)),
            _LOOPS["function"][0](),
            _LOOPS["relative bias"][0](),
            _LOOPS["alibi"][0](),
            _LOOPS["bias"][0](),
        ),
        sinks=jnp.asarray(_slopes),
        scale=jnp.asarray(_slopes),
    )
    others = dict(mask=eqa.Causal(1), dropout=0.3, key=key, q_positions="end")
    rng = np.random.default_rng(5)
    dout = jnp.asarray(rng.standard_normal((2, 4, 4, 5)))
    dlse = jnp.asarray(rng.standard_normal((2, 4, 4)))
    inexact, rest = eqx.partition(arguments, eqx.is_inexact_array)

    def call(inexact):
        return testing.reference(**eqx.combine(inexact, rest), **others, return_lse=True)

    def loss(inexact):
        out, lse = call(inexact)
        return jnp.sum(out * dout) + jnp.sum(jnp.where(lse > -jnp.inf, lse * dlse, 0.0))

    got = testing.reference_gradients(**arguments, **others, dout=dout, dlse=dlse)
    assert set(got.arguments) == set(arguments)
    assert jax.tree.structure(got.arguments) == jax.tree.structure(inexact)
    for name in arguments:
        direction = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape)), inexact[name]
        )
        moved = [
            {
                **inexact,
                name: jax.tree.map(lambda x, d: x + s * d, inexact[name], direction),
            }
            for s in (1e-5, -1e-5)
        ]
        slope = float(loss(moved[0]) - loss(moved[1])) / 2e-5
        products = jax.tree.map(
            lambda g, d: float(jnp.sum(g * d)), got.arguments[name], direction
        )
        assert sum(jax.tree.leaves(products)) == pytest.approx(slope, rel=1e-7), name
    # And so is `jax.grad` of the reference, where double precision is enabled.
    by_jax = jax.grad(loss)(inexact)
    for x, y in zip(jax.tree.leaves(by_jax), jax.tree.leaves(got.arguments), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_empty_rows_and_hidden_nans():
    query, key_, value = (jnp.asarray(x, jnp.float32) for x in _inputs())
    key_, value = (x.at[:, 3:].set(jnp.nan) for x in (key_, value))
    q_valid = jnp.array([True, False, True, True])
    mask = eqa.Keys(jnp.arange(6) < 3, q_valid)
    got = testing.reference_gradients(
        query,
        key_,
        value,
        mask=mask,
        sinks=None,
        dout=jnp.ones((2, 4, 4, 5)),
        dlse=jnp.ones((2, 4, 4)),
    )
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(got))
    assert (got.out[:, 1] == 0).all() and (got.lse[:, 1] == -np.inf).all()
    assert (got.arguments["query"][:, 1] == 0).all()
    assert (got.arguments["key_"][:, 3:] == 0).all()
    assert (got.arguments["value"][:, 3:] == 0).all()
    assert (got.arguments["value"][:, :3] != 0).all()


#
# Cases
#


def test_cases_are_reproducible_and_cover_everything():
    cases = testing.cases(60)
    assert [c.name for c in testing.cases(7)] == [c.name for c in cases[:7]]
    assert [c.name for c in testing.cases(7, seed=1)] != [c.name for c in cases[:7]]
    assert len({c.name for c in cases}) == len(cases)
    masks, scores = str([c.mask for c in cases]), str([c.score for c in cases])
    assert all(repr(name) in masks for name in testing.MASKS)
    assert all(repr(name) in scores for name in testing.SCORES)
    assert {c.shape for c in cases} == set(testing.SHAPES)
    for field in ("sinks", "scale", "dropout", "return_lse", "poison"):
        assert len({getattr(c, field) for c in cases}) > 1, field
    positions = {"start", "end", "shifted", "permuted", "repeated", "batched"}
    assert {c.q_positions for c in cases} == positions
    assert {c.kv_positions for c in cases} == positions - {"end"}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_cases_build_the_same_arrays_each_time(dtype):
    case = Case(
        "everything",
        mask=("or", ("not", "dense_keys"), ("and", "window_arrays", "padding")),
        score=("bias", eqa.SoftCap(2.0)),
        shape=Shape((2,), 3, 5, 4, 2, 6, 7),
        dtype=dtype,
        q_positions="batched",
        kv_positions="permuted",
        sinks=True,
        scale="array",
        dropout=0.2,
        poison=True,
        seed=3,
    )
    one, two = case.build(), case.build()
    arrays = [
        jax.tree.leaves(eqx.filter(x._replace(options=None), eqx.is_array))
        for x in (one, two)
    ]
    for x, y in zip(*arrays, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert one.query.shape == (2, 3, 4, 6) and one.query.dtype == jnp.dtype(dtype)
    assert one.value.shape == (2, 5, 2, 7) and one.dout.shape == (2, 3, 4, 7)
    learned = jnp.float64 if dtype == "float64" else jnp.float32
    assert one.options["sinks"].dtype == one.options["scale"].dtype == learned


def test_poison_is_only_where_nobody_looks():
    case = Case("poison", mask="padding", shape="square", poison=True, seed=1)
    inputs = case.build()
    lengths = np.asarray(inputs.options["mask"].kv_lengths)
    for b, length in enumerate(lengths):
        hidden = np.isnan(np.asarray(inputs.key_[b])).all(axis=(1, 2))
        assert (hidden == (np.arange(16) >= length)).all()


@pytest.mark.parametrize(
    "fields",
    [{"mask": "casual"}, {"score": ("alibis",)}, {"shape": "oblong"}, {"scale": "vector"}],
)
def test_cases_with_unknown_names(fields):
    with pytest.raises(ValueError, match="expected one of"):
        Case("unknown", **fields).build()


#
# Check
#


def right(query, key_, value, *, mask, return_lse=False, **options):
    """The reference, as a function to be checked."""
    out, lse = testing.reference(query, key_, value, mask=mask, return_lse=True, **options)
    real = "float64" if query.dtype == jnp.float64 else "float32"
    out, lse = out.astype(query.dtype), lse.astype(real)
    return (out, lse) if return_lse else out


_TINY = Shape((2,), 4, 6, 4, 2, 3, 5)
_WRONGED = (
    Case("causal", mask="causal", shape=_TINY, dtype="float64"),
    Case("empty", mask=eqa.Causal(-2), shape=_TINY, dtype="float64"),
    Case("full", shape=_TINY, dtype="float64", sinks=True),
)


def ignores_the_mask(query, key_, value, *, mask, **options):
    return right(query, key_, value, mask=eqa.Full(), **options)


def averages_where_nothing_is_visible(query, key_, value, *, return_lse, **options):
    out, lse = right(query, key_, value, return_lse=True, **options)
    mean = jnp.repeat(jnp.mean(value, axis=-3, keepdims=True), 2, axis=-2)
    return jnp.where(jnp.isneginf(lse)[..., None], mean, out), lse


def drops_the_gradient_of_lse(*args, return_lse, **options):
    out, lse = right(*args, return_lse=True, **options)
    return out, jax.lax.stop_gradient(lse)


def casts_lse(*args, return_lse, **options):
    out, lse = right(*args, return_lse=True, **options)
    return out, lse.astype(jnp.float32)


def ignores_sinks(*args, sinks=None, **options):
    return right(*args, **options)


def interleaves_heads(query, key_, value, **options):
    return right(query, key_[..., ::-1, :], value[..., ::-1, :], **options)


def computes_in_single_precision(query, key_, value, **options):
    key_ = key_.astype(jnp.float32).astype(jnp.float64)
    return right(query, key_, value, **options)


def returns_nan(query, key_, value, **options):
    return jax.tree.map(lambda x: x * jnp.nan, right(query, key_, value, **options))


def returns_another_shape(*args, **options):
    return jax.tree.map(lambda x: x[None], right(*args, **options))


def raises(*args, **options):
    raise ValueError("no, thank you")


@pytest.mark.parametrize(
    "fn, failing, because",
    [
        (right, {}, ""),
        (ignores_the_mask, {"causal", "empty"}, "out"),
        (averages_where_nothing_is_visible, {"empty"}, "out is wrong where no key"),
        (drops_the_gradient_of_lse, {"causal", "empty", "full"}, "dquery"),
        (casts_lse, {"causal", "empty", "full"}, "lse has dtype float32"),
        (ignores_sinks, {"full"}, "dsinks"),
        (interleaves_heads, {"causal", "empty", "full"}, "dvalue"),
        (computes_in_single_precision, {"causal", "empty", "full"}, "out"),
        (returns_nan, {"causal", "empty", "full"}, "out has NaN"),
        (returns_another_shape, {"causal", "empty", "full"}, "out has shape"),
        (raises, {"causal", "empty", "full"}, "ValueError: no, thank you"),
    ],
)
def test_check_finds_what_is_wrong(fn, failing, because):
    report = check(fn, cases=_WRONGED, jit=False)
    assert {o.case.name for o in report.failures} == set(failing)
    assert len(report.passed) == 3 - len(failing) and not report.unsupported
    assert report.name == fn.__name__
    if failing:
        with pytest.raises(AssertionError, match=because):
            report.raise_on_failure()
        assert because in str(report.failures[0])
    else:
        assert report.raise_on_failure() is report
    assert f"{len(failing)} failed" in str(report).splitlines()[-1]


def test_only_the_gradients_are_wrong():
    report = check(drops_the_gradient_of_lse, cases=_WRONGED[:1], jit=False)
    (outcome,) = report.failures
    wrong = {c.name for c in outcome.comparisons if not c.ok}
    assert wrong == {"dquery", "dkey_"}
    names = [c.name for c in outcome.comparisons]
    assert sorted(names) == ["dkey_", "dquery", "dvalue", "lse", "out"]
    check(
        drops_the_gradient_of_lse, cases=_WRONGED, gradients=False, jit=False
    ).raise_on_failure()


def test_what_is_refused_is_not_a_failure():
    def no_sinks(query, key_, value, *, mask, return_lse=False):
        if isinstance(mask, eqa.Causal):
            raise eqa.UnsupportedError("causal masks are for others")
        return right(query, key_, value, mask=mask, return_lse=return_lse)

    report = check(no_sinks, cases=[*_WRONGED, Case("fine", dtype="float64")], jit=False)
    assert [o.case.name for o in report.unsupported] == ["causal", "empty", "full"]
    assert "causal masks are for others" in str(report)
    assert "it has no argument sinks" in str(report)
    assert [o.case.name for o in report.raise_on_failure().passed] == ["fine"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_measured_against_plain_attention(dtype):
    def coarse(bits, query, key_, value, *, mask, return_lse):
        out, lse = right(query, key_, value, mask=mask, return_lse=True)
        noise = 1 + 2.0**-bits * jnp.sign(jnp.sin(100 * lse))[..., None]
        return (out.astype(jnp.float32) * noise).astype(query.dtype), lse

    case = Case("low", mask="causal", shape="square", dtype=dtype)
    bits = {"bfloat16": 8, "float16": 11}[dtype]
    kwargs = dict(cases=[case], gradients=False, jit=False)
    check(right, **kwargs).raise_on_failure()
    check(functools.partial(coarse, bits + 1), **kwargs).raise_on_failure()
    assert check(functools.partial(coarse, bits - 5), **kwargs).failures


def test_check_wants_something_to_check():
    with pytest.raises(TypeError, match="3"):
        check(3, cases=1)


#
# Our own mechanisms (all of them, on many more cases, are another file's subject)
#


@pytest.mark.parametrize(
    "mechanism", ["auto", "vanilla", "blockwise", eqa.Blockwise(block_q=8, block_k=8)]
)
def test_mechanisms(mechanism):
    cases = [
        Case(
            "much",
            mask=("or", ("not", "causal"), "segments"),
            score=("alibi", "soft_cap_array"),
            shape="primes",
            dtype="float64",
            q_positions="end",
            sinks=True,
            scale="array",
            dropout=0.1,
        ),
        Case("low", mask="window", shape="two_batch_axes", dtype="bfloat16"),
    ]
    report = check(mechanism, cases=cases)
    assert len(report.raise_on_failure().passed) == 2


def test_value_and_grad_difference():
    sizes = dict(batch=1, heads=2, q_len=8, kv_len=16, head_dim=4)
    difference = functools.partial(testing.value_and_grad_difference, **sizes)
    assert eqa.value_and_grad_difference is testing.value_and_grad_difference
    assert difference("vanilla", "vanilla") == (0, (0, 0, 0))

    def twice(query, key_, value, *, mask):
        return 2 * eqa.attend(query, key_, value, mask=mask, mechanism="vanilla")

    o, (dq, dk, dv) = difference("vanilla", twice)
    assert min(o, dq, dk, dv) > 0.01
    assert difference(twice, twice, key_mask=False, seed=1) == (0, (0, 0, 0))
    masks = []

    def looks(query, key_, value, *, mask):
        masks.append(mask)
        return twice(query, key_, value, mask=mask)

    difference(looks, looks)
    difference(looks, looks, key_mask=False)
    assert [type(m) for m in masks] == [eqa.Keys] * 2 + [eqa.Full] * 2
    with pytest.raises(TypeError):
        difference(1, 2)
