"""What a mask says of tiles is never wrong, and is exact where it can be."""

import functools as ft

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention._block_mask import Bound
from eqx_attention._mechanism import Blocks
from eqx_attention._mechanism.plan import grid, kinds
from eqx_attention.testing import Shape
from hypothesis import given, strategies as st

from .helpers import compiled, MASKS, operands


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


SHAPE = Shape((2,), 13, 29, 4, 2, 2, 2)


def _tables(mask, shape: Shape, block_q: int, block_k: int, **positions):
    """`(some, every)` as the mechanisms see them, and as they are, for each tile."""
    captured = []

    class Spy(eqa.AbstractMechanism):
        def unsupported(self, request):
            return ()

        def blocks(self, request):
            return Blocks(1, 1, block_q, block_k)

        def forward(self, request):
            tiles = grid(request, self.blocks(request))
            table = kinds(request, tiles, (False, False))
            jax.debug.callback(lambda *x: captured.append(x), *table)
            return eqa.Vanilla().forward(request)

        def backward(self, request, out, lse, dout, dlse, wrt):
            raise AssertionError

        def explain(self, request):
            return "spy"

    def call(q, k, v):
        out = eqa.attend(q, k, v, mask=mask, mechanism=Spy(), **positions)
        return out, eqa.attention_weights(q, k, v, mask=mask, **positions)

    _, weights = compiled(call, *operands(shape))
    jax.effects_barrier()
    seen = np.asarray(weights > 0)
    some, every = captured[0]
    seen = seen.reshape(-1, *seen.shape[-3:])
    groups = shape.q_heads // shape.kv_heads
    seen = seen.reshape(len(seen), shape.kv_heads, groups, *seen.shape[-2:])

    def tile(i, j):
        q = min(i * block_q, shape.q_len - block_q)
        k = min(j * block_k, shape.kv_len - block_k)
        return seen[..., q : q + block_q, k : k + block_k]

    rows, cols = some.shape[2:]
    found = [[tile(i, j) for j in range(cols)] for i in range(rows)]
    full = lambda op: np.asarray([[op(t, (2, 3, 4)) for t in row] for row in found])  # noqa: E731
    true_some, true_every = (
        np.moveaxis(full(op), (0, 1), (2, 3)) for op in (np.any, np.all)
    )
    some, every = (np.broadcast_to(x, true_some.shape) for x in (some, every))
    return some, every, true_some, true_every


def _check(mask, block_q, block_k, **positions):
    some, every, true_some, true_every = _tables(mask, SHAPE, block_q, block_k, **positions)
    assert (some >= true_some).all()
    assert (every <= true_every).all()
    return (some == true_some).all() and (every == true_every).all()


@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize("block_q, block_k", [(1, 1), (4, 8), (13, 29)])
def test_never_wrong(name, block_q, block_k):
    mask = MASKS[name](np.random.default_rng(0), SHAPE)
    mask = mask if isinstance(mask, eqa.AbstractMask) else eqa.Dense(mask)
    _check(mask, block_q, block_k)


@given(st.data())
def test_never_wrong_in_expressions(data):
    names = [n for n in MASKS if n != "dense_keys"]
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))

    def expression(depth):
        if depth == 0 or data.draw(st.booleans()):
            return MASKS[data.draw(st.sampled_from(names))](rng, SHAPE)
        left, right = expression(depth - 1), expression(depth - 1)
        kind = data.draw(st.sampled_from("&|~"))
        return left & right if kind == "&" else left | right if kind == "|" else ~left

    mask = expression(2)
    blocks = data.draw(st.sampled_from([(1, 7), (4, 8), (5, 3)]))
    if data.draw(st.booleans()):
        q_positions = jnp.asarray(rng.integers(-5, 40, SHAPE.q_len), jnp.int32)
        kv_positions = jnp.asarray(rng.integers(-5, 40, (2, SHAPE.kv_len)), jnp.int32)
        _check(mask, *blocks, q_positions=q_positions, kv_positions=kv_positions)
    else:
        _check(mask, *blocks, q_positions=data.draw(st.sampled_from(["start", "end"])))


EXACT = {
    "causal": eqa.Causal(2),
    "window": eqa.SlidingWindow(5, 2),
    "prefix": eqa.Prefix(11),
    "chunked": eqa.Chunked(4),
    "padding": eqa.Padding(jnp.array([3, 20])),
    "padding_by_numbers": eqa.Padding(20, 6),
    "segments": eqa.Segments(jnp.arange(13) // 4, jnp.arange(29) // 6),
    "dense": eqa.Dense(jnp.asarray(np.random.default_rng(0).random((13, 29)) < 0.1)),
    "not": ~eqa.Causal(),
}


@pytest.mark.parametrize("name", list(EXACT))
def test_exact(name):
    assert _check(EXACT[name], 4, 8)


@pytest.mark.parametrize("name", list(MASKS))
def test_block_mask_is_exact(name):
    shape = SHAPE
    mask = MASKS[name](np.random.default_rng(0), shape)
    mask = mask if isinstance(mask, eqa.AbstractMask) else eqa.Dense(mask)
    block_mask = ft.partial(eqa.block_mask, mask, 13, 29, num_heads=4)
    bound = block_mask(block_q=4, block_k=8)
    some, every, true_some, true_every = _tables(bound, shape, 4, 8)
    heads = bound.num_some.shape[-3] > 1
    # The last tile of a mechanism overlaps the one before it; the table's does not.
    rows = slice(0, 3)
    assert (some >= true_some).all() and (every <= true_every).all()
    if not heads:
        return
    inner = (slice(None), slice(None), rows, slice(0, 3))
    assert (some[inner] == true_some[inner]).all()
    # Any other block size is read from the same table.
    _check(bound, 5, 3)


def test_block_mask_is_bound_to_its_positions():
    q, k, v = operands(SHAPE)
    bound = eqa.block_mask(eqa.Causal(), 13, 29, q_positions="end", block_q=4, block_k=4)
    expected = eqa.attend(q, k, v, mask=eqa.Causal(), q_positions="end")
    for mechanism in (eqa.Vanilla(), eqa.Blockwise(4, 8)):
        out = eqa.attend(q, k, v, mask=bound, mechanism=mechanism, q_positions="start")
        assert jnp.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("q_positions", ("start", "end", np.arange(13) * 3))
@pytest.mark.parametrize("kv_positions", (None, np.arange(29, dtype=np.int8)[::-1] + 7))
def test_block_mask_has_the_positions_of_a_call(q_positions, kv_positions):
    q, k, v = operands(SHAPE)
    positions = dict(q_positions=q_positions, kv_positions=kv_positions)
    bound = eqa.block_mask(eqa.Causal(2), 13, 29, **positions)
    expected = eqa.attend(q, k, v, mask=eqa.Causal(2), **positions)
    assert jnp.allclose(eqa.attend(q, k, v, mask=bound), expected, atol=1e-5)


def test_block_mask_needs_heads():
    mask = eqa.Predicate(lambda q, k, head, _, __, ___: head > 1)
    with pytest.raises(ValueError, match="num_heads"):
        eqa.block_mask(mask, 5, 5)
    with pytest.raises(ValueError, match="num_heads"):
        eqa.block_mask(mask, 5, 5, num_heads=0)
    table = eqa.block_mask(mask, 5, 5, num_heads=4, block_q=5, block_k=5).num_some
    assert table[:, 1, 1].tolist() == [0, 0, 1, 1]


def test_bound_agrees_with_weights():
    mask = eqa.Causal() & eqa.SlidingWindow(2)
    seen = Bound(mask, 5, 7, None, "end").whole()[0, 0]
    weights = eqa.attention_weights(*square_operands(5, 7), mask=mask, q_positions="end")
    assert ((weights[0] > 0) == seen).all()


def square_operands(q_len, kv_len):
    return operands(Shape((), q_len, kv_len, 1, 1, 2, 2))[:2]
