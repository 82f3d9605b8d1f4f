"""What users do to modules: map, scan, checkpoint, jit, shard, partition, serialise."""

import collections
import functools as ft

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention.testing import Shape
from jax.sharding import PartitionSpec as P

from .helpers import assert_close, compiled, fast_jit, MECHANISMS, operands, SCORES, square


SHAPE = Shape((), 11, 13, 4, 2, 8, 6)
N = 3


def _mapped(seed=0):
    return operands(SHAPE._replace(batch=(N,)), seed=seed)


@pytest.mark.parametrize("name", list(MECHANISMS))
@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, 2)])
def test_vmap_over_operands(name, in_axes):
    attend = ft.partial(eqa.attend, mask=eqa.Causal(), mechanism=MECHANISMS[name])
    full = _mapped()
    args = [x[0] if a is None else jnp.moveaxis(x, 0, a) for x, a in zip(full, in_axes)]
    take = lambda x, a, n: x if a is None else jnp.take(x, n, axis=a)  # noqa: E731

    def fn(*args):
        return jax.grad(lambda *x: (attend(*x) ** 2).sum(), argnums=(0, 1, 2))(*args)

    found = compiled(jax.vmap(fn, in_axes), *args)
    single = fast_jit(fn)
    expected = [single(*(take(x, a, n) for x, a in zip(args, in_axes))) for n in range(N)]
    assert_close(found, jax.tree.map(lambda *x: jnp.stack(x), *expected), 1e-5)


OVER = {
    "window": lambda n: {"mask": eqa.SlidingWindow(n, 1)},
    "segments": lambda n: {"mask": eqa.Segments(jnp.arange(11) // n, jnp.arange(13) // n)},
    "padding": lambda n: {"mask": eqa.Padding(2 * n)},
    "bias": lambda n: {"score": eqa.Bias(n * jnp.ones((11, 13)) * jnp.arange(13.0)[None])},
    "slopes": lambda n: {"score": eqa.ALiBi(n * jnp.ones(4))},
    "cap": lambda n: {"score": eqa.SoftCap(n * jnp.ones(()))},
    "sinks": lambda n: {"sinks": n * jnp.ones(4)},
    "scale": lambda n: {"scale": 0.1 * n * jnp.ones(4)},
    "positions": lambda n: {"q_positions": n + jnp.arange(11), "mask": eqa.Causal()},
    "key": lambda n: {"key": jax.random.key(n), "dropout": 0.5},
    "params": lambda n: {"score": eqa.ScoreFn(_times, params=n * jnp.ones(()))},
}


def _times(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit * params


@pytest.mark.parametrize("name", ["vanilla", "blockwise_small"])
@pytest.mark.parametrize("over", list(OVER))
def test_vmap_over_options(name, over):
    q, k, v = operands(SHAPE)
    numbers = jnp.arange(1, 4)
    if over in ("bias", "slopes", "cap", "sinks", "scale", "params"):
        numbers = numbers.astype(jnp.float32)

    def fn(n, q):
        return eqa.attend(q, k, v, mechanism=MECHANISMS[name], **OVER[over](n))

    def both(n, q):
        grad = jax.grad(lambda q: (fn(n, q) ** 2).sum())
        return fn(n, q), grad(q)

    single = fast_jit(both)
    expected = [jnp.stack(x) for x in zip(*(single(n, q) for n in numbers))]
    found = compiled(jax.vmap(both, (0, None)), numbers, q)
    assert_close(found[0], expected[0], 1e-6)
    assert_close(found[1], expected[1], 1e-5)


def test_nested_vmap_and_batch_axes_agree():
    q, k, v = operands(SHAPE._replace(batch=(2, 3)))
    mask = eqa.Padding(jnp.arange(6).reshape(2, 3) + 1)
    lengths = mask.kv_lengths

    def one(q, k, v, n):
        return eqa.attend(
            q, k, v, mask=eqa.Padding(n), mechanism=MECHANISMS["blockwise_small"]
        )

    batched = eqa.attend(q, k, v, mask=mask, mechanism=MECHANISMS["blockwise_small"])
    for mapped in (jax.vmap(jax.vmap(one)), jax.vmap(one)):
        assert_close(compiled(mapped, q, k, v, lengths), batched, 1e-6)


def test_heads_and_batch_elements_in_several_tiles(monkeypatch):
    """As long sequences are: a tile has one head of one batch element."""
    monkeypatch.setattr("eqx_attention._mechanism.blockwise._PAIRS", 1)
    jax.clear_caches()
    shape = Shape((2,), 11, 13, 6, 3, 8, 4)
    args = operands(shape)
    rng = np.random.default_rng(0)
    mask = eqa.Dense(jnp.asarray(rng.random((2, 6, 11, 13)) < 0.7))
    mask = mask & eqa.Predicate(lambda q, k, head, *_: (q + k + head) % 4 != 0)
    score = tuple(
        SCORES[n](rng, shape, jnp.float32) for n in ("alibi", "bias", "bias_heads")
    )

    def loss(args, score, mechanism):
        key = jax.random.key(0)
        out, lse = eqa.attend(
            *args,
            mask=mask,
            score=score,
            dropout=0.2,
            key=key,
            mechanism=mechanism,
            return_lse=True,
        )
        return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    both = jax.value_and_grad(loss, argnums=(0, 1))
    found, expected = (
        compiled(lambda *x: both(*x, mechanism), args, score)
        for mechanism in (eqa.Blockwise(4, 5), eqa.Vanilla())
    )
    assert_close(found, expected, 1e-5)
    jax.clear_caches()


@pytest.mark.parametrize("name", ["vanilla", "blockwise_small"])
def test_scan_over_layers_with_different_windows(name):
    x = square(16)[0]
    windows = jnp.array([1, 4, 9])

    @eqx.filter_vmap
    def make(left):
        return eqa.Attention(
            mask=eqa.Causal() & eqa.SlidingWindow(left), mechanism=MECHANISMS[name]
        )

    dynamic, static = eqx.partition(make(windows), eqx.is_array)

    def layer(x, dynamic):
        return eqx.combine(dynamic, static)(x, x, x), None

    def scanned(x):
        return jax.lax.scan(layer, x, dynamic)[0]

    def unrolled(x):
        for left in (1, 4, 9):
            x = eqa.attend(x, x, x, mask=eqa.Causal() & eqa.SlidingWindow(left))
        return x

    def both(fn):
        grad = jax.grad(lambda x: (fn(x) ** 2).sum())
        return compiled(lambda x: (fn(x), grad(x)), x)

    assert_close(both(scanned), both(unrolled), 1e-5)


COUNT = collections.Counter()


def _counting(logit, *_):
    jax.debug.callback(lambda: COUNT.update(tiles=1))
    return logit


@pytest.mark.parametrize("keep, tiles", [(True, 4 + 4), (False, 4 + 4 + 4)])
def test_checkpoint_policies_can_keep_out_and_lse(keep, tiles):
    """With both kept, the backward pass does not run the forward pass again."""
    policies = jax.checkpoint_policies
    names = ("attention_out", "attention_lse")
    policy = policies.save_only_these_names(*names) if keep else policies.nothing_saveable

    @ft.partial(jax.checkpoint, policy=policy)
    def layer(q, k, v):
        score = eqa.ScoreFn(_counting)
        return jnp.sin(eqa.attend(q, k, v, score=score, mechanism=eqa.Blockwise(8, 8)))

    args = square(16, heads=1)
    grad = jax.jit(jax.value_and_grad(lambda *x: layer(*x).sum(), argnums=(0, 1, 2)))
    COUNT.clear()
    _, found = jax.block_until_ready(grad(*args))
    jax.effects_barrier()
    assert COUNT["tiles"] == tiles
    loss = lambda *x: jnp.sin(eqa.attend(*x)).sum()  # noqa: E731
    expected = compiled(jax.grad(loss, argnums=(0, 1, 2)), *args)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_inside_a_shard_map(name):
    """One's own shard_map, over the batch and the heads: no mechanism needs to know."""
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=types)
    args = operands(Shape((4,), 16, 16, 4, 2, 8, 8))
    attend = ft.partial(eqa.attend, mask=eqa.Causal(), mechanism=MECHANISMS[name])
    spec = P("data", None, "model", None)
    sharded = jax.jit(
        jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    )
    assert_close(sharded(*args), attend(*args), 1e-6)

    def grad(fn):
        loss = lambda *x: (fn(*x) ** 2).sum()  # noqa: E731
        return compiled(jax.grad(loss, argnums=(0, 1, 2)), *args)

    assert_close(grad(sharded), grad(attend), 1e-5)
    text = sharded.lower(*args).compile().as_text() or ""
    collectives = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    assert text and not any(name in text for name in collectives)


def test_modules_are_pytrees(tmp_path):
    attention = eqa.Attention(
        mask=eqa.Causal() & eqa.Padding(jnp.array(9)),
        score=eqa.ALiBi.standard(2),
        scale=0.3,
    )
    q, k, v = square(12)
    expected = attention(q, k, v)
    assert_close(eqx.filter_jit(attention)(q, k, v), expected, 1e-6)
    # Numbers are static: under plain `jax.jit`, too, only arrays are traced.
    arrays, rest = eqx.partition(attention, eqx.is_array)
    assert len(jax.tree.leaves(arrays)) == 2
    steeper = eqx.tree_at(
        lambda a: a.score[0].slopes, attention, replace_fn=lambda s: 2 * s
    )
    assert not jnp.allclose(steeper(q, k, v), expected)
    eqx.tree_serialise_leaves(tmp_path / "a.eqx", steeper)
    back = eqx.tree_deserialise_leaves(tmp_path / "a.eqx", attention)
    assert (back(q, k, v) == steeper(q, k, v)).all()
    grads = eqx.filter_grad(lambda a: (a(q, k, v) ** 2).sum())(attention)
    assert grads.score[0].slopes.shape == (2,) and jax.tree.leaves(grads.mask) == []


def test_masks_as_arguments_of_jit():
    q, k, v = square(12)
    fn = jax.jit(lambda mask: eqa.attend(q, k, v, mask=mask))
    for mask in (eqa.Causal(), eqa.SlidingWindow(jnp.array(2)), eqa.Chunked(4)):
        assert_close(fn(mask), eqa.attend(q, k, v, mask=mask), 1e-6)


def test_donation():
    q, k, v = square(12)
    expected = eqa.attend(q, k, v)
    fn = jax.jit(lambda q, k, v: eqa.attend(q, k, v), donate_argnums=0)
    assert_close(fn(q + 0, k, v), expected, 1e-6)
