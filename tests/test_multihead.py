"""MultiheadAttention: equinox's in all that is old, and right in all that is new."""

import io
import itertools as it
from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from eqx_attention import MultiheadAttention

from .helpers import compiled, fast_jit


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


_close = lambda a, b, atol=1e-5: np.testing.assert_allclose(a, b, atol=atol)  # noqa: E731


def _inputs(q_seq=5, kv_seq=7, query_size=12, key_size=None, value_size=None):
    keys = jr.split(jr.key(7), 3)
    return (
        jr.normal(keys[0], (q_seq, query_size)),
        jr.normal(keys[1], (kv_seq, key_size or query_size)),
        jr.normal(keys[2], (kv_seq, value_size or query_size)),
    )


_sizes = (
    dict(),
    dict(key_size=5, value_size=6, output_size=9, qk_size=7, vo_size=8),
    dict(output_size=3),
    dict(qk_size=2, vo_size=5),
)


@pytest.mark.parametrize(
    "num_heads, sizes", [(1, _sizes[0]), *((3, sizes) for sizes in _sizes[1:])]
)
def test_equinox(num_heads, sizes, key):
    x = _inputs(key_size=sizes.get("key_size"), value_size=sizes.get("value_size"))
    mask2 = jr.bernoulli(jr.key(1), 0.6, (5, 7)).at[:, 0].set(True)
    mask3 = jr.bernoulli(jr.key(2), 0.6, (num_heads, 5, 7)).at[..., 0].set(True)
    # All biases with one of the sizes, and each of them on and off with the others.
    biases = list(it.product((False, True), repeat=4))
    biases = biases if sizes == _sizes[1] and num_heads == 3 else biases[::5]
    for bias, mask in zip(biases, it.cycle((None, mask2, mask3))):
        args = (num_heads, 12, *sizes.values()) if len(sizes) == 5 else (num_heads, 12)
        kwargs = {} if len(sizes) == 5 else sizes
        kwargs = kwargs | dict(
            use_query_bias=bias[0],
            use_key_bias=bias[1],
            use_value_bias=bias[2],
            use_output_bias=bias[3],
        )
        theirs = eqx.nn.MultiheadAttention(*args, **kwargs, key=key)
        ours = MultiheadAttention(*args, **kwargs, key=key)
        # The same parameters, in the same order.
        old, new = jax.tree.leaves(theirs), jax.tree.leaves(ours)
        assert eqx.tree_equal(old, new)
        for name, value in vars(theirs).items():
            if isinstance(value, int):
                assert getattr(ours, name) == value
        _close(ours(*x, mask), theirs(*x, mask))


def test_equinox_file(key):
    """A file that equinox wrote of its module is one of ours."""
    theirs = eqx.nn.MultiheadAttention(3, 12, use_key_bias=True, dropout_p=0.3, key=key)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, theirs)
    file.seek(0)
    ours = MultiheadAttention(3, 12, use_key_bias=True, key=jr.key(9))
    ours = eqx.tree_deserialise_leaves(file, ours)
    x = _inputs()
    _close(ours(*x, inference=True), theirs(*x, inference=True))
    assert ours.dropout.p == 0.3 and ours.attention.dropout == 0.3


def test_equinox_gradients(key):
    x = _inputs()
    kwargs = dict(use_query_bias=True, use_output_bias=True, key=key)
    theirs = eqx.nn.MultiheadAttention(3, 12, **kwargs)
    ours = MultiheadAttention(3, 12, **kwargs)
    grad = eqx.filter_jit(eqx.filter_grad(lambda mx: jnp.sum(mx[0](*mx[1]) ** 2)))
    for a, b in zip(*(jax.tree.leaves(grad((m, x))) for m in (theirs, ours))):
        _close(a, b, atol=1e-4)


def test_no_visible_key(key):
    """Where equinox returns the mean of the values."""
    mha = MultiheadAttention(3, 12, use_output_bias=True, key=key)
    x = _inputs()
    out = mha(*x, jnp.ones((5, 7), bool).at[2].set(False))
    assert jnp.array_equal(out[2], mha.output_proj.bias)
    _close(out[0], mha(*x)[0])


def test_numpy_mask(key):
    mha = MultiheadAttention(3, 12, key=key)
    x = _inputs()
    mask = np.arange(35).reshape(5, 7) % 3 > 0
    _close(mha(*x, mask), mha(*x, jnp.array(mask)))


def test_dropout(key):
    mha = MultiheadAttention(3, 12, dropout_p=0.5, key=key)
    x = _inputs()
    plain = MultiheadAttention(3, 12, key=key)(*x)
    out = mha(*x, key=key)
    assert jnp.array_equal(out, mha(*x, key=key))
    assert not jnp.allclose(out, plain)
    assert not jnp.allclose(out, mha(*x, key=jr.key(3)))
    _close(mha(*x, inference=True), plain)
    inference = eqx.nn.inference_mode(mha)
    _close(inference(*x), plain)
    assert inference.attention.inference
    _close(inference(*x, key=key, inference=False), out)
    _close(MultiheadAttention(3, 12, dropout_p=0.5, inference=True, key=key)(*x), plain)
    with pytest.raises(ValueError, match="key"):
        mha(*x)
    # In the configuration, or in a module: the same.
    for attention in (
        eqa.Attention(dropout=0.5),
        eqa.AttentionConfig(dropout=0.5, mechanism="vanilla"),
        eqa.AttentionConfig(dropout=0.5, mechanism=eqa.Blockwise(2, 2)),
    ):
        for dropout_p in (0.0, 0.5):
            other = MultiheadAttention(
                3, 12, dropout_p=dropout_p, attention=attention, key=key
            )
            _close(other(*x, key=key), out)
    other = eqa.Attention(dropout=0.5, inference=True)
    _close(MultiheadAttention(3, 12, attention=other, key=key)(*x), plain)
    with pytest.raises(ValueError, match="dropout_p.*0.1.*0.5"):
        config = eqa.AttentionConfig(dropout=0.5)
        MultiheadAttention(3, 12, dropout_p=0.1, attention=config, key=key)


def test_deterministic(key):
    mha = MultiheadAttention(3, 12, dropout_p=0.5, key=key)
    x = _inputs()
    with pytest.warns(UserWarning, match="deprecated"):
        out = mha(*x, deterministic=True)
    _close(out, mha(*x, inference=True))


def test_process_heads(key):
    """equinox's own example: rotary embeddings. Here they are also an argument."""
    x = jr.normal(key, (6, 24))
    rope = eqx.nn.RotaryPositionalEmbedding(8)

    def process_heads(query, key_, value):
        rotate = jax.vmap(rope, in_axes=1, out_axes=1)
        return rotate(query), rotate(key_), value

    theirs = eqx.nn.MultiheadAttention(3, 24, key=key)
    ours = MultiheadAttention(3, 24, key=key)
    rotary = MultiheadAttention(3, 24, rotary=eqa.RotaryEmbedding(8), key=key)
    expected = theirs(x, x, x, process_heads=process_heads)
    _close(ours(x, x, x, process_heads=process_heads), expected)
    _close(rotary(x, x, x), expected)
    for bad in range(3):

        def change_shape(*heads):
            return tuple(h[:-1] if i == bad else h for i, h in enumerate(heads))

        with pytest.raises(ValueError, match="process_heads must not change the shape"):
            ours(x, x, x, process_heads=change_shape)


@pytest.mark.parametrize("num_kv_heads", (1, 2, 4))
def test_grouped(num_kv_heads, key):
    """Equals a layer in which each key and value head is there several times."""
    kwargs = dict(use_key_bias=True, use_value_bias=True)
    mha = MultiheadAttention(4, 12, num_kv_heads=num_kv_heads, **kwargs, key=key)
    assert mha.key_proj.weight.shape == (num_kv_heads * 3, 12)
    full = MultiheadAttention(4, 12, **kwargs, key=key)

    def parameters(m):
        return [getattr(p, n) for p in projs(m) for n in ("weight", "bias")]

    def projs(m):
        return m.key_proj, m.value_proj

    def repeat(x):
        x = x.reshape(num_kv_heads, 3, *x.shape[1:])
        x = jnp.repeat(x, 4 // num_kv_heads, axis=0)
        return x.reshape(12, *x.shape[2:])

    replace = [repeat(x) for x in parameters(mha)]
    full = eqx.tree_at(parameters, full, replace)
    others = lambda m: (m.query_proj, m.output_proj)  # noqa: E731
    full = eqx.tree_at(others, full, others(mha))
    x = _inputs()
    _close(mha(*x), full(*x))


@pytest.mark.parametrize("qk_norm", ("rms", "l2"))
def test_qk_norm(qk_norm, key):
    mha = MultiheadAttention(4, 12, qk_size=5, num_kv_heads=2, qk_norm=qk_norm, key=key)
    q, k, v = _inputs()
    keys = jr.split(jr.key(4), 3)

    def normalise(x):
        x = np.asarray(x, np.float64)
        square = (np.mean if qk_norm == "rms" else np.sum)(x**2, -1, keepdims=True)
        return x / np.sqrt(square)

    query = normalise((q @ mha.query_proj.weight.T).reshape(5, 4, 5))
    key_ = normalise((k @ mha.key_proj.weight.T).reshape(7, 2, 5))
    value = np.asarray((v @ mha.value_proj.weight.T).reshape(7, 2, 3), np.float64)
    if qk_norm == "rms":
        weights = 1 + jr.normal(keys[0], (5,)), 1 + jr.normal(keys[1], (5,))
        where = lambda m: (m.query_norm.weight, m.key_norm.weight)  # noqa: E731
        mha = eqx.tree_at(where, mha, weights)
        query, key_ = query * np.asarray(weights[0]), key_ * np.asarray(weights[1])
        scale = np.full(4, 5**-0.5)
    else:
        assert jnp.array_equal(mha.config.scale, jnp.full(4, 10.0))
        scale = jr.uniform(keys[2], (4,), minval=1.0, maxval=20.0)
        mha = eqx.tree_at(lambda m: m.config.scale, mha, scale)
    logits = np.einsum("qhd,khd->hqk", query, np.repeat(key_, 2, 1))
    logits = logits * np.asarray(scale)[:, None, None]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, np.repeat(value, 2, 1)).reshape(5, -1)
    _close(mha(q, k, v), out @ np.asarray(mha.output_proj.weight).T)

    # All of it is learned, and zeros are no accident.
    @eqx.filter_jit
    @eqx.filter_grad
    def grad(mq):
        return jnp.sum(mq[0](mq[1], k, v) ** 2)

    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grad((mha, q))))
    zeros = jnp.zeros_like(q)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grad((mha, zeros))))


def test_qk_norm_scale(key):
    """A scale that is given is not learned instead."""
    config = eqa.AttentionConfig(scale=3.0)
    mha = MultiheadAttention(3, 12, qk_norm="l2", attention=config, key=key)
    assert mha.config.scale == 3.0
    x = _inputs()
    learned = MultiheadAttention(3, 12, qk_norm="l2", key=key)
    learned = eqx.tree_at(lambda m: m.config.scale, learned, jnp.full(3, 3.0))
    _close(mha(*x), learned(*x))


@pytest.mark.parametrize("mechanism", ("vanilla", "blockwise", "auto"))
def test_config(mechanism, key):
    """Masks and scores of the layer and of the call are combined."""
    window = eqa.SlidingWindow(2, None)
    config = eqa.AttentionConfig(mechanism, mask=eqa.Causal(), score=eqa.SoftCap(2.0))
    mha = MultiheadAttention.from_config(config, 3, 12, num_kv_heads=1, key=key)
    assert isinstance(mha, MultiheadAttention)
    q, k, v = _inputs(6, 6)
    bias = eqa.Bias(jr.normal(key, (3, 6, 6)))
    sinks = jnp.arange(3.0)
    out = mha(q, k, v, window, score=bias, sinks=sinks)
    plain: Any = eqa.attend(
        jax.vmap(mha.query_proj)(q).reshape(6, 3, 4),
        jax.vmap(mha.key_proj)(k).reshape(6, 1, 4),
        jax.vmap(mha.value_proj)(v).reshape(6, 1, 4),
        mask=eqa.Causal() & window,
        score=(eqa.SoftCap(2.0), bias),
        sinks=sinks,
    )
    _close(out, jax.vmap(mha.output_proj)(plain.reshape(6, 12)))
    assert "mechanism" in mha.attention.explain(*3 * [jnp.ones((6, 3, 4))])


@pytest.mark.parametrize("interleaved", (False, True))
def test_positions(interleaved, key):
    """Rotary embeddings and masks go by the same positions."""
    mha = MultiheadAttention(
        3,
        12,
        rotary=eqa.RotaryEmbedding(4, interleaved=interleaved),
        attention=eqa.AttentionConfig(mask=eqa.Causal()),
        key=key,
    )
    x = _inputs(7, 7)[0]
    expected = mha(x, x, x)
    last = x[-3:]
    _close(mha(last, x, x, q_positions="end"), expected[-3:])
    # Narrow ones, too.
    seven = jnp.arange(7, dtype=jnp.int8)
    _close(mha(last, x, x, q_positions="end", kv_positions=seven), expected[-3:])
    assert not jnp.any(mha(last, x[:0], x[:0], q_positions="end", kv_positions=seven[:0]))
    _close(mha(last, x, x, q_positions=jnp.array([4, 5, 6])), expected[-3:])
    shifted = jnp.arange(7) + 1000
    out = mha(x, x, x, q_positions=shifted, kv_positions=shifted)
    _close(out, expected, atol=1e-4)
    permutation = jr.permutation(key, 7)
    x, out = x[permutation], expected[permutation]
    permuted = mha(x, x, x, q_positions=permutation, kv_positions=permutation)
    _close(permuted, out)


_masks = (eqa.Causal(), eqa.Causal() & eqa.SlidingWindow(3))


def _cached(mask, key, mechanism="auto", **kwargs):
    mha = MultiheadAttention(
        4,
        24,
        num_kv_heads=2,
        qk_norm="rms",
        rotary=eqa.RotaryEmbedding(6),
        attention=eqa.AttentionConfig(mechanism, mask=mask),
        vo_size=5,
        key=key,
        **kwargs,
    )
    return mha, lambda batch=(): eqa.StaticCache.init(14, 2, 6, 5, batch=batch)


@pytest.mark.parametrize(
    "mask, mechanism",
    ((_masks[0], "vanilla"), (_masks[0], "blockwise"), (_masks[1], "blockwise")),
)
def test_cache(mask, mechanism, key):
    """Chunk by chunk = token by token = one call = without a cache."""
    mha, init = _cached(mask, key, mechanism)
    x = jr.normal(key, (11, 24))
    expected = compiled(mha, x, x, x)
    call = fast_jit(lambda mha, x, cache: mha(x, x, x, cache=cache))
    for chunks in ([11], [4, 4, 1, 1, 1]):
        cache, outs = init(), []
        for chunk in jnp.split(x, list(it.accumulate(chunks))[:-1]):
            out, cache = call(mha, chunk, cache)
            outs.append(out)
        _close(jnp.concatenate(outs), expected)
        assert cache.length == 11

    @fast_jit
    def decode(cache, x):
        def token(cache, x):
            out, cache = mha(x, x, x, cache=cache)
            return cache, out

        return jax.lax.scan(token, cache, x[:, None])

    scanned, out = decode(init(), x)
    _close(out[:, 0], expected)
    assert eqx.tree_equal(scanned, cache, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="cache full: capacity 14, length 11"):
        jax.block_until_ready(call(mha, x[:4], cache))


@pytest.mark.slow
def test_cache_vmap(key):
    """A batch in which each sequence is as long as it likes."""
    mha, init = _cached(eqa.Causal(), key)
    xs = jr.normal(key, (2, 8, 24))
    expected = compiled(lambda xs: jax.vmap(mha)(xs, xs, xs), xs)
    cache = init((2,))
    for row, n in enumerate((5, 2)):
        _, one = compiled(lambda x: mha(x, x, x, cache=init()), xs[row, :n])
        cache = jax.tree.map(lambda b, o: b.at[row].set(o), cache, one)
    step = eqx.filter_jit(jax.vmap(lambda x, c: mha(x, x, x, cache=c)))
    out, cache = step(jnp.stack([xs[0, 5:8], xs[1, 2:5]]), cache)
    assert jnp.array_equal(cache.length, jnp.array([8, 5]))
    _close(out[0], expected[0, 5:8])
    _close(out[1], expected[1, 2:5])


def test_cache_masks(key):
    """Masks by index go by the slots of the cache."""
    mha, init = _cached(eqa.Causal(), key)
    x = jr.normal(key, (8, 24))
    mask = jr.bernoulli(key, 0.6, (4, 8, 8)).at[..., 0].set(True)
    wide = jnp.pad(mask, ((0, 0), (0, 0), (0, 6)))
    valid = jnp.arange(14) != 1

    def without_cache(x):
        return mha(x, x, x, mask), mha(x, x, x, eqa.Keys(valid[:8]))

    def with_cache(x):
        out1, cache = mha(*3 * [x[:5]], wide[:, :5], cache=init())
        out2, _ = mha(*3 * [x[5:]], wide[:, 5:], cache=cache)
        out, _ = mha(x, x, x, eqa.Keys(valid), cache=init())
        return jnp.concatenate([out1, out2]), out

    for out, expected in zip(compiled(with_cache, x), compiled(without_cache, x)):
        _close(out, expected)


def test_cache_of_another_sequence(key):
    """Cross-attention: append once, and then nothing."""
    mha = MultiheadAttention(3, 12, key=key)
    q, k, v = _inputs()
    _, cache = mha(q[:0], k, v, cache=eqa.StaticCache.init(7, 3, 4))
    out, cache = mha(q, k[:0], v[:0], cache=cache)
    _close(out, mha(q, k, v))
    assert cache.length == 7


def test_cache_dropout(key):
    mha, init = _cached(eqa.Causal(), key, dropout_p=0.3)
    x = jr.normal(key, (8, 24))
    out, _ = mha(x, x, x, cache=init(), key=key)
    _close(out, mha(x, x, x, key=key))


@pytest.mark.parametrize(
    "dtype, qk_norm",
    ((jnp.bfloat16, None), (jnp.bfloat16, "rms"), (jnp.float16, "l2")),
)
def test_low_precision(dtype, qk_norm, key):
    rotary = eqa.RotaryEmbedding(4)
    mha = MultiheadAttention(3, 12, dtype=dtype, qk_norm=qk_norm, rotary=rotary, key=key)
    assert all(x.dtype == dtype for x in jax.tree.leaves(eqx.filter(mha, eqx.is_array)))
    x = jr.normal(key, (6, 12), dtype)
    cache = eqa.StaticCache.init(8, 3, 4, dtype=dtype)
    out, cache = mha(x, x, x, cache=cache)
    assert out.dtype == dtype
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, (mha, x))
    np.testing.assert_allclose(out.astype(jnp.float32), wide[0](*3 * [wide[1]]), atol=0.05)


def test_x64(x64, key):
    mha, init = _cached(eqa.Causal(), key)
    x = jr.normal(key, (8, 24), jnp.float64)
    cache = eqa.StaticCache.init(14, 2, 6, 5, dtype=jnp.float64)
    out, _ = mha(x, x, x, cache=cache)
    assert out.dtype == jnp.float64
    _close(out, mha(x, x, x), atol=1e-12)


def test_transforms(key):
    """vmap, a scan over layers, checkpoint and gradients."""
    make = lambda key: MultiheadAttention(3, 12, num_kv_heads=1, key=key)  # noqa: E731
    layers = eqx.filter_vmap(make)(jr.split(key, 2))
    arrays, static = eqx.partition(layers, eqx.is_array)
    xs = jr.normal(key, (3, 5, 12))

    @eqx.filter_value_and_grad
    def scanned(arrays, xs):
        @jax.checkpoint
        def layer(xs, arrays):
            mha = eqx.combine(arrays, static)
            return jax.vmap(lambda x: mha(x, x, x))(xs), None

        return jnp.sum(jax.lax.scan(layer, xs, arrays)[0] ** 2)

    @eqx.filter_value_and_grad
    def looped(arrays, xs):
        outs = []
        for x in xs:
            for i in range(2):
                mha = eqx.combine(jax.tree.map(lambda a: a[i], arrays), static)
                x = mha(x, x, x)
            outs.append(x)
        return jnp.sum(jnp.stack(outs) ** 2)

    fs = map(eqx.filter_jit, (scanned, looped))
    for a, b in zip(*(jax.tree.leaves(f(arrays, xs)) for f in fs)):
        _close(a, b, atol=1e-4)


def test_save(tmp_path, key):
    mha, _ = _cached(eqa.Causal(), key)
    eqa.save(tmp_path / "mha.eqx", mha)
    loaded = eqa.load(tmp_path / "mha.eqx")
    assert eqx.tree_equal(loaded, mha)
    x = jr.normal(key, (8, 24))
    assert jnp.array_equal(loaded(x, x, x), mha(x, x, x))


@pytest.mark.parametrize(
    "kwargs, match",
    (
        (dict(num_heads=0), "num_heads"),
        (dict(query_size=0), "query_size"),
        (dict(key_size=-1), "key_size"),
        (dict(value_size=0), "value_size"),
        (dict(output_size=0), "output_size"),
        (dict(qk_size=0), "qk_size"),
        (dict(num_heads=13), "qk_size"),
        (dict(vo_size=0), "vo_size"),
        (dict(num_kv_heads=2), "num_kv_heads.*num_heads=3.*num_kv_heads=2"),
        (dict(num_kv_heads=0), "num_kv_heads"),
        (dict(rotary=eqa.RotaryEmbedding(8)), "rotary.*qk_size=4.*8"),
        (dict(dropout_p=1.0), "dropout_p"),
        (dict(dropout_p=-0.1), "dropout_p"),
    ),
)
def test_bad_numbers(kwargs, match, key):
    with pytest.raises(ValueError, match=match):
        MultiheadAttention(**(dict(num_heads=3, query_size=12) | kwargs), key=key)


def test_bad_types(key):
    for kwargs, match in (
        (dict(qk_norm="layer"), "qk_norm"),
        (dict(rotary="yes"), "rotary"),
        (dict(attention="blockwise"), "attention"),
    ):
        with pytest.raises(TypeError, match=match):
            MultiheadAttention(3, 12, **kwargs, key=key)


def test_bad_arrays(key):
    mha = MultiheadAttention(3, 12, key=key)
    q, k, v = _inputs()
    for args, match in (
        ((q[None], k, v), "query"),
        ((q[:, :5], k, v), r"query .*12.*\(5, 5\)"),
        ((q, k[:, :5], v), r"key_ .*12.*\(7, 5\)"),
        ((q, k, v[:, :5]), r"value .*12.*\(7, 5\)"),
        ((q, k, v[:3]), "value"),
        ((q.astype(int), k, v), "query"),
        ((q, k, v, jnp.ones((5, 7))), "mask"),
        ((q, k, v, jnp.ones((5, 6), bool)), "mask"),
        ((q, k, v, jnp.ones((4, 7), bool)), "mask"),
        ((q, k, v, jnp.ones((2, 5, 7), bool)), "mask"),
        ((q, k, v, jnp.ones((1, 3, 5, 7), bool)), "mask"),
    ):
        with pytest.raises(TypeError, match=match):
            mha(*args)


def test_bad_cache(key):
    mha = MultiheadAttention(3, 12, key=key)
    x = _inputs()
    cache = eqa.StaticCache.init(8, 3, 4)
    for kwargs in (
        dict(q_positions=jnp.arange(5)),
        dict(q_positions="end"),
        dict(kv_positions=jnp.arange(7)),
    ):
        with pytest.raises(ValueError, match="positions"):
            mha(*x, cache=cache, **kwargs)
    with pytest.raises(ValueError, match="MultiheadAttention: lengths are for a cache"):
        mha(*x, lengths=jnp.array(3))
    with pytest.raises(ValueError, match="batch"):
        mha(*x, cache=eqa.StaticCache.init(8, 3, 4, batch=(2,)))
    with pytest.raises(TypeError, match="key_"):
        mha(*x, cache=eqa.StaticCache.init(8, 2, 4))
    with pytest.raises(TypeError, match="cache"):
        mha(*x, cache=x)
