"""The entry points: what they refuse, and what they promise beside numbers."""

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention.testing import Shape

from .helpers import assert_close, MECHANISMS, operands, square


Q, K, V = operands(Shape((2,), 5, 7, 4, 2, 8, 6))


def _ids(length):
    return eqa.Segments(jnp.zeros(5, jnp.int32), jnp.zeros(length, jnp.int32))


WRONG_SHAPES_AND_DTYPES = {
    "query": lambda: eqa.attend(Q[0, 0], K, V),
    "key_": lambda: eqa.attend(Q, K[..., :3], V),
    "value": lambda: eqa.attend(Q, K, V[:, :3]),
    "kv_len": lambda: eqa.attend(Q, K, V[:, :3]),
    "batch": lambda: eqa.attend(Q, K[:1], V[:1]),
    "float": lambda: eqa.attend(Q.astype(jnp.int32), K, V),
    "one dtype": lambda: eqa.attend(Q, K.astype(jnp.bfloat16), V),
    "mask.kv_ids": lambda: eqa.attend(Q, K, V, mask=_ids(6)),
    "mask.array": lambda: eqa.attend(Q, K, V, mask=jnp.ones((5, 6), bool)),
    "mask.masks[1].kv_valid": lambda: eqa.attend(
        Q, K, V, mask=eqa.Causal() & eqa.Keys(jnp.ones(3, bool))
    ),
    "mask.kv_lengths": lambda: eqa.attend(Q, K, V, mask=eqa.Padding(jnp.arange(3))),
    "array": lambda: eqa.Dense(jnp.ones((5, 7))),
    "mask": lambda: eqa.attend(Q, K, V, mask=jnp.ones((5, 7))),
    "score[0].slopes": lambda: eqa.attend(Q, K, V, score=eqa.ALiBi.standard(3)),
    "ALiBi.standard(num_heads)": lambda: eqa.ALiBi.standard(True),
    "q_len: expected an integer": lambda: eqa.block_mask(eqa.Causal(), True, 5),
    "sinks": lambda: eqa.attend(Q, K, V, sinks=jnp.zeros(3)),
    "q_positions": lambda: eqa.attend(Q, K, V, q_positions=jnp.arange(6)),
    "kv_positions": lambda: eqa.attend(Q, K, V, kv_positions=jnp.arange(7.0)),
    "scale": lambda: eqa.attend(Q, K, V, scale=jnp.ones(3)),
    "left": lambda: eqa.SlidingWindow(1.5),
    "q_ids": lambda: eqa.Segments(jnp.zeros(3)),
    "config": lambda: eqa.Attention.from_config("auto"),  # pyright: ignore
    "Bias": lambda: eqa.Bias(jnp.ones((5, 7), jnp.int32)),
}

WRONG_VALUES = {
    "q_heads=4 and kv_heads=3": lambda: eqa.attend(
        Q, K[:, :, [0, 0, 0]], V[:, :, [0, 0, 0]]
    ),
    "SlidingWindow(left)": lambda: eqa.SlidingWindow(-1),
    "SlidingWindow(right)": lambda: eqa.SlidingWindow(1, -2),
    "Prefix(length)": lambda: eqa.Prefix(-1),
    "Chunked(size)": lambda: eqa.Chunked(0),
    "SoftCap(cap)": lambda: eqa.SoftCap(0.0),
    "q_len: expected at least 0": lambda: eqa.dropout_mask(
        jax.random.key(0), 0.5, (2,), 4, -1, 3
    ),
    "kv_len: expected at least 0": lambda: eqa.block_mask(eqa.Causal(), 5, -1),
    "scale": lambda: eqa.attend(Q, K, V, scale=0.0),
    "scale: expected a finite number": lambda: eqa.Attention(scale=-1),
    "dropout": lambda: eqa.attend(Q, K, V, dropout=1.0, key=jax.random.key(0)),
    "dropout: expected a rate": lambda: eqa.AttentionConfig(dropout=-0.1),
    "key: expected a PRNG key": lambda: eqa.attend(Q, K, V, dropout=0.1),
    "mechanism": lambda: eqa.attend(Q, K, V, mechanism="flash_attn2"),
    "q_positions": lambda: eqa.attend(Q, K, V, q_positions="middle"),
    "precision": lambda: eqa.attend(Q, K, V, precision="best"),
    "Blockwise(block_q)": lambda: eqa.Blockwise(0),
    "RelativeBias(table)": lambda: eqa.RelativeBias(jnp.ones((3, 4))),
    "RelativeBias(max_distance)": lambda: eqa.RelativeBias(jnp.ones((8, 4)), True, 2),
    "merge(partials)": lambda: eqa.merge([]),
    "documents": lambda: eqa.Segments.from_lengths([3, 4], total=6),
}


@pytest.mark.parametrize("words", list(WRONG_SHAPES_AND_DTYPES))
def test_wrong_shapes_and_dtypes(words):
    with pytest.raises(TypeError) as caught:
        WRONG_SHAPES_AND_DTYPES[words]()
    assert words in str(caught.value) or words in ("kv_len", "batch", "float")


@pytest.mark.parametrize("words", list(WRONG_VALUES))
def test_wrong_values(words):
    with pytest.raises(ValueError) as caught:
        WRONG_VALUES[words]()
    assert words in str(caught.value)


def test_errors_come_when_tracing():
    with pytest.raises(TypeError, match="mask.kv_ids"):
        jax.eval_shape(lambda q: eqa.attend(q, K, V, mask=_ids(6)), Q)


def test_unsupported_says_who_can():
    class Picky(eqa.AbstractMechanism):
        def unsupported(self, request):
            return ("it is Tuesday", "the moon is full")

        def forward(self, request):
            raise AssertionError

        def backward(self, request, out, lse, dout, dlse, wrt):
            raise AssertionError

        def blocks(self, request):
            raise AssertionError

        def explain(self, request):
            return "picky"

    with pytest.raises(eqa.UnsupportedError, match="Tuesday; the moon.*blockwise"):
        eqa.attend(Q, K, V, mechanism=Picky())
    text = eqa.Attention(mechanism=Picky()).explain(Q, K, V)
    assert "refused: it is Tuesday" in text and "vanilla: supported" in text


def _captured_array():
    table = jnp.arange(3)
    return lambda q, k, *_: q >= table[0]


def _captured_tracer(x):
    return eqa.Predicate(lambda q, k, *_: q >= x)


def test_functions_that_capture_arrays():
    table = np.arange(100)
    for fn in (_captured_array(), lambda q, k, *_: jnp.asarray(table)[q] > k):
        with pytest.raises(ValueError, match="captures arrays.*`params`"):
            eqa.Predicate(fn)
    with pytest.raises(ValueError, match="captures arrays"):
        jax.jit(_captured_tracer)(jnp.arange(3)[0])
    with pytest.raises(ValueError, match="captures arrays"):
        eqa.Predicate(jax.jit(lambda q, k, *_: jnp.asarray(table)[q] > k))
    limit = 3
    eqa.Predicate(lambda q, k, *_: q - k < limit)


def test_functions_that_are_not_elementwise():
    with pytest.raises(TypeError, match="elementwise"):
        eqa.Predicate(lambda q, k, *_: jnp.ones((2, 3, 6), bool))
    with pytest.raises(TypeError, match="bool"):
        eqa.Predicate(lambda q, k, *_: q - k)
    with pytest.raises(TypeError, match="floating"):
        eqa.ScoreFn(lambda logit, q, k, *_: q - k)


@pytest.mark.parametrize("name", list(MECHANISMS))
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes(name, dtype):
    q, k, v = square(9, dtype=dtype)
    out, lse = eqa.attend(q, k, v, mechanism=MECHANISMS[name], return_lse=True)
    assert out.dtype == dtype and out.shape == q.shape
    assert lse.dtype == jnp.float32 and lse.shape == (9, 2)


def test_dtype_of_a_config_casts_and_casts_back():
    q, k, v = square(9)
    attention = eqa.Attention(dtype=jnp.bfloat16)
    narrow = eqa.attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert attention(q, k, v).dtype == jnp.float32
    assert_close(attention(q, k, v), narrow.astype(jnp.float32), 1e-2)
    assert not jnp.array_equal(attention(q, k, v), eqa.attend(q, k, v))


@pytest.mark.parametrize("precision", ["default", "highest", jax.lax.Precision.HIGH])
def test_precision_reaches_both_products(precision):
    attention = eqa.Attention(precision=precision, mechanism="vanilla")
    lowered = jax.jit(attention.__call__).lower(*square(9)).as_text()
    name = attention.precision.upper()
    products = lowered.count("stablehlo.dot_general")
    assert products >= 2
    assert lowered.count(f"precision = [{name}, {name}]") == products


@pytest.mark.parametrize("name", list(MECHANISMS))
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(name, lengths):
    q, k, v = operands(Shape((2,), *lengths, 4, 2, 8, 6))
    out, lse = eqa.attend(q, k, v, mechanism=MECHANISMS[name], return_lse=True)
    assert out.shape == (2, lengths[0], 4, 6) and (out == 0).all()
    assert jnp.isneginf(lse).all()


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_rows_that_see_nothing(name):
    mask = eqa.Causal(-2)
    sinks = jnp.arange(4.0)

    def fn(q, k, v, sinks):
        return eqa.attend(
            q, k, v, mask=mask, sinks=sinks, mechanism=MECHANISMS[name], return_lse=True
        )

    out, lse = fn(Q, K, V, None)
    assert (out[:, :2] == 0).all() and jnp.isneginf(lse[:, :2]).all()
    out, lse = fn(Q, K, V, sinks)
    assert (out[:, :2] == 0).all() and (lse[:, :2] == sinks[None, None]).all()

    def loss(q, k, v, sinks):
        out, lse = fn(q, k, v, sinks)
        return out[:, :2].sum() + jnp.where(jnp.isneginf(lse), 0, lse)[:, :2].sum()

    for given in (None, sinks):
        grads = jax.grad(loss, argnums=(0, 1, 2))(Q, K, V, given)
        assert all((g == 0).all() for g in grads)
    assert (jax.grad(loss, argnums=3)(Q, K, V, sinks) == 4).all()


def _first_is_hidden(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return jnp.where(q_pos == 0, -jnp.inf, logit)


@pytest.mark.parametrize("name", list(MECHANISMS))
@pytest.mark.parametrize("positions", ["start", jnp.arange(Q.shape[1])])
def test_rows_of_which_a_score_hides_all_have_no_part_in_gradients(name, positions):
    score = eqa.ScoreFn(_first_is_hidden)

    def fn(q, k, v):
        return eqa.attend(
            q, k, v, score=score, q_positions=positions, mechanism=MECHANISMS[name]
        )

    out, pull = jax.vjp(fn, Q, K, V)
    dout = jnp.ones_like(out)
    expected = pull(dout.at[:, 0].set(0))
    assert_close(pull(dout.at[:, 0].set(jnp.nan)), expected, 0)


@pytest.mark.parametrize("name", list(MECHANISMS))
@pytest.mark.parametrize("score", [(), eqa.SoftCap(2.0), eqa.ALiBi.standard(4)])
def test_keys_that_are_not_seen_may_hold_nan(name, score):
    def fn(q, k, v):
        mask = eqa.Padding(jnp.array([5, 3]))
        return eqa.attend(q, k, v, mask=mask, score=score, mechanism=MECHANISMS[name])

    def poison(x):
        hidden = jnp.arange(7)[None] >= jnp.array([5, 3])[:, None]
        return jnp.where(hidden[..., None, None], jnp.nan, x)

    clean, dirty = (Q, K, V), (Q, poison(K), poison(V))
    assert_close(fn(*dirty), fn(*clean), 1e-6)
    loss = lambda *x: (fn(*x) ** 2).sum()  # noqa: E731
    grads = jax.grad(loss, (0, 1, 2))
    assert_close(grads(*dirty), grads(*clean), 1e-6)
    # Causally, a NaN reaches the rows that see it and no others.
    value = V.at[:, 3].set(jnp.nan)
    out = eqa.attend(Q, K, value, mask=eqa.Causal(), mechanism=MECHANISMS[name])
    assert jnp.isfinite(out[:, :3]).all() and jnp.isnan(out[:, 3:]).all()


def test_stability():
    q, k, v = square(64)
    names = ("vanilla", "blockwise_small")
    whole, tiles = (eqa.attend(1e4 * q, k, v, mechanism=MECHANISMS[name]) for name in names)
    assert jnp.isfinite(whole).all()
    assert_close(whole, tiles, 1e-3)


def test_eager_calls_compile_once():
    q, k, v = (x[None] for x in square(64, heads=4, dim=16))
    traced = []

    def visible(q_pos, kv_pos, *_):
        traced.append(None)
        return q_pos >= kv_pos

    mask = eqa.Predicate(visible)

    def calls():
        eqa.attend(q, k, v, mask=mask, mechanism="blockwise")
        loss = lambda q: eqa.attend(q, k, v, mask=mask, mechanism="blockwise").sum()  # noqa: E731
        jax.grad(loss)(q)
        jax.vmap(lambda q, k, v: eqa.attend(q, k, v, mask=mask))(q, k, v)

    calls()
    count = len(traced)
    calls()
    assert len(traced) == count


def test_configured_and_passed_combine():
    q, k, v = square(12)
    attention = eqa.Attention(mask=eqa.Causal(), score=eqa.SoftCap(1.0))
    bias = eqa.Bias(jnp.linspace(-1.0, 1.0, 144).reshape(12, 12))
    found = attention(q, k, v, mask=eqa.SlidingWindow(3), score=bias)
    both = eqa.Causal() & eqa.SlidingWindow(3)
    expected = eqa.attend(q, k, v, mask=both, score=(eqa.SoftCap(1.0), bias))
    assert (found == expected).all()


def test_inference_defers_to_the_field():
    q, k, v = square(12)
    attention = eqa.Attention(dropout=0.5)
    plain = eqa.attend(q, k, v)
    with pytest.raises(ValueError, match="key"):
        attention(q, k, v)
    assert (eqx.nn.inference_mode(attention)(q, k, v) == plain).all()
    assert (attention(q, k, v, inference=True) == plain).all()
    resumed = eqx.nn.inference_mode(eqx.nn.inference_mode(attention), value=False)
    key = jax.random.key(0)
    assert (resumed(q, k, v, key=key) == attention(q, k, v, key=key)).all()
    assert not (attention(q, k, v, key=key) == plain).all()


def test_weights():
    weights = eqa.attention_weights(Q, K, mask=eqa.Causal(), sinks=jnp.zeros(4))
    assert weights.shape == (2, 4, 5, 7)
    assert (
        (weights > 0) == (jnp.arange(5)[:, None] >= jnp.arange(7)[None])[None, None]
    ).all()
    assert (weights.sum(-1) < 1).all()
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(V, 2, axis=2))
    expected = eqa.attend(Q, K, V, mask=eqa.Causal(), sinks=jnp.zeros(4))
    assert_close(out, expected, 1e-6)


def test_explain():
    text = eqa.Attention().explain(Q, K, V)
    assert text.startswith("vanilla") and "chosen by auto" in text
    long = [jnp.zeros((2048, 4, 8))] * 3
    text = eqa.Attention(mask=eqa.Causal()).explain(*long)
    assert text.startswith("blockwise: 4 × 4 tiles") and "64.0 MiB" in text


def test_numpy_masks_and_positions():
    array = np.tril(np.ones((5, 7), bool))
    expected = eqa.attend(Q, K, V, mask=eqa.Causal())
    assert_close(eqa.attend(Q, K, V, mask=array), expected, 1e-6)
    positions = {"q_positions": np.arange(5), "kv_positions": np.arange(7)}
    assert_close(eqa.attend(Q, K, V, mask=eqa.Causal(), **positions), expected, 1e-6)


def test_printing():
    mask = (eqa.Causal() | eqa.Prefix(4)) & ~eqa.SlidingWindow(255, None)
    expected = (
        "((Causal(offset=0) | Prefix(length=4)) & ~SlidingWindow(left=255, right=None))"
    )
    assert " ".join(repr(mask).split()) == expected
    assert repr(eqa.SoftCap(30.0)) == "SoftCap(cap=30.0)"
    assert "mask=Causal(offset=0)" in repr(eqa.AttentionConfig(mask=eqa.Causal()))


def test_configs_are_values():
    make = lambda: eqa.AttentionConfig(mask=eqa.Causal() & eqa.SlidingWindow(255))  # noqa: E731
    assert make() == make() and hash(make()) == hash(make())
    assert make() != eqa.AttentionConfig(mask=eqa.Causal())
    assert jax.tree.leaves(make()) == []
    with pytest.raises(AttributeError):
        make().dropout = 0.5


def _hide(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return jnp.where(kv_feature, logit, -jnp.inf)


@pytest.mark.parametrize("name", list(MECHANISMS))
@pytest.mark.parametrize("mask", [eqa.Full(), eqa.Causal(20)])
def test_keys_hidden_by_a_score_may_hold_nan(name, mask):
    seen = jnp.arange(7) < 4
    score = (eqa.SoftCap(2.0), eqa.ScoreFn(_hide, kv_features=seen))
    poison = lambda x: jnp.where(seen[None, :, None, None], x, jnp.nan)  # noqa: E731

    def loss(q, k, v):
        mechanism = MECHANISMS[name]
        return (eqa.attend(q, k, v, mask=mask, score=score, mechanism=mechanism) ** 2).sum()

    both = jax.value_and_grad(loss, argnums=(0, 1, 2))
    assert_close(both(Q, poison(K), poison(V)), both(Q, K, V), 1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_values_that_are_seen_and_not_finite(bad):
    """Reach the rows and channels that they should, on every mechanism alike."""
    value = V.at[:, 2, :, 0].set(bad)
    for mask in (eqa.Full(), eqa.Causal()):
        outs = [
            eqa.attend(Q, K, value, mask=mask, mechanism=m) for m in MECHANISMS.values()
        ]
        first = 0 if isinstance(mask, eqa.Full) else 2
        for out in outs:
            assert jnp.isfinite(out[:, :first]).all() and jnp.isfinite(out[..., 1:]).all()
            hit = out[:, first:, :, 0]
            assert (jnp.isnan(hit) if jnp.isnan(bad) else hit == bad).all()


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_offsets_as_large_as_integers(name):
    far = 2**31 - 1
    full = eqa.attend(Q, K, V)
    for mask in (eqa.Causal(far), eqa.SlidingWindow(far, far), eqa.Causal(jnp.array(far))):
        assert_close(eqa.attend(Q, K, V, mask=mask, mechanism=MECHANISMS[name]), full, 1e-6)
    with pytest.raises(ValueError, match=r"Causal\(offset\).*32-bit"):
        eqa.Causal(2**31)


def test_nothing_to_do_is_checked_all_the_same():
    with pytest.raises(TypeError, match="mask.kv_valid"):
        eqa.attend(Q, K[:, :0], V[:, :0], mask=eqa.Keys(jnp.ones(5, bool)))
    assert eqa.attention_weights(Q, K[:, :0]).shape == (2, 4, 5, 0)
    assert eqa.Attention().explain(Q, K[:, :0], V[:, :0]).startswith("empty")
    out, lse = eqa.attend(Q, K, V[..., :0], return_lse=True)
    assert out.shape == (2, 5, 4, 0) and jnp.isfinite(lse).all()


def test_partials_of_different_shapes():
    one = eqa.attend(Q, K, V, return_lse=True)
    two = eqa.attend(Q[:, :3], K, V, return_lse=True)
    with pytest.raises(TypeError, match="partials"):
        eqa.merge([one, two])
