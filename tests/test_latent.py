"""MultiheadLatentAttention: the paper's formulas, in two forms, and what a cache keeps."""

import io

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from eqx_attention import MultiheadLatentAttention, StaticCache

from .helpers import compiled, fast_jit


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


def _make(mask=eqa.Causal(), key=jr.key(0), **kwargs):
    sizes = dict(kv_rank=6, q_rank=7, nope_size=5, rope_size=4, vo_size=3, output_size=8)
    config = eqa.AttentionConfig(mask=mask)
    return MultiheadLatentAttention(
        4, 10, **(sizes | dict(attention=config) | kwargs), key=key
    )


def _close(a, b, atol=2e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def _array(x):
    return np.asarray(x, np.float64)


def _rotated(x, interleaved):
    """`x` of shape `(seq, heads, channels)`, each pair of channels as a complex number."""
    half = x.shape[-1] // 2
    pairs = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    angles = np.arange(x.shape[0])[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angles)
    if interleaved:
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    return np.concatenate([turned.real, turned.imag], -1)


def _rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * _array(weight)


def _reference(mla, x, visible, sinks, interleaved):
    """Straight from the paper, in float64."""

    def linear(module, x):
        out = x @ _array(module.weight).T
        return out if module.bias is None else out + _array(module.bias)

    x = _array(x)
    seq, heads = x.shape[0], mla.num_heads
    query = x
    if mla.q_rank is not None:
        query = _rms(linear(mla.query_down, x), mla.query_norm.weight)
    query = linear(mla.query_proj, query).reshape(seq, heads, -1)
    latents = linear(mla.latent_proj, x)
    latent = _rms(latents[:, : mla.kv_rank], mla.latent_norm.weight)
    shared = _rotated(latents[:, None, mla.kv_rank :], interleaved)
    key_ = linear(mla.key_up, latent).reshape(seq, heads, -1)
    value = linear(mla.value_up, latent).reshape(seq, heads, -1)
    nope, rope = query[..., : mla.nope_size], query[..., mla.nope_size :]
    logits = np.einsum("qhd,khd->hqk", nope, key_)
    logits += np.einsum("qhd,kd->hqk", _rotated(rope, interleaved), shared[:, 0])
    weights = np.exp(logits / np.sqrt(query.shape[-1])) * visible
    weights /= weights.sum(-1, keepdims=True) + np.exp(_array(sinks))[:, None, None]
    out = np.einsum("hqk,khd->qhd", weights, value).reshape(seq, -1)
    return linear(mla.output_proj, out)


@pytest.mark.parametrize(
    "q_rank, interleaved, mechanism",
    ((7, False, "vanilla"), (None, True, eqa.Blockwise(4, 3))),
)
def test_reference(q_rank, interleaved, mechanism, x64):
    """Both forms are the formulas, and have the same gradients."""
    mla = _make(
        attention=eqa.AttentionConfig(mechanism, mask=eqa.Causal()),
        q_rank=q_rank,
        rotary=eqa.RotaryEmbedding(4, interleaved=interleaved),
        use_query_bias=True,
        use_latent_bias=True,
        use_output_bias=True,
    )
    norms = lambda m: [n.weight for n in (m.query_norm, m.latent_norm) if n]  # noqa: E731
    weights = [1 + 0.3 * jr.normal(jr.key(1), w.shape) for w in norms(mla)]
    mla = eqx.tree_at(norms, mla, weights)
    x, sinks = jr.normal(jr.key(2), (9, 10)), jr.normal(jr.key(3), (4,))
    expected = _reference(mla, x, np.tri(9), sinks, interleaved)

    def both(mla, x, sinks):
        def loss(args, absorbed):
            mla, x, sinks = args
            out = mla(x, sinks=sinks, absorbed=absorbed)
            return jnp.sum(jnp.sin(out)), out

        gradient = eqx.filter_value_and_grad(loss, has_aux=True)
        return [gradient((mla, x, sinks), absorbed) for absorbed in (False, True)]

    ((_, out), grads), ((_, out_absorbed), grads_absorbed) = compiled(both, mla, x, sinks)
    _close(out, expected, atol=1e-12)
    _close(out_absorbed, expected, atol=1e-12)
    leaves, leaves_absorbed = map(jax.tree.leaves, (grads, grads_absorbed))
    assert len(leaves) == len(leaves_absorbed) == (13 if q_rank else 11)
    for a, b in zip(leaves, leaves_absorbed):
        assert jnp.any(a != 0)
        _close(a, b, atol=1e-11)


def test_forms_with_everything():
    """Masks and scores of the layer and of the call, a scale, dropout, positions."""
    config = eqa.AttentionConfig(
        mask=eqa.Causal(), score=eqa.SoftCap(1.5), scale=0.7, dropout=0.3
    )
    mla = MultiheadLatentAttention.from_config(
        config, 4, 10, 6, nope_size=5, rope_size=2, key=jr.key(0)
    )
    assert mla.config.scale == 0.7 and mla.dropout.p == 0.3
    x, positions = jr.normal(jr.key(1), (7, 10)), jnp.array([3, 0, 1, 2, 9, 5, 4])
    visible = jr.bernoulli(jr.key(2), 0.8, (4, 7, 7))
    bias = eqa.Bias(jr.normal(jr.key(3), (4, 7, 7)))

    order = jnp.argsort(positions)

    def calls(mla, x):
        def call(x, visible, score, positions, **kwargs):
            return mla(x, visible, score=score, positions=positions, **kwargs)

        permuted = visible[:, order][:, :, order]
        permuted_bias = eqa.Bias(bias.array[:, order][:, :, order])
        return (
            call(x, visible, bias, positions, key=jr.key(4)),
            call(x, visible, bias, positions, key=jr.key(4), absorbed=True),
            call(x, visible, bias, positions, inference=True),
            call(x[order], permuted, permuted_bias, positions[order], inference=True),
        )

    out, absorbed, inference, permuted = compiled(calls, mla, x)
    _close(absorbed, out)
    assert jnp.abs(out - inference).max() > 0.01
    # It goes by positions, and not by the order of the tokens.
    _close(permuted, inference[order])
    attention = eqx.nn.inference_mode(mla).attention
    assert "mechanism" in attention.explain(*3 * [jnp.ones((7, 4, 7))])


_window = eqa.Causal() & eqa.SlidingWindow(3)
_caches = {
    "static": (eqa.Causal(), lambda mla: mla.init_cache(14)),
    "rolling": (_window, lambda mla: eqa.RollingCache.init(3, *mla.cache_sizes, chunk=11)),
    "paged": (
        eqa.Causal(),
        lambda mla: eqa.PagedCache.init(14, *mla.cache_sizes, page_size=4),
    ),
    "int8": (_window, lambda mla: eqa.QuantizedCache.init(14, *mla.cache_sizes)),
}


@pytest.fixture(scope="module")
def training():
    """The results without a cache: causal, and with a window."""
    x = jr.normal(jr.key(1), (11, 10))
    return compiled(lambda *mlas: [mla(x) for mla in mlas], _make(), _make(_window))


@pytest.mark.parametrize("kind", _caches)
def test_cache(kind, training):
    """All at once = a prompt and then token by token = the training forward."""
    mask, init = _caches[kind]
    mla, x = _make(mask), jr.normal(jr.key(1), (11, 10))
    arrays = kind in ("static", "rolling")

    @fast_jit
    def calls(mla, x, cache):
        # The prompt in the uncompressed form, where the cache allows for it.
        prompt, cache = mla(x[:5], cache=cache, absorbed=not arrays)

        def token(cache, x):
            out, cache = mla(x[None], cache=cache)
            return cache, out[0]

        cache, rest = jax.lax.scan(token, cache, x[5:])
        return jnp.concatenate([prompt, rest]), cache

    out, cache = calls(mla, x, init(mla))
    if kind != "int8":
        _close(out, training[mask is _window])
    # In 8 bits it is not what it is without a cache, but the same in whatever parts.
    if kind in ("static", "int8"):
        whole, same = compiled(lambda mla, x: mla(x, cache=init(mla)), mla, x)
        _close(out, whole)
        assert eqx.tree_equal(cache, same, rtol=1e-5, atol=1e-5)
    if kind == "static":
        with pytest.raises(RuntimeError, match="cache full: capacity 14, length 11"):
            jax.block_until_ready(compiled(lambda c: mla(x[:4], cache=c), cache))
    if not arrays:
        with pytest.raises(eqa.UnsupportedError, match="absorbed=False .* plain arrays"):
            mla(x, cache=init(mla), absorbed=False)


def test_what_the_cache_keeps():
    """`kv_rank + rope_size` channels a token, and nothing else but its length."""
    mla = MultiheadLatentAttention(
        16, 64, kv_rank=24, nope_size=64, rope_size=8, vo_size=64, key=jr.key(0)
    )
    assert mla.cache_sizes == (1, 32, 0)
    cache = mla.init_cache(100, batch=(3,), dtype=jnp.bfloat16)
    assert isinstance(cache, StaticCache)
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == 3 * 100 * 32 * 2 + 3 * 4
    assert mla.init_cache(5).key_.dtype == jnp.float32
    # In 8 bits, and a scale for each token; the values, which are none, have one too.
    int8 = eqa.QuantizedCache.init(100, *mla.cache_sizes)
    assert sum(x.nbytes for x in jax.tree.leaves(int8)) == 100 * (32 + 4 + 4) + 4
    # Decoding makes nothing of the size of the keys and values of all heads.
    cache = mla.init_cache(4096)
    step = jax.jit(lambda x, cache: mla(x, cache=cache), donate_argnums=1)
    memory = step.lower(jnp.ones((1, 64)), cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 16 * (64 + 8 + 64) * 4 / 8


def test_ragged_batch_saved_and_loaded(tmp_path):
    """Prompts of different lengths under vmap, and then on from a file."""
    mla = _make()
    xs, lengths = jr.normal(jr.key(1), (2, 9, 10)), jnp.array([6, 3])
    expected = compiled(jax.vmap(mla), xs)

    @fast_jit
    @jax.vmap
    def step(x, cache, n):
        return mla(x, cache=cache, lengths=n)

    cache = mla.init_cache(9, batch=(2,))
    out, cache = step(xs[:, :6], cache, lengths)
    assert jnp.array_equal(cache.length, lengths)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, cache)
    file.seek(0)
    eqa.save(tmp_path / "mla.eqx", mla)
    assert eqx.tree_equal(eqa.load(tmp_path / "mla.eqx"), mla)
    new = jnp.stack([xs[0, 6:9], xs[1, 3:6]])
    continued, _ = step(new, cache, jnp.array([3, 3]))
    loaded = eqx.tree_deserialise_leaves(file, mla.init_cache(9, batch=(2,)))
    assert jnp.array_equal(step(new, loaded, jnp.array([3, 3]))[0], continued)
    for row, n in enumerate((6, 3)):
        _close(out[row, :n], expected[row, :n])
        _close(continued[row], expected[row, n : n + 3])


def test_low_precision():
    mla = _make(dtype=jnp.bfloat16)
    assert all(
        x.dtype == jnp.bfloat16 for x in jax.tree.leaves(eqx.filter(mla, eqx.is_array))
    )
    x = jr.normal(jr.key(1), (6, 10), jnp.bfloat16)
    out, cache = compiled(lambda mla, x: mla(x, cache=mla.init_cache(8)), mla, x)
    assert out.dtype == cache.key_.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, (mla, x))
    _close(out.astype(jnp.float32), compiled(wide[0], wide[1]), atol=0.03)


@pytest.mark.parametrize(
    "kwargs, match",
    (
        (dict(num_heads=0), "num_heads must be positive; got 0"),
        (dict(query_size=0), "query_size"),
        (dict(kv_rank=0), "kv_rank must be positive; got 0"),
        (dict(output_size=-1), "output_size"),
        (dict(q_rank=0), "q_rank"),
        (dict(nope_size=0), "nope_size"),
        (dict(rope_size=0), "rope_size"),
        (dict(vo_size=0), "vo_size"),
        (dict(rope_size=3), "head_dim=3"),
        (dict(rotary=eqa.RotaryEmbedding(8)), "rotary must .* rope_size=4; got one of 8"),
        (dict(dropout_p=1.0), "dropout_p"),
        (
            dict(dropout_p=0.1, attention=eqa.AttentionConfig(dropout=0.2)),
            "MultiheadLatentAttention: dropout_p .* got 0.1, and attention.dropout=0.2",
        ),
    ),
)
def test_bad_numbers(kwargs, match):
    sizes = dict(num_heads=2, query_size=8, kv_rank=6, rope_size=4)
    with pytest.raises(ValueError, match=match):
        MultiheadLatentAttention(**(sizes | kwargs), key=jr.key(0))


def test_bad_calls():
    mla = _make()
    x = jnp.ones((3, 10))
    cache = mla.init_cache(8)
    for kwargs, error, match in (
        (dict(x=x[None]), TypeError, "x"),
        (dict(x=x[:, :5]), TypeError, r"x must have shape \(seq, 10\); got \(3, 5\)"),
        (dict(x=x.astype(int)), TypeError, "x"),
        (dict(mask=jnp.ones((4, 3), bool)), TypeError, "LatentAttention: mask"),
        (dict(absorbed="yes"), TypeError, "absorbed"),
        (dict(positions=jnp.arange(4)), TypeError, "positions"),
        (
            dict(lengths=jnp.array(2)),
            ValueError,
            "LatentAttention: lengths are for a cache",
        ),
        (dict(cache=cache, positions=jnp.arange(3)), ValueError, "positions"),
        (dict(cache=mla.init_cache(8, batch=(2,))), ValueError, "batch"),
        (dict(cache=StaticCache.init(8, 1, 10)), TypeError, r"\(1, 10, 0\).*\(1, 10, 10\)"),
        (dict(cache=StaticCache.init(8, 4, 10, 0)), TypeError, r"got \(4, 10, 0\)"),
        (dict(cache=mla.init_cache(8, dtype=jnp.bfloat16)), TypeError, "dtype bfloat16"),
        (dict(cache=mla.init_cache(2)), ValueError, "cache full: capacity 2"),
    ):
        with pytest.raises(error, match=match):
            mla(**(dict(x=x) | kwargs))
    dropped = _make(dropout_p=0.5)
    with pytest.raises(ValueError, match="key"):
        dropped(x)
    assert eqx.nn.inference_mode(dropped)(x).shape == (3, 8)
