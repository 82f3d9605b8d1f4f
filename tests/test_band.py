"""Where a window is all that a block of queries may see, its keys are one tile."""

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import pytest
from eqx_attention.testing import Shape

from .helpers import assert_close, fast_jit, operands


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


NEAR = eqa.Causal() & eqa.SlidingWindow(100)
EVEN = Shape((2,), 300, 300, 4, 2, 8, 6)
LONG = Shape((), 131, 517, 2, 2, 8, 8)
SHORT = Shape((), 517, 131, 2, 2, 8, 8)

CASES = {
    "causal": (EVEN, NEAR, {}),
    "both_sides": (EVEN, eqa.SlidingWindow(20, 90), {}),
    "behind": (EVEN, eqa.SlidingWindow(50) & eqa.Causal(-40), {}),
    "nothing": (EVEN, eqa.SlidingWindow(50) & eqa.Causal(-400), {}),
    "chunked": (EVEN, eqa.Chunked(70), {}),
    "either": (EVEN, eqa.SlidingWindow(3) | eqa.Chunked(70), {}),
    "end": (LONG, NEAR, {"q_positions": "end"}),
    "start": (LONG, NEAR, {}),
    "before_the_keys": (SHORT, NEAR, {"q_positions": "end"}),
    "beyond_the_keys": (SHORT, NEAR, {}),
    "wider_than_the_keys": (SHORT, eqa.SlidingWindow(200, 200), {}),
    "padding": (EVEN, NEAR & eqa.Padding(jnp.array([0, 40])), {}),
    "segments": (EVEN, NEAR & eqa.Segments(jnp.arange(300) // 77), {}),
    "dense": (EVEN, NEAR & eqa.Dense(jnp.arange(300)[None] % 3 > 0), {}),
    "bias": (LONG, NEAR, {"score": eqa.Bias(jnp.arange(517.0)[None] % 7)}),
    "heads": (EVEN, NEAR, {"score": eqa.ALiBi.standard(4)}),
}


def _slow_unless(names):
    return [
        name if name in names else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ]


@pytest.mark.parametrize("name", _slow_unless(("causal", "end", "segments")))
def test_same_numbers_and_bits(name):
    shape, mask, kwargs = CASES[name]
    args = operands(shape)

    def attend(mechanism, key):
        return eqa.attend(
            *args,
            mask=mask,
            mechanism=mechanism,
            dropout=0.3,
            key=key,
            return_lse=True,
            **kwargs,
        )

    key = jax.random.key(0)
    expected = fast_jit(attend)("vanilla", key)
    assert_close(fast_jit(attend)("blockwise", key), expected, 1e-5)


def test_one_tile_a_row():
    def explain(mechanism, **kwargs):
        attention = eqa.Attention(mask=NEAR, mechanism=mechanism)
        return attention.explain(*operands(LONG), **kwargs)

    assert "2 × 1 tiles of 66 queries × 176 keys" in explain("blockwise")
    assert "tiles of 66 queries × 64 keys" in explain(eqa.Blockwise(block_k=64))
    positions = {"q_positions": jnp.arange(131)}
    assert "tiles of 66 queries × 104 keys" in explain("blockwise", **positions)
