"""Attention is a monoid over key blocks."""

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from .helpers import assert_close, compiled, operands, SHAPES


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


SHAPE = SHAPES["primes"]


def _partials(cuts, **kwargs):
    q, k, v = operands(SHAPE)
    edges = [0, *sorted(cuts), SHAPE.kv_len]
    index = np.arange(SHAPE.kv_len, dtype=np.int32)
    return [
        eqa.attend(q, k[a:b], v[a:b], kv_positions=index[a:b], return_lse=True, **kwargs)
        for a, b in zip(edges, edges[1:])
    ]


@given(st.lists(st.integers(0, SHAPE.kv_len), max_size=3), st.booleans())
def test_any_split_gives_the_whole(cuts, causal):
    mask = eqa.Causal(-3) if causal else eqa.Full()
    (whole,) = compiled(lambda: _partials([], mask=mask))
    merged = compiled(lambda: eqa.merge(_partials(cuts, mask=mask)))
    assert_close(merged, whole, 1e-5)


def test_associative_and_commutative():
    a, b, c = _partials([5, 11], mask=eqa.Causal(-3))
    left = eqa.merge([eqa.merge([a, b]), c])
    assert_close(left, eqa.merge([a, eqa.merge([b, c])]), 1e-6)
    assert_close(left, eqa.merge([c, a, b]), 1e-6)


def test_empty_is_neutral():
    (whole,) = _partials([])
    empty = (jnp.full_like(whole[0], jnp.nan), jnp.full_like(whole[1], -jnp.inf))
    for partials in ([empty, whole], [whole, empty], [empty, whole, empty]):
        assert_close(eqa.merge(partials), whole, 1e-6)
    out, lse = eqa.merge([empty, empty])
    assert (out == 0).all() and jnp.isneginf(lse).all()

    def loss(lse, out):
        return eqa.merge([(out, lse), (out, lse)])[0].sum()

    grads = jax.grad(loss, argnums=(0, 1))(empty[1], jnp.zeros_like(whole[0]))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_stable(shift):
    a, b = _partials([7])
    shifted = [(out, lse + shift) for out, lse in (a, b)]
    out, lse = eqa.merge(shifted)
    expected = eqa.merge([a, b])
    assert_close(out, expected[0], 2e-3)
    assert_close(lse - shift, expected[1], 2e-3)


def test_sinks_are_a_partial_without_value():
    q, k, v = operands(SHAPE)
    sinks = jnp.arange(4.0)
    expected = eqa.attend(q, k, v, sinks=sinks, return_lse=True)
    out, lse = eqa.attend(q, k, v, return_lse=True)
    sink = (jnp.zeros_like(out), jnp.broadcast_to(sinks[None], lse.shape))
    assert_close(eqa.merge([(out, lse), sink]), expected, 1e-6)


def test_bfloat16_keeps_its_dtype():
    a, b = _partials([7])
    out, lse = eqa.merge([(x.astype(jnp.bfloat16), y) for x, y in (a, b)])
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
