"""Tiles that are EMPTY are not computed. Counted as they run, by a callback in a score."""

import collections

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import pytest

from .helpers import square


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


COUNT = collections.Counter()


def _counting(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    jax.debug.callback(lambda: COUNT.update(tiles=1))
    return logit


@pytest.fixture
def count():
    def run(fn, *args):
        COUNT.clear()
        jax.block_until_ready(fn(*args))
        jax.effects_barrier()
        return COUNT["tiles"]

    return run


def _attend(mask, mechanism, **kwargs):
    score = eqa.ScoreFn(_counting)
    COUNT.clear()

    def fn(q, k, v):
        return eqa.attend(q, k, v, mask=mask, score=score, mechanism=mechanism, **kwargs)

    return fn


B = eqa.Blockwise(block_q=16, block_k=16)
N = 16 * 8

MASKS = {
    "full": (eqa.Full(), 64),
    "causal": (eqa.Causal(), 36),
    "window": (eqa.Causal() & eqa.SlidingWindow(16), 8 + 7),
    "segments": (eqa.Segments(jnp.arange(N) // 32), 4 * 4),
    "padding": (eqa.Padding(jnp.array(33)), 8 * 3),
    "prefix_lm": (eqa.PrefixLM(16), 36),
    "nothing": (~eqa.Full(), 0),
    "future": (~eqa.Causal(), 36),
    "dense": (eqa.Dense(jnp.eye(N, dtype=bool)), 8),
}
"""Each mask, and how many of the 64 tiles have a pair that it sees."""


@pytest.mark.parametrize("name", list(MASKS))
def test_forward_and_backward(name, count):
    mask, expected = MASKS[name]
    args = square(N, heads=1)
    fn = jax.jit(_attend(mask, B))
    assert count(fn, *args) == expected
    grad = jax.jit(jax.grad(lambda *a: _attend(mask, B)(*a).sum(), argnums=(0, 1, 2)))
    assert count(grad, *args) == 2 * expected


def test_block_mask_finds_what_a_predicate_hides(count):
    mask = eqa.Predicate(lambda q, k, *_: q // 32 == k // 32)
    args = square(N, heads=1)
    assert count(jax.jit(_attend(mask, B)), *args) == 64
    bound = eqa.block_mask(mask, N, N, block_q=16, block_k=16)
    assert count(jax.jit(_attend(bound, B)), *args) == 16


def test_summary_of_a_predicate(count):
    def summary(q, k, q_feature, kv_feature, params):
        (q_low, q_high), (k_low, k_high) = (tuple(x // 32 for x in p) for p in (q, k))
        return (q_low <= k_high) & (k_low <= q_high), (q_low == k_high) & (k_low == q_high)

    mask = eqa.Predicate(lambda q, k, *_: q // 32 == k // 32, summary=summary)
    assert count(jax.jit(_attend(mask, B)), *square(N, heads=1)) == 16


def test_traced_windows_and_positions(count):
    args = square(N, heads=1)

    @jax.jit
    def fn(q, k, v, left, positions):
        mask = eqa.Causal() & eqa.SlidingWindow(left)
        kwargs = {"q_positions": positions, "kv_positions": positions}
        return _attend(mask, B, **kwargs)(q, k, v)

    positions = jnp.arange(N, dtype=jnp.int32)
    assert count(fn, *args, jnp.array(16), positions) == 15
    assert count(fn, *args, jnp.array(0), positions + 5) == 8
    # Three documents that each start from position 0 again.
    again = positions % 32
    assert count(fn, *args, jnp.array(1000), again) == 4 * 4 * 3


IDS = [jnp.arange(N) // size for size in (16, 32, 64)]


def _segmented(q, k, v, ids):
    return _attend(eqa.Segments(ids), B)(q, k, v)


def test_under_vmap_each_example_skips_for_itself(count, monkeypatch):
    # A tile of one example, as those of long sequences are.
    monkeypatch.setattr("eqx_attention._mechanism.blockwise._PAIRS", 1)
    jax.clear_caches()
    args = (*square(N, heads=1, batch=(3,)), jnp.stack(IDS))
    assert count(jax.jit(jax.vmap(_segmented)), *args) == 8 + 16 + 32
    grad = jax.vmap(jax.grad(lambda *a: _segmented(*a).sum(), argnums=(0, 1, 2)))
    assert count(jax.jit(grad), *args) == 2 * (8 + 16 + 32)
    jax.clear_caches()


def test_under_vmap_small_tiles_are_shared(count):
    # Examples so small that one tile holds them all: it is skipped if none needs it.
    args = (*square(N, heads=1, batch=(3,)), jnp.stack(IDS))
    assert count(jax.jit(jax.vmap(_segmented)), *args) == 32


def test_forward_mode_skips(count):
    args = square(N, heads=1)
    fn = jax.jit(lambda *a: jax.jvp(_attend(eqa.Causal(), B), a, a))
    assert count(fn, *args) <= 36 * 3


def test_rows_of_a_window(count):
    # Eight blocks of 128 queries, each by one tile of all keys that it may see.
    args, window = square(1024, heads=1), eqa.Causal() & eqa.SlidingWindow(100)
    assert count(jax.jit(_attend(window, "blockwise")), *args) == 8
    short = window & eqa.Padding(jnp.array(300))
    assert count(jax.jit(_attend(short, "blockwise")), *args) == 4


def test_module_is_reused(count):
    attention = eqa.Attention(mask=eqa.Causal(), score=eqa.ScoreFn(_counting), mechanism=B)
    fn = eqx.filter_jit(lambda m, *a: m(*a))
    assert count(fn, attention, *square(N, heads=1)) == 36
