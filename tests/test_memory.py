"""Memory is linear in the length: from the compiler's own analysis, nothing is run."""

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import pytest

from .helpers import temporaries


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


HEADS, DIM = 4, 64


def _loss(q, k, v):
    out, lse = eqa.attend(
        q, k, v, mask=eqa.Causal(), mechanism="blockwise", return_lse=True
    )
    return (out**2).sum() + lse.sum()


def _gradient(*args):
    return jax.grad(_loss, argnums=(0, 1, 2))(*args)


DERIVATIVES = {
    "forward": _loss,
    "grad": _gradient,
    "jvp": lambda *a: jax.jvp(_loss, a, a),
    "hvp": lambda *a: jax.jvp(_gradient, a, a),
}


def _args(length):
    return (jax.ShapeDtypeStruct((1, length, HEADS, DIM), jnp.float32),) * 3


@pytest.mark.parametrize("name", list(DERIVATIVES))
def test_linear(name):
    # From four times the length, at most four times the memory (and what tiles take).
    short, long = (temporaries(DERIVATIVES[name], *_args(n)) for n in (4096, 16384))
    assert long <= 4.1 * short


@pytest.mark.parametrize("name", ["grad", "hvp"])
def test_small(name):
    # The weights of one pass alone would take 1,024 MiB; q, k and v take 24.
    assert temporaries(DERIVATIVES[name], *_args(8192)) < 160 * 2**20


def test_ragged_lengths_are_not_padded():
    even, odd = (temporaries(_gradient, *_args(n)) for n in (8192, 8191))
    assert odd <= 1.1 * even


def test_dropout_and_features():
    def loss(q, k, v, ids):
        return eqa.attend(
            q,
            k,
            v,
            mask=eqa.Segments(ids),
            score=eqa.ALiBi.standard(HEADS),
            dropout=0.1,
            key=jax.random.key(0),
            mechanism="blockwise",
        ).sum()

    def args(n):
        return (*_args(n), jax.ShapeDtypeStruct((1, n), jnp.int32))

    short, long = (temporaries(jax.grad(loss), *args(n)) for n in (4096, 16384))
    assert long <= 4.1 * short


def test_repeated_heads_are_not_materialised():
    def loss(q, k, v):
        return eqa.attend(q, k, v, mechanism="blockwise").sum()

    def repeated(q, k, v):
        return loss(q, jnp.repeat(k, 16, 2), jnp.repeat(v, 16, 2))

    q = jax.ShapeDtypeStruct((1, 4096, 16, 64), jnp.float32)
    one = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
    grouped, full = (
        temporaries(jax.grad(f, (0, 1, 2)), q, one, one) for f in (loss, repeated)
    )
    # Neither the keys nor the values are ever as large as those of 16 heads would be.
    assert grouped < full - 1.5 * 4096 * 16 * 64 * 4
