"""Tiles that `ALiBi` makes negligible are not computed, and that changes nothing."""

import collections
import functools as ft

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import testing
from eqx_attention._axes import axes
from eqx_attention._device import version_of_jax
from eqx_attention._kernel.tables import table
from eqx_attention._keys import quantize
from eqx_attention._mechanism import attention, negligible
from eqx_attention._mechanism.plan import grid, kinds
from eqx_attention._score import AbstractBoundedScore
from eqx_attention.testing import Shape
from hypothesis import given, strategies as st
from jaxtyping import Array, Float

from .helpers import assert_close, compiled, fast_jit, operands, square
from .kernel_cases import make_request, on_hopper


NEW = version_of_jax() >= (0, 11)
FEWEST = negligible._FEWEST


@pytest.fixture(autouse=True)
def any_length(monkeypatch):
    """Such tiles are looked for where there are few tokens, too."""
    monkeypatch.setattr(negligible, "_FEWEST", 1)


SHAPES = (Shape((2,), 48, 48, 4, 2, 8, 6), Shape((2,), 40, 67, 4, 2, 8, 6))


@ft.cache
def _attend(shape: Shape, counted: bool):
    """Values, all gradients, and how many tiles there are."""
    mechanism = eqa.Blockwise(block_q=8, block_k=8)

    def fn(arrays, dout, dlse, seen, positions):
        def attended(arrays):
            q, k, v, slopes, scale = arrays
            options = dict(mask=eqa.Dense(seen), scale=scale, return_lse=True)
            options["q_positions"] = "end" if counted else positions[0]
            if not counted:
                options["kv_positions"] = positions[1]
            score = eqa.ALiBi(slopes)
            return eqa.attend(q, k, v, score=score, mechanism=mechanism, **options)

        (out, lse), pull = jax.vjp(attended, arrays)
        return out, lse, pull((dout, jnp.where(jnp.isneginf(lse), 0, dlse)))[0]

    return fast_jit(fn)


@given(st.data())
def test_equals_the_reference(data):
    """Of random masks, some rows of which do not see the key at their own place."""
    rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
    shape, counted = data.draw(st.sampled_from(SHAPES)), data.draw(st.booleans())
    q, k, v = operands(shape, seed=int(rng.integers(9999)))
    q = q * data.draw(st.sampled_from((0.1, 10.0)))
    slopes = rng.choice([-0.1, 0.0, 0.2, 3.0, 20.0], 4).astype(np.float32)
    scale = rng.choice([-1.0, 0.3, 1.0], 4).astype(np.float32)
    # Of a tile, hardly any pair is seen, or hardly any is not; or it is EMPTY.
    q_len, kv_len = shape.q_len, shape.kv_len
    seen = rng.random((2, 1, q_len, kv_len)) < data.draw(st.sampled_from((0.1, 0.98)))
    seen &= rng.random((2, 1, q_len // 8, kv_len // 8 + 1)).repeat(8, 2).repeat(8, 3)[
        ..., :kv_len
    ] < data.draw(st.sampled_from((0.6, 1)))
    own = np.clip(np.arange(q_len) + kv_len - q_len, 0, kv_len - 1)
    if data.draw(st.booleans()):
        seen[..., np.arange(q_len), own] = True
    positions = [rng.permutation(n).astype(np.int32) for n in (q_len, kv_len)]
    if data.draw(st.booleans()):
        positions = [np.arange(n, dtype=np.int32) // 2 for n in (q_len, kv_len)]
    dout = jnp.asarray(rng.standard_normal((*q.shape[:-1], shape.value_dim)), jnp.float32)
    dlse = jnp.asarray(rng.standard_normal(q.shape[:-1]), jnp.float32)

    arrays = (q, k, v, jnp.asarray(slopes), jnp.asarray(scale))
    got = _attend(shape, counted)(arrays, dout, dlse, seen, positions)
    options = dict(mask=eqa.Dense(seen), score=eqa.ALiBi(arrays[3]), scale=arrays[4])
    options["q_positions"] = "end" if counted else positions[0]
    if not counted:
        options["kv_positions"] = positions[1]
    expected = testing.reference_gradients(q, k, v, dout=dout, dlse=dlse, **options)
    names = ("query", "key_", "value", "score", "scale")
    wanted = [expected.arguments[name] for name in names]
    wanted[3] = wanted[3].slopes
    assert_close(got, (expected.out, expected.lse, tuple(wanted)), 1e-5)


N, SIZE = 64, 8
STEEP = jnp.array([20.0, 20.0, 2.0, 0.001])


@ft.cache
def _counted(kv_heads: int, counted: bool):
    def fn(q, k, v, slopes, scale, seen, q_positions, kv_positions):
        positions = {} if counted else dict(q_positions=q_positions)
        options = dict(mask=seen, score=eqa.ALiBi(slopes), scale=scale, **positions)
        request = make_request(q, k[:, :, :kv_heads], v[:, :, :kv_heads], **options)
        if not counted:
            at = jnp.broadcast_to(kv_positions, (1, 1, 1, len(kv_positions)))
            kv = eqx.tree_at(
                lambda t: t.position, request.pairs.kv, at, is_leaf=lambda x: x is None
            )
            request = eqx.tree_at(lambda r: r.pairs.kv, request, kv)
        sizes = eqa.Blockwise(SIZE, SIZE).blocks(request)._replace(batch=1, heads=1)
        found = kinds(request, grid(request, sizes), (False, False))
        return found.some, found.every

    return fast_jit(fn)


def _tiles(
    q=None, k=None, v=None, slopes=STEEP, scale=0.35, seen=None, positions=None, kv_heads=4
) -> tuple[np.ndarray, np.ndarray]:
    """Of one batch element, for each key head: which tiles are computed, and are FULL."""
    some = square(N, heads=4, batch=(1,))
    q, k, v = (x if y is None else y for x, y in zip(some, (q, k, v), strict=True))
    q_len, kv_len = q.shape[1], k.shape[1]
    seen = jnp.ones((1, q_len, kv_len), bool) if seen is None else seen
    given = positions or (jnp.arange(q_len), jnp.arange(kv_len))
    found = _counted(kv_heads, positions is None)(
        q, k, v, slopes, jnp.full(4, scale), seen, *given
    )
    some, every = (np.asarray(x)[0] for x in found)
    assert (every <= some).all()
    return some, every


def test_which_tiles_are_computed():
    q, k, v = square(N, heads=4, batch=(1,))
    plain, every = _tiles()
    assert (plain == every).all()
    near = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    assert (plain[0] == (near <= 1)).all() and (plain[1] == plain[0]).all()
    assert plain[2][near <= 1].all() and not plain[2][near >= 6].any()
    assert plain[3].all()
    # What is skipped is skipped for each head of a group.
    grouped, every = _tiles(kv_heads=2)
    assert (grouped[0] == plain[0]).all() and grouped[1].all() and every[1].all()

    # A row that does not see its own key: nothing of its tiles is negligible.
    hidden = jnp.ones((1, N, N), bool).at[0, 19, 19].set(False)
    some, every = _tiles(seen=hidden)
    others = np.delete(np.arange(8), 2)
    assert some[:, 2].all() and (some[:, others] == plain[:, others]).all()
    assert not every[:, 2, 2].any() and every[:, 2].sum() == 4 * 7
    # One that does not see much else.
    only = _tiles(seen=jnp.eye(N, dtype=bool)[None])[0]
    assert (only == np.eye(8, dtype=bool)).all()

    # What is not finite.
    for bad in (jnp.nan, jnp.inf):
        for x, name in ((k, "k"), (v, "v")):
            some, _ = _tiles(**{name: x.at[0, 60, 0, 3].set(bad)})
            assert some[0, :, 7].all() and (some[1:] == plain[1:]).all()
            assert (some[0, :7, :7] == plain[0, :7, :7]).all()
        some, _ = _tiles(q=q.at[0, 0, 0, 1].set(bad))
        assert some[0, 0].all() and (some[0, 1:] == plain[0, 1:]).all()
    # Large keys and queries: where the product of their norms is more than the distance.
    assert _tiles(q=q * 1000)[0].all()
    some, _ = _tiles(k=k.at[0, 63].mul(3000))
    assert some[:, :, 7].all() and not some[0, 0, 2:7].any()
    # Slopes.
    assert _tiles(slopes=-STEEP)[0].all()
    # Where it is the farthest key of a tile that may matter.
    k = k.at[:, :8].set(5 * jnp.ones(8)).at[:, 8:16].set(0)
    assert _tiles(q=k, k=k, slopes=-STEEP)[0][0, 0, 1]
    assert not _tiles(q=k, k=k, slopes=0 * STEEP)[0][0, 0, 1]
    assert _tiles(q=-k, k=k, slopes=0 * STEEP, scale=-0.35)[0][0, 0, 0]
    assert _tiles(slopes=0 * STEEP)[0].all()
    assert _tiles(slopes=jnp.full(4, jnp.nan))[0].all()


def test_which_tiles_are_computed_by_positions():
    plain = _tiles()[0]
    rng = np.random.default_rng(0)
    at = jnp.arange(N)
    assert (_tiles(positions=(at + 5, at + 5))[0] == plain).all()
    assert _tiles(positions=2 * (jnp.asarray(rng.permutation(N)),))[0][3].all()
    # Blocks in another order, as layouts of rings have them.
    order = rng.permutation(8)
    at = at.reshape(8, 8)[order].reshape(-1)
    near = np.abs(np.subtract.outer(order, order))
    assert (_tiles(positions=(at, at))[0][0] == (near <= 1)).all()
    # More keys than queries: they are counted from the start.
    q, k, v = square(N, heads=4, batch=(1,))
    some, _ = _tiles(q=q[:, :40])
    assert (some == plain[:, :5]).all()
    # Queries at the end of keys that are counted: their own keys are there.
    some, _ = _tiles_at_the_end(q[:, :40], k, v)
    assert (
        some[0] == (np.abs(np.subtract.outer(np.arange(3, 8), np.arange(8))) <= 1)
    ).all()


def _tiles_at_the_end(q, k, v):
    def fn(q, k, v, positions):
        request = make_request(q, k, v, score=eqa.ALiBi(STEEP))
        at = positions[None, None, :, None]
        is_none = lambda x: x is None  # noqa: E731
        where = lambda r: r.pairs.q.position  # noqa: E731
        request = eqx.tree_at(where, request, at, is_leaf=is_none)
        sizes = eqa.Blockwise(SIZE, SIZE).blocks(request)._replace(batch=1, heads=1)
        return kinds(request, grid(request, sizes), (False, False))

    return [np.asarray(x)[0] for x in compiled(fn, q, k, v, jnp.arange(24, N))]


def test_where_it_is_not_looked_for(monkeypatch):
    q, k, v = square(N, heads=4, batch=(1,))
    alibi = eqa.ALiBi(STEEP)
    look = lambda *x, **options: negligible.may_be_negligible(make_request(*x, **options))  # noqa: E731
    assert look(q, k, v, score=alibi) and look(q, k, v, score=(alibi, alibi))
    relative = eqa.RelativeBias(jnp.ones((32, 4)))
    others = (eqa.SoftCap(3.0), eqa.Bias(jnp.ones((N, N))), relative)
    for score in ((), others[0], *((alibi, s) for s in others), (others[0], alibi)):
        assert not look(q, k, v, score=score)
    assert not look(q, *(quantize(x, jnp.int8) for x in (k, v)), score=alibi)
    monkeypatch.setattr(negligible, "_FEWEST", FEWEST)
    assert not look(q, k, v, score=alibi)
    long = jnp.zeros((1, FEWEST, 4, 8))
    assert look(long, long, long, score=alibi) and not look(q, long, long, score=alibi)


class _Fading(AbstractBoundedScore):
    """`ALiBi`, and counts the tiles that it is asked about."""

    slopes: Float[Array, " q_heads"] = axes("head")

    def __call__(self, logit, tile):
        if logit.shape[-1] > 1:
            jax.debug.callback(lambda: COUNT.update(tiles=1))
        return eqa.ALiBi.__call__(self, logit, tile)

    def most(self, upper, bounds):
        return eqa.ALiBi.most(self, upper, bounds)


COUNT = collections.Counter()


def test_they_are_not_computed(monkeypatch):
    """Forward, backward, and under `vmap`, where each example skips for itself."""
    # A tile of one example, as those of long sequences are.
    monkeypatch.setattr("eqx_attention._mechanism.blockwise._PAIRS", 1)
    mechanism = eqa.Blockwise(SIZE, SIZE)

    def loss(q, k, v, slopes, score):
        out = eqa.attend(q, k, v, score=score(slopes), mechanism=mechanism)
        return jnp.sin(out).sum()

    def grads(score):
        fn = jax.grad(ft.partial(loss, score=score), argnums=(0, 1, 2, 3))
        return compiled(jax.vmap(fn), *args, slopes)

    args = square(N, heads=1, batch=(3,))
    slopes = jnp.array([[20.0], [20.0], [0.001]])
    COUNT.clear()
    found = jax.block_until_ready(grads(_Fading))
    jax.effects_barrier()
    assert COUNT["tiles"] == 2 * (22 + 22 + 64)
    monkeypatch.setattr(negligible, "_FEWEST", FEWEST)
    assert_close(found, grads(eqa.ALiBi), 1e-6)


def test_values_that_are_not_finite_reach_what_sees_them(monkeypatch):
    q, k, v = square(N, heads=1)
    v = v.at[0, 0, 0].set(jnp.inf).at[1, 0, 1].set(jnp.nan)

    def attend(q, k, v, slopes):
        return eqa.attend(
            q, k, v, score=eqa.ALiBi(slopes), mechanism=eqa.Blockwise(SIZE, SIZE)
        )

    # Weights of e^-40 and less are negligible, and not zero.
    args = (q, k, v, jnp.array([1.2]))
    out = compiled(attend, *args)
    monkeypatch.setattr(negligible, "_FEWEST", FEWEST)
    np.testing.assert_array_equal(out, compiled(attend, *args))
    assert (np.isposinf(out[:, 0, 0])).all() and np.isnan(out[:, 0, 1]).all()


@pytest.mark.parametrize("mask", (eqa.Full(), eqa.Causal()), ids=repr)
def test_rows_of_keys_that_matter_to_nobody(mask):
    """A kernel computes a tile of each row; without a mask, one that is FULL."""

    def fn(q, k, slopes):
        request = make_request(q, k, k, mask=mask, score=eqa.ALiBi(slopes))
        return table(request, 16, 8, by_key=True)

    q, k = (jnp.ones((1, n, 4, 8), jnp.bfloat16) for n in (16, N))
    found = compiled(fn, q, k[:, :, :2], STEEP)
    full, some = (np.asarray(x)[0] for x in (found.full, found.some))
    assert (some == 1).all()
    full = full[:, 3:]  # too far from all queries
    assert (full == 1).all() if isinstance(mask, eqa.Full) else not full.any()
    assert not np.asarray(found.columns)[0, :, 3:, 0].any()


@pytest.mark.parametrize("reproducible", (False, True))
def test_kernels_lower(reproducible):
    if not NEW:
        reasons = eqa.Flash(reproducible).unsupported(make_request(*3 * [_small()]))
        assert "0.11" in " ".join(reasons)
        return

    def grads(q, k, v, slopes):
        def out(q, k, v):
            options = dict(mask=eqa.Causal(), score=eqa.ALiBi(slopes))
            request = on_hopper(make_request(q, k[:, :, :2], v[:, :, :2], **options))
            return attention(eqa.Flash(reproducible), request)[0]

        primal, pull = jax.vjp(out, q, k, v)
        return pull(primal)

    lowered = jax.jit(grads).trace(*3 * [_small()], STEEP)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def _small():
    return jnp.zeros((2, 300, 4, 64), jnp.bfloat16)
