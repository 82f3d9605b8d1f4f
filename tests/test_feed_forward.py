"""`blockwise` and `FeedForward`: exact, dropout independent of blocks, and small."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from eqx_attention import blockwise, FeedForward

from .helpers import compiled, fast_jit


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


def _loss(module, x, block_size, **kwargs):
    if block_size is None:
        y = jax.vmap(module)(x)
    else:
        y = blockwise(module, x, block_size, **kwargs)
    return jnp.sum(jnp.sin(y)), y


def _tree_allclose(a, b, **kwargs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **kwargs), a, b)


@pytest.mark.parametrize(
    "seq, block_size", ((1, 4), (7, 1), (12, 4), (13, 4), (13, 13), (7, 100))
)
def test_blockwise(seq, block_size, x64, key):
    mlp = eqx.nn.MLP(3, 5, 8, 1, key=key)
    x = jr.normal(key, (seq, 3))
    grad = eqx.filter_jit(eqx.filter_value_and_grad(_both, has_aux=True))
    (_, y), grads = grad((mlp, x), block_size)
    (_, expected), expected_grads = grad((mlp, x), None)
    np.testing.assert_allclose(y, expected, atol=1e-13)
    _tree_allclose(grads, expected_grads, atol=1e-12)


def _both(args, block_size):
    return _loss(*args, block_size)


def test_blockwise_closure(key):
    """Parameters may also be closed over, and tokens may have any number of axes."""
    weight = jr.normal(key, (2, 3))
    x = jr.normal(key, (9, 3, 4))

    def loss(weight, block_size):
        return _loss(lambda token: weight @ token, x, block_size)[0]

    out = jax.grad(loss)(weight, 4)
    np.testing.assert_allclose(out, jax.grad(loss)(weight, None), atol=1e-4)


def test_blockwise_pytree(key):
    def module(token):
        return {"sum": jnp.sum(token), "twice": (token * 2,)}

    x = jr.normal(key, (9, 3))
    out = blockwise(module, x, 4)
    assert out["sum"].shape == (9,)
    np.testing.assert_allclose(out["twice"][0], x * 2)
    # Integer tokens, through an embedding.
    embedding = eqx.nn.Embedding(10, 4, key=key)
    ids = jnp.arange(10) % 7
    np.testing.assert_allclose(blockwise(embedding, ids, 4), embedding.weight[ids])


def test_blockwise_empty(key):
    mlp = eqx.nn.MLP(3, 5, 8, 1, key=key)
    assert blockwise(mlp, jnp.zeros((0, 3)), 4).shape == (0, 5)


def test_blockwise_derivatives(x64, key):
    """Forward mode, forward over reverse, and vmap."""
    mlp = eqx.nn.MLP(3, 3, 8, 1, activation=jnp.tanh, key=key)
    x, v = jr.normal(key, (2, 7, 3))

    def f(x, block_size):
        return _loss(mlp, x, block_size)[0]

    def hvp(block_size):
        grad = jax.grad(lambda x: f(x, block_size))
        return compiled(lambda x, v: jax.jvp(grad, (x,), (v,)), x, v)

    _tree_allclose(hvp(3), hvp(None), atol=1e-12)
    xs = jnp.stack([x, v])
    out = compiled(jax.vmap(lambda x: blockwise(mlp, x, 3)), xs)
    expected = compiled(lambda xs: jax.vmap(jax.vmap(mlp))(xs), xs)
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_blockwise_low_precision_gradient():
    """4096 gradients of 1 sum to 256 if they are added up in bfloat16."""
    weight = jnp.ones((), jnp.bfloat16)
    x = jnp.ones(4096, jnp.bfloat16)

    def loss(scale):
        y = blockwise(scale, x, 1)
        return jnp.sum(y.astype(jnp.float32))

    assert jax.grad(loss)(jax.tree_util.Partial(jnp.multiply, weight)).args[0] == 4096


def test_blockwise_policy(key):
    """A policy that keeps everything does not recompute the hidden layer."""
    mlp = eqx.nn.MLP(4, 4, 64, 1, activation=jnp.sin, key=key)
    x = jr.normal(key, (32, 4))

    def recomputed(policy):
        loss = lambda x: jnp.sum(blockwise(mlp, x, 8, policy))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(x)).count("dot_general")

    assert recomputed(jax.checkpoint_policies.everything_saveable) < recomputed(None)


def test_blockwise_bad_input(key):
    with pytest.raises(ValueError, match="block_size"):
        blockwise(lambda x: x, jnp.ones((3, 2)), 0)
    with pytest.raises(TypeError, match="x"):
        blockwise(lambda x: x, jnp.ones(()), 2)
    with pytest.raises(TypeError, match="block_size"):
        blockwise(lambda x: x, jnp.ones((3, 2)), 2.0)  # pyright: ignore


_activations = ("relu", "gelu", "gelu_exact", "silu", "glu", "reglu", "geglu", "swiglu")


@pytest.mark.parametrize("activation", _activations)
@pytest.mark.parametrize("use_bias", (False, True))
def test_feed_forward(activation, use_bias, x64, key):
    ff = FeedForward(4, 10, activation, use_bias, block_size=3, key=key)
    x = jr.normal(key, (7, 4))

    def linear(proj, x):
        y = x @ proj.weight.T
        return y + proj.bias[None] if use_bias else y

    phi = {
        "relu": lambda x: jnp.maximum(x, 0),
        "gelu": lambda x: jax.nn.gelu(x, approximate=True),
        "gelu_exact": lambda x: x * jax.scipy.stats.norm.cdf(x),
        "silu": lambda x: x / (1 + jnp.exp(-x)),
        "glu": lambda x: 1 / (1 + jnp.exp(-x)),
    }
    hidden = linear(ff.up_proj, x)
    if activation in ("glu", "reglu", "geglu", "swiglu"):
        gate = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}
        gate = phi[gate.get(activation, activation)]
        assert ff.gate_proj is not None
        hidden = gate(linear(ff.gate_proj, x)) * hidden
    else:
        assert ff.gate_proj is None
        hidden = phi[activation](hidden)
    np.testing.assert_allclose(ff(x), linear(ff.down_proj, hidden), atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", (None, 1, 4, 20))
def test_feed_forward_dropout(block_size, x64, key):
    """The same bits, and so the same gradients, in blocks of any size."""

    def make(block_size):
        return FeedForward(4, 10, "swiglu", dropout_p=0.4, block_size=block_size, key=key)

    def loss(ff, key):
        y = ff(x, key=key)
        return jnp.sum(jnp.sin(y)), y

    x = jr.normal(key, (11, 4))
    grad = fast_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    (_, out), grads = grad(make(block_size), jr.key(1))
    (_, expected), expected_grads = grad(make(3), jr.key(1))
    np.testing.assert_allclose(out, expected, atol=1e-13)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
        np.testing.assert_allclose(a, b, atol=1e-12)
    ff = make(block_size)
    assert not jnp.allclose(out, compiled(lambda x: ff(x, inference=True), x))
    assert not jnp.allclose(out, grad(ff, jr.key(2))[0][1])


def test_feed_forward_inference(key):
    ff = FeedForward(4, dropout_p=0.5, key=key)
    assert ff.hidden_size == 16
    x = jr.normal(key, (6, 4))
    expected = FeedForward(4, key=key)(x)
    inference = eqx.nn.inference_mode(ff)
    assert jnp.array_equal(inference(x), expected)
    assert jnp.array_equal(inference(x, key=key), expected)
    assert jnp.array_equal(ff(x, inference=True), expected)
    assert not jnp.array_equal(inference(x, key=key, inference=False), expected)
    with pytest.raises(ValueError, match="key"):
        ff(x)


def test_feed_forward_bfloat16(key):
    ff = FeedForward(4, block_size=2, dtype=jnp.bfloat16, key=key)
    x = jr.normal(key, (6, 4), jnp.bfloat16)
    assert ff(x).dtype == jnp.bfloat16
    grads = eqx.filter_grad(lambda ff: jnp.sum(ff(x).astype(jnp.float32)))(ff)
    assert grads.up_proj.weight.dtype == jnp.bfloat16


def test_feed_forward_transforms(key):
    """A scan over layers, vmap, jit, and a trip through a file."""
    layers = eqx.filter_vmap(lambda key: FeedForward(4, block_size=2, key=key))
    layers = layers(jr.split(key, 3))
    arrays, static = eqx.partition(layers, eqx.is_array)
    xs = jr.normal(key, (2, 5, 4))

    @jax.jit
    def stack(xs):
        def layer(xs, arrays):
            return jax.vmap(eqx.combine(arrays, static))(xs), None

        return jax.lax.scan(layer, xs, arrays)[0]

    expected = xs
    for i in range(3):
        layer = fast_jit(eqx.combine(jax.tree.map(lambda a: a[i], arrays), static))
        expected = jnp.stack([layer(x) for x in expected])
    np.testing.assert_allclose(stack(xs), expected, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs, match",
    (
        (dict(size=0), "size"),
        (dict(hidden_size=-1), "hidden_size"),
        (dict(activation="tanhh"), "activation"),
        (dict(dropout_p=1.0), "dropout_p"),
        (dict(dropout_p=-0.1), "dropout_p"),
        (dict(block_size=0), "block_size"),
    ),
)
def test_feed_forward_bad_numbers(kwargs, match, key):
    with pytest.raises(ValueError, match=match):
        FeedForward(**(dict(size=4) | kwargs), key=key)


def test_feed_forward_bad_arrays(key):
    ff = FeedForward(4, key=key)
    for x in (jnp.ones(4), jnp.ones((3, 5)), jnp.ones((3, 4), int)):
        with pytest.raises(TypeError, match="x"):
            ff(x)


def _temporaries(seq, block_size, size=16, hidden_size=512, dropout_p=0.0):
    """Bytes of temporaries of the compiled gradient."""

    @jax.jit
    def grad(arrays, x, key):
        def loss(arrays, x):
            y = eqx.combine(arrays, static)(x, key=key)
            return jnp.sum(y**2)

        return jax.grad(loss, argnums=(0, 1))(arrays, x)

    ff = eqx.filter_eval_shape(
        FeedForward,
        size,
        hidden_size,
        "swiglu",
        dropout_p=dropout_p,
        block_size=block_size,
        key=jr.key(0),
    )
    arrays, static = eqx.partition(ff, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    x = jax.ShapeDtypeStruct((seq, size), jnp.float32)
    key = jax.eval_shape(lambda: jr.key(0))
    memory = grad.lower(arrays, x, key).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("dropout_p", (0.0, 0.1))
def test_feed_forward_memory(dropout_p):
    """No hidden layer of the whole sequence, forward or backward."""
    size, hidden_size = 16, 512
    short, long, ragged, whole = (
        _temporaries(seq, block_size, size, hidden_size, dropout_p)
        for seq, block_size in ((2048, 128), (8192, 128), (8191, 128), (8192, None))
    )
    # What grows is a few copies of the input and output, and the tokens' PRNG keys.
    assert long - short < 6144 * size * 4 * 4
    assert ragged - short < 6144 * size * 4 * 8
    assert long < 8192 * hidden_size * 4 / 2
    assert whole > 8192 * hidden_size * 4 * 2
