"""Masks and scores as kernels compute them, of a tile, without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention._axes import Block
from eqx_attention._kernel import lookup
from eqx_attention._kernel.terms import logit_fn, Place, terms_of, visible_fn
from eqx_attention._mechanism.tile import TileOf
from jax.experimental.pallas import mosaic_gpu as plgpu

from .kernel_cases import make_case, make_request, TILES


class _Ref:
    """An array in the memory of a GPU, as far as terms look at it."""

    def __init__(self, array):
        self.array = array
        self.at = self

    def __getitem__(self, at):
        parts = [slice(x.start, x.start + x.size) if hasattr(x, "size") else x for x in at]
        return self.array[tuple(parts)]


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Terms are evaluated by numpy, so to say. What is read of tables must be in them."""

    def iota(dtype, shape, axis, *, layout):
        return jax.lax.broadcasted_iota(dtype, shape, axis)

    def read(table, index, _):
        assert index.dtype == jnp.int32
        assert 0 <= index.min() and index.max() < table.size
        return table[index]

    monkeypatch.setattr(plgpu, "broadcasted_iota", iota)
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(plgpu, "load", lambda x, *, layout, optimized: x)
    monkeypatch.setattr(lookup, "read", read)


@pytest.mark.slow
@pytest.mark.parametrize("by_key", (False, True))
@pytest.mark.parametrize("name", TILES)
def test_terms_on_a_tile(name, by_key, without_a_gpu):
    """What is computed in the kernels, of a tile, against the portable mechanisms'."""
    (q, k, v), _, options = make_case(name)
    request = make_request(q, k, v, **options)
    batch, heads, (q_len, kv_len) = q.shape[0], q.shape[2], request.lengths
    shape = (batch, heads, q_len, kv_len)
    product, cotangent = jax.random.normal(jax.random.key(1), (2, *shape))
    whole = Block((0, 0, 0, 0), shape)
    masked = TileOf(request, whole, masked=True).logits
    seen = ~jnp.isneginf(masked(product))
    want, pull = jax.vjp(TileOf(request, whole, masked=False).logits, product)
    fns = {"visible": visible_fn(request, 64), "logit": logit_fn}
    given = terms_of(request, 128, 64, fns, by_key)
    given = given.given([_Ref(x) for x in given.arrays])
    b, h, i, j = batch - 1, heads - 2 if heads > 1 else 0, q_len // 128 * 64, kv_len // 64
    place = Place(b, h, i, j // 2 * 64, (64, 128) if by_key else (128, 64), int(by_key))
    tile = (b, h, slice(i, min(i + 128, q_len)), slice(place.key, place.key + 64))
    at = {n: x.at(x.load(place, x.load(place)), place) for n, x in given.items()}

    def padded(x):
        x = x[tile]
        x = jnp.pad(x, ((0, 128 - x.shape[0]), (0, 64 - x.shape[1])))
        return x.T if by_key else x

    def real(x):
        rows, columns = np.asarray(want[tile]).shape
        return np.asarray(x.T if by_key else x)[:rows, :columns]

    visible = real(at["visible"]())
    products, cotangents = padded(product), padded(cotangent)
    got = real(at["logit"](0, products))
    gradient = real(at["logit"](1, products, cotangents))
    assert np.array_equal(visible & ~np.isneginf(got), np.asarray(seen[tile]))
    for x, y in ((got, want), (gradient, pull(cotangent)[0])):
        np.testing.assert_allclose(x, np.asarray(y[tile]), rtol=1e-4, atol=1e-4)
