"""Rotary embeddings against the papers' formulas, written out channel by channel."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from eqx_attention import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RotaryEmbedding,
    YaRNScaling,
)
from hypothesis import given, strategies as st

from .helpers import compiled, fast_jit


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


def _reference_frequencies(d, theta, scaling):
    """One channel at a time, in float64, from the definitions."""
    out = []
    for i in range(d // 2):
        w = 1.0 / theta ** (2 * i / d)
        if isinstance(scaling, LinearScaling):
            w = w / scaling.factor
        elif isinstance(scaling, NTKScaling):
            base = theta * scaling.factor ** (d / (d - 2))
            w = 1.0 / base ** (2 * i / d)
        elif isinstance(scaling, YaRNScaling):

            def correction(rotations):
                n = scaling.original_length
                return d * math.log(n / (rotations * 2 * math.pi)) / (2 * math.log(theta))

            low = max(math.floor(correction(scaling.beta_fast)), 0)
            high = min(math.ceil(correction(scaling.beta_slow)), d - 1)
            if low == high:
                high += 0.001
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            extrapolation = 1 - ramp
            w = w / scaling.factor * (1 - extrapolation) + w * extrapolation
        elif isinstance(scaling, Llama3Scaling):
            n = scaling.original_length
            wavelength = 2 * math.pi / w
            if wavelength > n / scaling.low_freq_factor:
                w = w / scaling.factor
            elif wavelength >= n / scaling.high_freq_factor:
                smooth = (n / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                w = (1 - smooth) * w / scaling.factor + smooth * w
        out.append(w)
    return out


def _reference(x, positions, theta, scaling, interleaved, rotary_dim):
    """As a product of complex numbers. `x` is [seq, heads, head_dim]."""
    out = np.array(x, np.float64)
    magnitude = 1.0
    if isinstance(scaling, YaRNScaling):
        magnitude = scaling.attention_factor
        if magnitude is None:
            magnitude = 0.1 * math.log(scaling.factor) + 1
    for i, w in enumerate(_reference_frequencies(rotary_dim, theta, scaling)):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary_dim // 2)
        z = np.array(x[..., a], np.float64) + 1j * np.array(x[..., b], np.float64)
        z = z * magnitude * np.exp(1j * np.array(positions, np.float64) * w)[:, None]
        out[..., a], out[..., b] = z.real, z.imag
    return out


_scalings = [
    None,
    LinearScaling(4.0),
    NTKScaling(8),
    YaRNScaling(4.0, 4096),
    YaRNScaling(16, 2048, beta_fast=24, beta_slow=2.0, attention_factor=1.25),
    YaRNScaling(2.0, 32, beta_fast=1.0, beta_slow=1.0),
    Llama3Scaling(8.0, 1.0, 4.0, 8192),
    Llama3Scaling(original_length=256),
]


@pytest.mark.parametrize("scaling", _scalings)
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("fraction", (1.0, 0.5))
def test_reference(scaling, interleaved, fraction, key):
    head_dim = 32
    rotary = RotaryEmbedding(head_dim, 500_000.0, scaling, interleaved, fraction)
    x = jr.normal(key, (6, 3, head_dim))
    positions = jnp.array([0, 1, 7, 4095, 130_000, 1_000_000])
    out = rotary(x, positions)
    expected = _reference(
        x, positions, 500_000.0, scaling, interleaved, int(head_dim * fraction)
    )
    assert out.dtype == x.dtype
    # A float32 product of position and frequency is wrong by 6e-2 here.
    np.testing.assert_allclose(out, expected, atol=5e-4)
    np.testing.assert_allclose(out[:3], expected[:3], atol=1e-5)


def test_reference_x64(x64, key):
    rotary = RotaryEmbedding(16)
    x = jr.normal(key, (5, 2, 16), jnp.float64)
    positions = jnp.array([-70_000, -1, 0, 12_345, 2**30])
    out = rotary(x, positions)
    assert out.dtype == jnp.float64
    expected = _reference(x, positions, 10_000.0, None, False, 16)
    np.testing.assert_allclose(out[:4], expected[:4], atol=1e-11)
    np.testing.assert_allclose(out[4], expected[4], atol=1e-6)


def test_equinox(key):
    x = jr.normal(key, (50, 24))
    expected = eqx.nn.RotaryPositionalEmbedding(24)(x)
    out = RotaryEmbedding(24)(x[:, None], jnp.arange(50))[:, 0]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_two_thetas(key):
    """equinox's cache is keyed on the size alone, so that the first theta wins."""
    x = jr.normal(key, (10, 1, 8))
    positions = jnp.arange(10)
    outs = [RotaryEmbedding(8, theta)(x, positions) for theta in (1e4, 1e2)]
    for out, theta in zip(outs, (1e4, 1e2)):
        expected = _reference(x, positions, theta, None, False, 8)
        np.testing.assert_allclose(out, expected, atol=1e-5)


@given(
    q=st.integers(0, 10_000),
    k=st.integers(0, 10_000),
    shift=st.integers(-(10**6), 10**6),
    scaling=st.sampled_from(_scalings),
    interleaved=st.booleans(),
)
def test_relative(q, k, shift, scaling, interleaved):
    rotary = RotaryEmbedding(16, 10_000.0, scaling, interleaved)
    x, y = jr.normal(jr.key(q), (2, 1, 1, 16))

    @fast_jit
    def product(q, k):
        return jnp.sum(rotary(x, q[None]) * rotary(y, k[None]))

    q, k, shift = map(jnp.asarray, (q, k, shift))
    np.testing.assert_allclose(
        product(q, k), product(q + shift, k + shift), atol=5e-3, rtol=1e-3
    )


def test_batches(key):
    rotary = RotaryEmbedding(8, scaling=LinearScaling(2.0))
    x = jr.normal(key, (2, 3, 5, 4, 8))
    positions = jr.randint(key, (2, 3, 5), 0, 100)
    out = compiled(rotary, x, positions)
    vmapped = compiled(jax.vmap(jax.vmap(rotary)), x, positions)
    np.testing.assert_allclose(out, vmapped, atol=1e-6)
    shared = compiled(rotary, x, positions[0, 0])
    np.testing.assert_allclose(shared[0, 0], out[0, 0], atol=1e-6)
    broadcast = compiled(rotary, x, positions[:, :1])
    np.testing.assert_allclose(broadcast[:, 0], out[:, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_low_precision(dtype, key):
    rotary = RotaryEmbedding(8)
    x = jr.normal(key, (5, 1, 8), dtype)
    positions = jnp.arange(5) + 3000
    out = rotary(x, positions)
    assert out.dtype == dtype
    # All but the last rounding is in float32.
    exact = rotary(x.astype(jnp.float32), positions)
    assert jnp.array_equal(out, exact.astype(dtype))


def test_pytree(key):
    rotary = RotaryEmbedding(8, scaling=YaRNScaling(4.0, 64))
    assert jax.tree.leaves(rotary) == []
    assert hash(rotary) == hash(RotaryEmbedding(8, scaling=YaRNScaling(4.0, 64)))
    x = jr.normal(key, (5, 2, 8))
    out = eqx.filter_jit(rotary)(x, jnp.arange(5))
    np.testing.assert_allclose(out, rotary(x, jnp.arange(5)), atol=1e-6)
    grad = compiled(jax.grad(lambda x: jnp.sum(rotary(x, jnp.arange(5)) ** 2)), x)
    np.testing.assert_allclose(
        grad, 2 * x * rotary.scaling.magnitude() ** 2, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "make, match",
    (
        (lambda: RotaryEmbedding(7), "head_dim"),
        (lambda: RotaryEmbedding(0), "head_dim"),
        (lambda: RotaryEmbedding(10, fraction=0.5), "fraction"),
        (lambda: RotaryEmbedding(8, fraction=0.3), "fraction"),
        (lambda: RotaryEmbedding(8, fraction=1.5), "fraction"),
        (lambda: RotaryEmbedding(8, theta=0.5), "theta"),
        (lambda: LinearScaling(0.0), "factor"),
        (lambda: NTKScaling(-1.0), "factor"),
        (lambda: YaRNScaling(2.0, 0), "original_length"),
        (lambda: YaRNScaling(2.0, 10, beta_fast=1.0, beta_slow=2.0), "beta_fast"),
        (lambda: Llama3Scaling(8.0, 4.0, 1.0), "high_freq_factor"),
    ),
)
def test_bad_numbers(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_arrays():
    rotary = RotaryEmbedding(8)
    for x, positions, match in (
        (jnp.ones((5, 8)), jnp.arange(5), "x"),
        (jnp.ones((5, 1, 4)), jnp.arange(5), "x"),
        (jnp.ones((5, 1, 8), int), jnp.arange(5), "x"),
        (jnp.ones((5, 1, 8)), jnp.arange(4), "positions"),
        (jnp.ones((5, 1, 8)), jnp.arange(5.0), "positions"),
    ):
        with pytest.raises(TypeError, match=match):
            rotary(x, positions)
