"""Caches by themselves. With a layer: test_multihead.py."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from eqx_attention import AbstractCache, attend, Causal, SlidingWindow, StaticCache


def _tokens(seed, n, batch=(), heads=2, head_dim=4, value_dim=6):
    key1, key2 = jr.split(jr.key(seed))
    return (
        jr.normal(key1, (*batch, n, heads, head_dim)),
        jr.normal(key2, (*batch, n, heads, value_dim)),
    )


def _init(capacity=8, batch=(), **kwargs):
    return StaticCache.init(capacity, 2, 4, 6, batch=batch, **kwargs)


def _equal(a, b):
    assert eqx.tree_equal(a, b, rtol=1e-6, atol=1e-6)


def test_init():
    cache = _init(8, (3, 2), dtype=jnp.bfloat16)
    assert isinstance(cache, AbstractCache)
    assert cache.capacity == 8
    assert cache.key_.shape == (3, 2, 8, 2, 4)
    assert cache.value.shape == (3, 2, 8, 2, 6)
    assert cache.key_.dtype == cache.value.dtype == jnp.bfloat16
    assert cache.length.shape == (3, 2) and cache.length.dtype == jnp.int32
    assert StaticCache.init(8, 2, 4).value.shape == (8, 2, 4)


@pytest.mark.parametrize("batch", ((), (3,), (2, 3)))
def test_append(batch):
    key_, value = _tokens(0, 7, batch)
    cache = _init(8, batch)
    append = eqx.filter_jit(lambda c, k, v: c.append(k, v))
    for start, stop in ((0, 3), (3, 4), (4, 4), (4, 7)):
        new = append(cache, key_[..., start:stop, :, :], value[..., start:stop, :, :])
        assert jnp.all(cache.length == start)  # The old one is as it was.
        cache = new
    assert jnp.all(cache.length == 7)
    assert jnp.array_equal(cache.key_[..., :7, :, :], key_)
    assert jnp.array_equal(cache.value[..., :7, :, :], value)
    # Full to the last slot.
    assert jnp.all(append(cache, *_tokens(1, 1, batch)).length == 8)


def test_append_jit_scan_vmap():
    key_, value = _tokens(0, 6, (3,))
    expected = _init(8, (3,)).append(key_, value)

    def one(cache, token):
        return cache.append(*token), cache.length

    def scan(cache, key_, value):
        return jax.lax.scan(one, cache, (key_[:, None], value[:, None]))[0]

    in_vmap = jax.jit(jax.vmap(scan))(_init(8, (3,)), key_, value)
    _equal(in_vmap, expected)

    def batched(cache, key_, value):
        tokens = (jnp.swapaxes(x, 0, 1)[:, :, None] for x in (key_, value))
        return jax.lax.scan(one, cache, tuple(tokens))[0]

    _equal(eqx.filter_jit(batched)(_init(8, (3,)), key_, value), expected)

    # One length for all rows.
    cache = eqx.tree_at(lambda c: c.length, _init(8, (3,)), jnp.int32(0))
    axes = jax.tree.map(lambda x: 0 if x.ndim > 0 else None, cache)
    append = jax.vmap(lambda c, k, v: c.append(k, v), in_axes=(axes, 0, 0))
    _equal(append(cache, key_, value), expected)


def test_donation():
    cache = _init(1024)
    pointers = [x.unsafe_buffer_pointer() for x in (cache.key_, cache.value)]
    append = jax.jit(lambda c, k, v: c.append(k, v), donate_argnums=0)
    for i in range(3):
        old = cache
        cache = append(cache, *_tokens(i, 1))
        assert old.key_.is_deleted()
    assert int(cache.length) == 3
    assert pointers == [x.unsafe_buffer_pointer() for x in (cache.key_, cache.value)]


def test_ragged():
    key_, value = _tokens(0, 4, (3,))
    lengths = jnp.array([4, 1, 0])
    cache = _init(6, (3,)).append(key_, value, lengths=lengths)
    assert jnp.array_equal(cache.length, lengths)
    # The padding of the first row would go beyond the end.
    more_key, more_value = _tokens(1, 4, (3,))
    append = eqx.filter_jit(lambda c, k, v, n: c.append(k, v, lengths=n))
    cache = append(cache, more_key, more_value, jnp.array([2, 3, 1]))
    assert jnp.array_equal(cache.length, jnp.array([6, 4, 1]))
    for row, (n, m) in enumerate(((4, 2), (1, 3), (0, 1))):
        expected = jnp.concatenate([key_[row, :n], more_key[row, :m]])
        assert jnp.array_equal(cache.key_[row, : n + m], expected)
        assert jnp.all(cache.key_[row, n + m :] == 0)
        expected = jnp.concatenate([value[row, :n], more_value[row, :m]])
        assert jnp.array_equal(cache.value[row, : n + m], expected)
    # One length for all rows.
    cache = _init(6, (3,)).append(key_, value, lengths=jnp.int32(2))
    assert jnp.array_equal(cache.length, jnp.array([2, 2, 2]))


def test_padding_of_nan_is_not_seen():
    key_, value = _tokens(0, 4)
    key_, value = key_.at[2:].set(jnp.nan), value.at[2:].set(jnp.nan)
    cache = _init(6).append(key_, value, lengths=jnp.int32(2))
    assert jnp.all(jnp.isfinite(cache.attend(jnp.ones((2, 2, 4)))))


@pytest.mark.parametrize("jit", (False, True))
@pytest.mark.parametrize("batch", ((), (2,)))
def test_full(jit, batch):
    append = lambda c, k, v: c.append(k, v)  # noqa: E731
    append = eqx.filter_jit(append) if jit else append
    cache = append(_init(5, batch), *_tokens(0, 4, batch))
    with pytest.raises(RuntimeError, match="cache full: capacity 5, length 4, .* 2"):
        jax.block_until_ready(append(cache, *_tokens(1, 2, batch)))
    # One row is enough.
    if batch:
        cache = eqx.tree_at(lambda c: c.length, cache, jnp.array([0, 5], jnp.int32))
        with pytest.raises(RuntimeError, match="cache full: capacity 5, length 5"):
            jax.block_until_ready(append(cache, *_tokens(1, 1, batch)))


def test_full_scan_vmap():
    cache = _init(3, (2,))
    tokens = _tokens(0, 4, (2,))

    @eqx.filter_jit
    @jax.vmap
    def fill(cache, key_, value):
        def one(cache, token):
            return cache.append(*token), None

        return jax.lax.scan(one, cache, (key_[:, None], value[:, None]))[0]

    with pytest.raises(RuntimeError, match="cache full: capacity 3, length 3"):
        jax.block_until_ready(fill(cache, *tokens))


def test_full_ragged():
    cache = _init(5, (2,)).append(*_tokens(0, 4, (2,)))
    cache.append(*_tokens(1, 3, (2,)), lengths=jnp.array([1, 0]))
    with pytest.raises(RuntimeError, match="cache full: capacity 5, length 4"):
        cache.append(*_tokens(1, 3, (2,)), lengths=jnp.array([1, 2]))
    for bad in (-1, 4):
        with pytest.raises(RuntimeError, match="lengths"):
            cache.append(*_tokens(1, 3, (2,)), lengths=jnp.array([0, bad]))


def test_full_static():
    with pytest.raises(ValueError, match="capacity 5.* 6"):
        jax.eval_shape(_init(5).append, *_tokens(0, 6))


def test_serialise():
    cache = _init(5, (2,)).append(*_tokens(0, 4, (2,)))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, cache)
    file.seek(0)
    _equal(eqx.tree_deserialise_leaves(file, _init(5, (2,))), cache)


@pytest.mark.parametrize(
    "batch, mask", (((), Causal()), ((2,), Causal() & SlidingWindow(2)))
)
def test_attend(batch, mask):
    """The last queries of a causal call over all tokens."""
    key_, value = _tokens(0, 6, batch)
    query = jr.normal(jr.key(1), (*batch, 6, 4, 4))
    expected = attend(query, key_, value, mask=mask)
    cache = _init(9, batch).append(key_[..., :4, :, :], value[..., :4, :, :])
    out = cache.attend(query[..., :4, :, :], mask=mask)
    np.testing.assert_allclose(out, expected[..., :4, :, :], atol=1e-5)
    cache = cache.append(key_[..., 4:, :, :], value[..., 4:, :, :])
    out = eqx.filter_jit(cache.attend)(query[..., 4:, :, :], mask=mask)
    np.testing.assert_allclose(out, expected[..., 4:, :, :], atol=1e-5)
    # Positions of one's own.
    query, positions = query[..., 2:3, :, :], jnp.array([2])
    out = cache.attend(query, mask=mask, q_positions=positions)
    np.testing.assert_allclose(out, expected[..., 2:3, :, :], atol=1e-5)


def test_attend_ragged():
    key_, value = _tokens(0, 4, (2,))
    query = jr.normal(jr.key(1), (2, 1, 4, 4))
    cache = _init(9, (2,)).append(key_, value, lengths=jnp.array([4, 2]))
    out = cache.attend(query, mask=Causal())
    for row, n in enumerate((4, 2)):
        expected = attend(query[row], key_[row, :n], value[row, :n])
        np.testing.assert_allclose(out[row], expected, atol=1e-5)
    out = cache.attend(query, mask=jnp.arange(9)[None, None] < 2)
    expected = attend(query, key_[:, :2], value[:, :2])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_attend_empty():
    assert jnp.all(_init(4).attend(jnp.ones((1, 2, 4))) == 0)


@pytest.mark.parametrize(
    "kwargs, match",
    (
        (dict(capacity=0), "capacity"),
        (dict(num_kv_heads=0), "num_kv_heads"),
        (dict(head_dim=-1), "head_dim"),
        (dict(value_dim=-1), "value_dim"),
        (dict(batch=(2, 0)), "batch"),
    ),
)
def test_bad_init(kwargs, match):
    with pytest.raises(ValueError, match=match):
        StaticCache.init(**(dict(capacity=4, num_kv_heads=2, head_dim=4) | kwargs))


def test_bad_dtype():
    with pytest.raises(TypeError, match="dtype"):
        StaticCache.init(4, 2, 4, dtype=jnp.int32)


def _with_fields(cache, fields):
    return eqx.tree_at(lambda c: (c.key_, c.value, c.length), cache, fields)


def test_bad_fields():
    cache = _init(5, (3,))
    key_, value, length = cache.key_, cache.value, cache.length
    # As `load` does: the constructor's annotations are checked in tests alone.
    for fields, match in (
        ((key_[0, 0], value, length), "key_"),
        ((key_, value.astype(jnp.int32), length), "value .*int32"),
        ((key_, value[:, :4], length), r"value .*\(3, 5, 2\).*\(3, 4, 2, 6\)"),
        ((key_, value[:, :, :1], length), "value"),
        ((key_, value, length[:2]), r"length .*\(3,\).*\(2,\)"),
        ((key_, value, length.astype(jnp.float32)), "length .*float32"),
    ):
        with pytest.raises(TypeError, match=match):
            _with_fields(cache, fields).__check_init__()


def test_bad_append():
    cache = _init(5)
    key_, value = _tokens(0, 3)
    for new_key, new_value, match in (
        (key_[:, :1], value[:, :1], r"key_ .*\(n, 2, 4\).*\(3, 1, 4\)"),
        (key_[..., :3], value, r"key_ .*\(n, 2, 4\)"),
        (key_, value[..., :3], r"value .*\(n, 2, 6\)"),
        (key_, value[:2], "value"),
        (key_[0], value[0], "key_"),
        (key_[None], value[None], r"key_ .*\(1, 3, 2, 4\)"),
        (key_.astype(jnp.bfloat16), value, "key_ .*float32.*bfloat16"),
        (key_, value.astype(jnp.float16), "value .*float32.*float16"),
        (key_.astype(jnp.int32), value, "key_"),
    ):
        with pytest.raises(TypeError, match=match):
            cache.append(new_key, new_value)
    with pytest.raises(TypeError, match="lengths"):
        cache.append(key_, value, lengths=jnp.array([1, 2]))
    with pytest.raises(TypeError, match="lengths"):
        cache.append(key_, value, lengths=jnp.float32(1))
