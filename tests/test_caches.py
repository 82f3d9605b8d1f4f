"""All caches alike: each is what a call without a cache is. StaticCache: test_cache.py."""

import functools as ft
import io

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import assert_close, compiled, fast_jit


HEADS, KV_HEADS, DIM, BATCH, LENGTH = 4, 2, 8, 2, 17
WINDOW, FIRST, CHUNK, PAGE = 3, 2, 6, 4
ROLLED = eqa.SlidingWindow(WINDOW) | eqa.Prefix(FIRST)
FP8 = jnp.float8_e4m3fn


def _rolling(batch=(BATCH,), **kwargs):
    sizes = (WINDOW, KV_HEADS, DIM)
    options = dict(num_first=FIRST, chunk=CHUNK) | kwargs
    return eqa.RollingCache.init(*sizes, batch=batch, **options)


def _static(batch=(BATCH,)):
    return eqa.StaticCache.init(20, KV_HEADS, DIM, batch=batch)


def _paged(batch=(BATCH,), **kwargs):
    return eqa.PagedCache.init(20, KV_HEADS, DIM, batch=batch, page_size=PAGE, **kwargs)


def _quantized(init, stored, batch=(BATCH,)):
    return eqa.QuantizedCache(init(batch), stored)


# Each with the mask that it adds, and the largest part of itself by which a number differs.
CACHES = {
    "static": (_static, eqa.Full(), 0),
    "rolling": (_rolling, ROLLED, 0),
    "paged": (_paged, eqa.Full(), 0),
    "int8": (ft.partial(_quantized, _static, jnp.int8), eqa.Full(), jnp.int8),
    "int8 rolling": (ft.partial(_quantized, _rolling, jnp.int8), ROLLED, jnp.int8),
    "fp8 paged": (ft.partial(_quantized, _paged, FP8), eqa.Full(), FP8),
}
MASKS = (
    (eqa.Causal(), jnp.array([0.5, -1.0, 2.0, 0.0])),
    (eqa.Causal() & eqa.SlidingWindow(2), None),
)


def _tokens(seed, n, batch=(BATCH,), heads=KV_HEADS):
    keys = jr.split(jr.key(seed))
    return tuple(jr.normal(k, (*batch, n, heads, DIM)) for k in keys)


def _as_stored(x, stored):
    """What an independent implementation of the 8 bits makes of keys."""
    if not stored:
        return x
    x = np.asarray(x, np.float32)
    largest = 127 if stored is jnp.int8 else 448
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(largest)
    values = (x / scale).round() if stored is jnp.int8 else x / scale
    return jnp.asarray(np.asarray(values.astype(stored), np.float32) * scale)


def _step(rotary, mask, sinks):
    """Appends tokens and attends to them; by hand what a layer does."""

    def step(cache, tokens, lengths=None):
        query, key_, value = tokens
        n = query.shape[-3]
        positions = cache.length[..., None] + jnp.arange(n, dtype=jnp.int32)[None]
        if rotary is not None:
            query, key_ = rotary(query, positions), rotary(key_, positions)
        cache = cache.append(key_, value, lengths=lengths)
        out = cache.attend(query, mask=mask, sinks=sinks, q_positions=positions)
        return cache, out

    return step


def _by_default(*names):
    """All caches, of which the others come with `--thorough`."""
    marks = {True: (), False: (pytest.mark.thorough,)}
    return [pytest.param(name, marks=marks[name in names]) for name in CACHES]


@pytest.mark.parametrize("name", _by_default("static", "int8 rolling", "fp8 paged"))
@pytest.mark.parametrize("rope", (True, pytest.param(False, marks=pytest.mark.thorough)))
def test_consistency(name, rope, tmp_path):
    """One call on all tokens = chunk by chunk = token by token = saved in the middle."""
    init, seen, stored = CACHES[name]
    rotary = eqa.RotaryEmbedding(DIM) if rope else None
    query, _ = _tokens(0, LENGTH, heads=HEADS)
    key_, value = _tokens(1, LENGTH)
    at = jnp.arange(LENGTH, dtype=jnp.int32)

    @fast_jit
    def rotated(q, k):
        return (q, k) if rotary is None else (rotary(q, at), rotary(k, at))

    q, k = rotated(query, key_)
    k, v = _as_stored(k, stored), _as_stored(value, stored)
    all_steps = [_step(rotary, *mask) for mask in MASKS]

    def chunk(cache, tokens):
        all_masks = [step(cache, tokens) for step in all_steps]
        return all_masks[0][0], [out for _, out in all_masks]

    @fast_jit
    def everything(cache, tokens, q, k, v):
        expected = [
            eqa.attend(q, k, v, mask=mask & seen, sinks=sinks, mechanism="vanilla")
            for mask, sinks in MASKS
        ]
        # Chunks longer than the window, which push out tokens; then token by token.
        first, second, rest = (
            [x[:, i:j] for x in tokens] for i, j in ((0, 6), (6, 12), (12, LENGTH))
        )
        cache, _ = all_steps[0](cache, first)
        middle, second = chunk(cache, second)
        rest = [jnp.moveaxis(x[:, :, None], 1, 0) for x in rest]
        end, rest = jax.lax.scan(chunk, middle, rest)
        rest = [jnp.moveaxis(out[:, :, 0], 0, 1) for out in rest]
        expected = [x[:, CHUNK:] for x in expected]
        return expected, middle, end, jax.tree.map(_joined, second, rest)

    expected, middle, end, outs = everything(init(), (query, key_, value), q, k, v)
    assert_close(outs, expected, 1e-5)
    assert jnp.all(middle.length == 12) and jnp.all(end.length == LENGTH)

    # What is saved in the middle is the same, bit by bit, and so will be what follows.
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, middle)
    file.seek(0)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, init()), middle)
    eqa.save(tmp_path / "cache.eqx", middle)
    assert eqx.tree_equal(eqa.load(tmp_path / "cache.eqx"), middle)


def _joined(x, y):
    return jnp.concatenate([x, y], axis=1)


@pytest.mark.parametrize(
    "name", [name for name in CACHES if name not in ("static", "int8")]
)
def test_ragged_and_mapped(name):
    """Rows of different lengths: together, and mapped over, as each by itself."""
    init, seen, stored = CACHES[name]
    mask, lengths = eqa.Causal(), jnp.array([5, 2])
    first, second = _tokens(4, 5), _tokens(5, 3)
    query, _ = _tokens(6, 3, heads=HEADS)
    as_stored = [[_as_stored(x, stored) for x in xs] for xs in (first, second)]

    def append_and_attend(cache, first, second, query, n):
        cache = cache.append(*first, lengths=n)
        cache = cache.append(*second)
        return cache.length, cache.attend(query, mask=mask)

    @fast_jit
    def everything(cache, caches, first, second, query, as_stored):
        expected = []
        for row, n in enumerate((5, 2)):
            k, v = (jnp.concatenate([x[row, :n], y[row]]) for x, y in zip(*as_stored))
            more = dict(mask=mask & seen, q_positions="end", mechanism="vanilla")
            expected.append(eqa.attend(query[row], k, v, **more))
        together = append_and_attend(cache, first, second, query, lengths)
        mapped = jax.vmap(append_and_attend)(caches, first, second, query, lengths)
        return jnp.stack(expected), together, mapped

    caches = jax.tree.map(lambda x: jnp.stack([x] * BATCH), init(()))
    arguments = (init(), caches, first, second, query, as_stored)
    expected, *found = everything(*arguments)
    for length, out in found:
        assert list(length) == [8, 5]
        assert_close(out, expected, 1e-5)


def test_layer():
    """Each cache as a layer's: of one sequence, and mapped over."""
    make = ft.partial(
        eqa.MultiheadAttention, HEADS, 32, num_kv_heads=KV_HEADS, key=jr.key(0)
    )
    rotary = eqa.RotaryEmbedding(DIM)
    mha, rolled = (
        make(rotary=rotary, attention=eqa.AttentionConfig(mask=mask))
        for mask in (eqa.Causal(), eqa.Causal() & ROLLED)
    )
    x = jr.normal(jr.key(1), (BATCH, 9, 32))

    def all_of(x, caches):
        def through(cache):
            def token(cache, x):
                out, cache = mha(x, x, x, cache=cache)
                return cache, out[0]

            out, cache = mha(x[:5], x[:5], x[:5], cache=cache)
            cache, more = jax.lax.scan(token, cache, x[5:, None])
            return jnp.concatenate([out, more])

        return mha(x, x, x), rolled(x, x, x), [through(cache) for cache in caches]

    names = ("static", "rolling", "paged")
    init = lambda: [CACHES[name][0](()) for name in names]  # noqa: E731
    caches = eqx.filter_vmap(init, axis_size=BATCH)()
    full, window, outs = compiled(jax.vmap(all_of), x, caches)
    for out, expected in zip(outs, (full, window, full)):
        assert_close(out, expected, 1e-5)


@pytest.mark.parametrize("name", list(CACHES))
def test_donation(name):
    """Appending a token copies the token: no temporary is as large as a page."""
    big = {
        "static": lambda: eqa.StaticCache.init(4096, KV_HEADS, DIM, batch=(BATCH,)),
        "rolling": lambda: eqa.RollingCache.init(
            4096, KV_HEADS, DIM, num_first=FIRST, batch=(BATCH,)
        ),
        "paged": lambda: eqa.PagedCache.init(
            4096, KV_HEADS, DIM, page_size=64, batch=(BATCH,)
        ),
    }
    *stored, kind = name.split()
    if kind in ("int8", "fp8"):
        stored, kind = [kind], "static"
    cache = big[kind]()
    if stored:
        cache = eqa.QuantizedCache(cache, jnp.int8 if stored[0] == "int8" else FP8)

    append = jax.jit(lambda c, k, v: c.append(k, v), donate_argnums=0)
    program = append.lower(cache, *_tokens(0, 1)).compile()
    stats = program.memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves((cache.key_, cache.value)))
    assert stats is not None
    assert stats.alias_size_in_bytes >= size
    assert stats.temp_size_in_bytes < 32 * 1024


def test_fork():
    """Samples of one prompt share its pages; who appends gets a copy of the last one."""
    prompt, tokens = _tokens(0, 6, (1,)), _tokens(1, 1, (3,))
    query, _ = _tokens(2, 1, (3,), HEADS)

    @fast_jit
    def run(cache, prompt, tokens, query):
        old = cache.append(*prompt)
        forked = old.fork(jnp.array([0, 0, 0]))
        samples = forked.append(*tokens)
        k, v = (
            jnp.concatenate([jnp.repeat(x, 3, axis=0), y], axis=1)
            for x, y in zip(prompt, tokens)
        )
        outs = samples.attend(query), eqa.attend(query, k, v)
        two = samples.fork(jnp.array([2, 2]))
        one = two.append(*(x[:2] for x in tokens), lengths=jnp.array([1, 0]))
        stays = one.attend(jnp.stack([query[0], query[2]]))[1]
        freed = one.free(jnp.array([True, False]))
        return old, forked, samples, one, freed, outs, stays

    cache = _paged((1,), num_pages=6)
    old, forked, samples, one, freed, outs, stays = run(cache, prompt, tokens, query)
    assert forked.references.tolist() == [3, 3, 0, 0, 0, 0]
    # The last to hold a page keeps it: two copies for three rows.
    assert samples.references.tolist() == [3, 1, 1, 1, 0, 0]
    assert_close(*outs, 1e-5)
    # The old cache is as it was, and so is what the row that did not append sees.
    assert jnp.array_equal(old.key_[1, :2], prompt[0][0, 4:])
    assert_close(stays, outs[0][2], 1e-6)
    assert one.references.tolist().count(0) == 3
    # Sequences that are done give back what no other holds.
    assert freed.length.tolist() == [0, 7] and freed.references.sum() == 2
    assert jnp.all(freed.table[0] == -1)
    quantized = eqa.QuantizedCache(old)
    assert quantized.length.shape == (1,)
    pages = quantized.cache
    assert isinstance(pages, eqa.PagedCache)
    again = eqa.QuantizedCache(pages.fork(jnp.array([0, 0])))
    assert eqx.tree_equal(again.key_, quantized.key_) and again.length.shape == (2,)


def test_pages_are_taken_again():
    """A length that is set back (guesses that were wrong) leaves no page behind."""

    @fast_jit
    def run(cache, first, second):
        cache = cache.append(*first)
        back = eqx.tree_at(lambda c: c.length, cache, jnp.array([3], jnp.int32))
        return cache, back.append(*second)

    cache, again = run(_paged((1,)), _tokens(0, 10, (1,)), _tokens(1, 7, (1,)))
    assert again.references.tolist() == cache.references.tolist() == [1, 1, 1, 0, 0]


def test_bad_at_run_time():
    """Under jit. Old caches are as they were."""

    def raises(match, fn, *args):
        with pytest.raises(RuntimeError, match=match):
            jax.block_until_ready(fn(*args))

    append = fast_jit(lambda c, *new: c.append(*new))
    one = _tokens(0, 1)
    full = append(_paged(num_pages=2), *_tokens(0, 4))
    raises("out of pages: 0 of 2", append, full, *one)
    assert full.references.tolist() == [1, 1]
    missing = eqx.tree_at(lambda c: c.table, full, full.table.at[1, 0].set(-1))
    raises("no page", append, missing, *one)
    query, _ = _tokens(0, 1, heads=HEADS)
    raises("no page", fast_jit(lambda c, q: c.attend(q)), missing, query)
    raises("rows must be in", fast_jit(lambda c: c.fork(jnp.array([2])).length), full)
    where = lambda c: (c.table, c.length)  # noqa: E731
    whole = (jnp.zeros((BATCH, 5), jnp.int32), jnp.array([3, 20], jnp.int32))
    whole = eqx.tree_at(where, full, whole)
    raises("cache full: capacity 20, length 20, .* 1", append, whole, *one)
    lengths = jnp.array([1, 2])
    ragged = fast_jit(lambda c, k, v: c.append(k, v, lengths=lengths))
    raises("lengths must be", ragged, _rolling(), *one)


@pytest.mark.parametrize("name", list(CACHES))
def test_bad_tokens(name):
    cache = CACHES[name][0]()
    key_, value = _tokens(0, 3)
    for new_key, new_value, match in (
        (key_[:, :, :1], value[:, :, :1], r"key_ .*\(2, n, 2, 8\).*\(2, 3, 1, 8\)"),
        (key_, value[..., :3], r"value .*\(2, n, 2, 8\)"),
        (key_[0], value[0], "key_"),
        (key_.astype(jnp.bfloat16), value, "key_ .*float32.*bfloat16"),
    ):
        with pytest.raises(TypeError, match=match):
            cache.append(new_key, new_value)


def test_bad_sizes():
    for make, error, match in (
        (lambda: _paged(num_pages=0), ValueError, "num_pages"),
        (lambda: eqa.PagedCache.init(8, 1, 1, page_size=0), ValueError, "page_size"),
        (lambda: eqa.PagedCache.init(8, 1, 1, dtype=jnp.int8), TypeError, "dtype"),
        (lambda: _rolling(chunk=0), ValueError, "chunk"),
        (lambda: _rolling(num_first=-1), ValueError, "num_first"),
        (lambda: eqa.RollingCache.init(0, 1, 1), ValueError, "capacity"),
        (lambda: _rolling().append(*_tokens(0, 7)), ValueError, "chunk=6 .*got 7"),
        (lambda: _rolling().attend(*_tokens(0, 7)[:1]), ValueError, "most 6 .*got 7"),
        (lambda: _paged().append(*_tokens(0, 21)), ValueError, "capacity 20.* 21"),
        (lambda: eqa.QuantizedCache(_paged(), jnp.int16), TypeError, "stored.*int16"),
        (lambda: eqa.QuantizedCache(CACHES["int8"][0](), FP8), TypeError, "int8"),
        (lambda: _paged((2, 2)).fork(jnp.array([0])), ValueError, "one batch axis"),
    ):
        with pytest.raises(error, match=match):
            make()
    wrong = eqx.tree_at(lambda c: c.references, _paged(), jnp.zeros(3, jnp.int32))
    with pytest.raises(TypeError, match="references"):
        wrong.__check_init__()
    # One pool for all is not one a sequence.
    cache = _paged((8,))
    with pytest.raises(TypeError, match="pool of pages"):
        jax.vmap(lambda c, k, v: c.append(k, v))(
            eqx.tree_at(
                lambda c: (c.key_, c.value, c.references),
                cache,
                (cache.key_[:8], cache.value[:8], cache.references[:8]),
            ),
            *_tokens(0, 1, (8,)),
        )


def test_long():
    """A rolling cache goes on for ever in the same memory."""
    cache = _rolling((), chunk=1)

    @fast_jit
    def run(cache, tokens):
        def one(cache, token):
            query, key_, value = (x[None] for x in token)
            cache = cache.append(key_, value)
            return cache, cache.attend(query, mask=eqa.Causal())[0]

        return jax.lax.scan(one, cache, tokens)

    query, _ = _tokens(0, 100, (), HEADS)
    key_, value = _tokens(1, 100, ())
    cache, out = run(cache, (query, key_, value))
    assert cache.key_.shape[0] == FIRST + WINDOW + 1 and cache.length == 100
    mask = eqa.Causal() & ROLLED
    assert_close(out, compiled(ft.partial(eqa.attend, mask=mask), query, key_, value), 1e-5)


def test_a_rolling_cache_shows_no_token_that_comes_later():
    cache = eqa.RollingCache.init(6, 1, 4, num_first=4, chunk=4)
    x = jax.random.normal(jax.random.key(0), (4, 1, 4))
    cache = cache.append(x, x)
    expected = eqa.attend(x, x, x, mask=eqa.Causal())
    np.testing.assert_allclose(cache.attend(x), expected, atol=1e-6)
