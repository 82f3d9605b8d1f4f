"""The bits of dropout: the same on every mechanism, and as good as independent."""

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention.testing import Shape

from .helpers import assert_close, operands


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


KEY = jax.random.key(7)
SHAPE = Shape((3,), 19, 23, 4, 2, 8, 8)


def _with_bits(mechanism, **kwargs):
    """The weights after dropout: attention whose values are the unit vectors."""
    q, k, _ = operands(SHAPE._replace(batch=()))
    v = jnp.broadcast_to(jnp.eye(23)[:, None], (23, 2, 23))
    return eqa.attend(q, k, v, dropout=0.4, key=KEY, mechanism=mechanism, **kwargs)


@pytest.mark.parametrize("blocks", [(1, 1), (4, 8), (19, 5), (7, 23)])
def test_same_bits_at_any_block_size(blocks):
    weights = _with_bits(eqa.Blockwise(*blocks)).swapaxes(0, 1)
    keep = eqa.dropout_mask(KEY, 0.4, (), 4, 19, 23)
    assert ((weights != 0) == keep).all()
    assert_close(weights, _with_bits("vanilla").swapaxes(0, 1), 1e-6)


def test_bits_do_not_depend_on_lengths():
    long = eqa.dropout_mask(KEY, 0.3, (), 4, 50, 60)
    assert (long[:, :19, :23] == eqa.dropout_mask(KEY, 0.3, (), 4, 19, 23)).all()
    assert (long[:2] == eqa.dropout_mask(KEY, 0.3, (), 2, 50, 60)).all()


@pytest.mark.parametrize("mechanism", ["vanilla", "blockwise"])
def test_batched_is_mapped_over_folded_keys(mechanism):
    q, k, v = operands(SHAPE)
    batched = eqa.attend(q, k, v, dropout=0.4, key=KEY, mechanism=mechanism)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(3))

    def one(q, k, v, key):
        return eqa.attend(q, k, v, dropout=0.4, key=key, mechanism=mechanism)

    assert_close(jax.vmap(one)(q, k, v, keys), batched, 1e-6)
    assert_close(jnp.stack([one(*x) for x in zip(q, k, v, keys)]), batched, 1e-6)


def test_several_batch_axes_fold_once_each():
    keys = [
        jax.random.fold_in(jax.random.fold_in(KEY, i), j) for i in (0, 1) for j in (0, 1)
    ]
    expected = jnp.stack([eqa.dropout_mask(key, 0.5, (), 2, 5, 7) for key in keys])
    found = eqa.dropout_mask(KEY, 0.5, (2, 2), 2, 5, 7)
    assert (found == expected.reshape(2, 2, 2, 5, 7)).all()


def test_backward_draws_the_same_bits():
    q, k, v = operands(SHAPE)

    def loss(v, mechanism):
        return eqa.attend(q, k, v, dropout=0.4, key=KEY, mechanism=mechanism).sum()

    dv = jax.grad(loss)(v, eqa.Blockwise(4, 8))
    assert_close(dv, jax.grad(loss)(v, "vanilla"), 1e-5)
    # Attention with these bits is linear in the values.
    assert_close(jnp.vdot(dv, v), loss(v, "blockwise"), 1e-4)


def test_old_keys_and_new():
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    found = [eqa.dropout_mask(key, 0.5, (2,), 2, 5, 7) for key in (old, new)]
    assert (found[0] == found[1]).all()


def test_inference_and_rate_zero():
    q, k, v = operands(SHAPE)
    plain = eqa.attend(q, k, v)
    assert (eqa.attend(q, k, v, dropout=0.5, inference=True) == plain).all()
    assert (eqa.attend(q, k, v, dropout=0.5, key=KEY, inference=True) == plain).all()
    assert (eqa.attend(q, k, v, dropout=0.0, key=KEY) == plain).all()


#
# Statistics. Each is a sum of n nearly independent terms, standardised; five standard
# deviations are exceeded by chance once in two million.
#

RATE = 0.3


@pytest.fixture(scope="module")
def signs():
    """For each pair, kept or not, with mean 0 and variance 1 if the bits are right."""
    keep = np.asarray(eqa.dropout_mask(jax.random.key(11), RATE, (), 4, 512, 512))
    return (keep - (1 - RATE)) / np.sqrt(RATE * (1 - RATE))


def _z(terms):
    return np.abs(terms.sum()) / np.sqrt(terms.size)


def test_rate(signs):
    assert _z(signs) < 5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_columns_and_heads(signs, axis):
    other = tuple(n for n in range(3) if n != axis)
    sums = signs.sum(other) / np.sqrt(signs.size / signs.shape[axis])
    assert np.abs(sums).max() < 5
    for n in other:  # each row of each head, each column of each head
        sums = signs.sum(n) / np.sqrt(signs.shape[n])
        assert np.abs(sums).max() < 6
        # and their spread is that of independent draws, not less
        assert abs(sums.var() - 1) < 5 * np.sqrt(2 / sums.size)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_pairs_of_neighbours(signs, axis, step):
    a = np.take(signs, range(signs.shape[axis] - step), axis)
    b = np.take(signs, range(step, signs.shape[axis]), axis)
    assert _z(a * b) < 5


def test_any_two_rows_and_columns(signs):
    for x in (signs[0], signs[0].T):
        products = (x @ x.T / np.sqrt(x.shape[1]))[np.triu_indices(len(x), 1)]
        assert np.abs(products).max() < 6.5  # of 130,816
        assert abs(products.var() - 1) < 5 * np.sqrt(2 / products.size)


def test_rectangles(signs):
    """The four corners of a rectangle share two row words and two column words, whose
    exclusive or is 0: the mixing has to break that."""
    rng = np.random.default_rng(0)
    i, k = rng.integers(0, 512, (2, 200_000))
    j, m = rng.integers(0, 512, (2, 200_000))
    distinct = (i != k) & (j != m)
    i, j, k, m = (x[distinct] for x in (i, j, k, m))
    x = signs[0]
    assert _z(x[i, j] * x[i, m] * x[k, j] * x[k, m]) < 5


def test_heads_and_keys_differ():
    one = np.asarray(eqa.dropout_mask(jax.random.key(1), 0.5, (), 2, 256, 256))
    two = np.asarray(eqa.dropout_mask(jax.random.key(2), 0.5, (), 2, 256, 256))
    for a, b in ((one[0], one[1]), (one[0], two[0]), (one[0], one[0].T)):
        off = ~np.eye(256, dtype=bool)
        assert _z(np.where(a == b, 1.0, -1.0)[off]) < 5


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.9, 0.999])
def test_expectation(rate):
    keep = np.asarray(eqa.dropout_mask(jax.random.key(5), rate, (), 1, 1024, 1024))
    assert abs(keep.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / keep.size)
