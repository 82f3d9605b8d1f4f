"""The checks that other implementations of blockwise attention come with, on ours."""

import functools

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


def _plain(query, key_, value, visible, scale):
    """Attention in three lines, for as many query as key heads."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key_) * scale
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize("jit", [False, True])
def test_blockwise_parallel_transformer(jit):
    # Its `__main__`: 32 tokens, 8 heads of 64, causal, in chunks of four.
    keys = jax.random.split(jax.random.key(0), 3)
    query, key_, value = (jax.random.normal(k, (1, 32, 8, 64)) for k in keys)
    attend = functools.partial(
        eqa.attend, mask=eqa.Causal(), mechanism=eqa.Blockwise(block_q=4, block_k=4)
    )
    out = (jax.jit(attend) if jit else attend)(query, key_, value)
    visible = jnp.tri(32, dtype=bool)[None, None]
    np.testing.assert_allclose(
        out, _plain(query, key_, value, visible, 64**-0.5), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("key_mask", [True, False])
def test_flash_attention_jax(key_mask):
    # Its sanity check, and its bounds.
    o, gradients = eqa.value_and_grad_difference(
        "vanilla", "blockwise", seed=42, key_mask=key_mask
    )
    assert o < 1e-4
    assert max(gradients) < 1e-6


def test_flash_attention_jax_causal():
    def causal(query, key_, value, *, mask, mechanism):
        mask = mask & eqa.Causal()
        return eqa.attend(query, key_, value, mask=mask, mechanism=mechanism)

    o, gradients = eqa.value_and_grad_difference(
        functools.partial(causal, mechanism="vanilla"),
        functools.partial(causal, mechanism=eqa.Blockwise(block_q=128, block_k=64)),
        q_len=512,
        kv_len=512,
    )
    assert o < 1e-4
    assert max(gradients) < 2e-5  # the first rows see few keys: larger gradients


def test_flash_attention_jax_cosine_similarity():
    def normalise(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def cosine(query, key_, value, *, mask, mechanism):
        query, key_ = normalise(query), normalise(key_)
        return eqa.attend(query, key_, value, mask=mask, scale=8.0, mechanism=mechanism)

    def plain(query, key_, value, *, mask):
        visible = mask.kv_valid[:, None, None, :]
        return _plain(normalise(query), normalise(key_), value, visible, 8.0)

    difference = functools.partial(
        eqa.value_and_grad_difference, plain, q_len=256, kv_len=1024
    )
    for mechanism in ("vanilla", "blockwise"):
        o, gradients = difference(functools.partial(cosine, mechanism=mechanism))
        assert o < 1e-4
        assert max(gradients) < 1e-6
