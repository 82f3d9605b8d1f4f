"""Reverse, forward and both, of every float array, against a dense float64 reference."""

import functools as ft

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import testing
from eqx_attention.testing import Shape

from .helpers import assert_close, compiled, fast_jit, operands


KEY = jax.random.key(1)
SHAPE = Shape((2,), 13, 17, 4, 2, 8, 5)
MECHANISMS = {"vanilla": eqa.Vanilla(), "blockwise": eqa.Blockwise(block_q=4, block_k=8)}

pytestmark = pytest.mark.usefixtures("x64")


def _arguments():
    """Everything that has a gradient, by name."""
    rng = np.random.default_rng(0)
    q, k, v = operands(SHAPE, jnp.float64)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    return {
        "q": q,
        "k": k,
        "v": v,
        "slopes": jnp.abs(normal(4)),
        "bias": normal(4, 13, 17),
        "table": normal(8, 4),
        "cap": jnp.asarray(3.0, jnp.float64),
        "gate": normal(2, 17),
        "sinks": normal(4),
        "scale": jnp.abs(normal(4)),
    }


def _gated(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit + (kv_feature * params).astype(logit.dtype)


def _loss(attend, x):
    out, lse = attend(
        x["q"],
        x["k"],
        x["v"],
        mask=eqa.Causal(2) & eqa.SlidingWindow(5),
        score=(
            eqa.ALiBi(x["slopes"]),
            eqa.RelativeBias(x["table"], max_distance=16),
            eqa.Bias(x["bias"]),
            eqa.ScoreFn(_gated, kv_features=x["gate"], params=x["cap"]),
            eqa.SoftCap(x["cap"]),
        ),
        sinks=x["sinks"],
        scale=x["scale"],
        dropout=0.3,
        key=KEY,
        return_lse=True,
    )
    return jnp.sin(out).sum() + (lse**2).sum()


def _with(name):
    return ft.partial(_loss, ft.partial(eqa.attend, mechanism=MECHANISMS[name]))


_expected = ft.partial(_loss, testing.reference)


@ft.cache
def _expected_product():
    """The Hessian times a direction."""
    x, t = _arguments(), _direction()
    return compiled(lambda x, t: jax.jvp(jax.grad(_expected), (x,), (t,))[1], x, t)


def _direction():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), _arguments())


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_reverse(name):
    x = _arguments()
    expected = compiled(jax.grad(_expected), x)
    assert_close(compiled(jax.grad(_with(name)), x), expected, 1e-12)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_forward(name):
    x, t = _arguments(), _direction()

    def tangent(fn):
        return compiled(lambda x, t: jax.jvp(fn, (x,), (t,)), x, t)

    assert_close(tangent(_with(name)), tangent(_expected), 1e-12)


@pytest.mark.parametrize("moving", ["q", "k", "v", "bias", "sinks", "scale"])
def test_forward_in_one_argument(moving):
    x, t = _arguments(), _direction()

    def tangent(fn):
        along = lambda x, t: jax.jvp(lambda y: fn({**x, moving: y}), (x[moving],), (t,))  # noqa: E731
        return compiled(along, x, t[moving])

    assert_close(tangent(_with("blockwise")), tangent(_expected), 1e-12)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_hessian_vector_product(name):
    x, t = _arguments(), _direction()

    def forward_over_reverse(x, t):
        return jax.jvp(jax.grad(_with(name)), (x,), (t,))[1]

    assert_close(compiled(forward_over_reverse, x, t), _expected_product(), 1e-11)


def test_reverse_over_reverse():
    x, t = _arguments(), _direction()

    def inner(y):
        gradient = jax.grad(_with("blockwise"))(y)
        return sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, t))))

    assert_close(compiled(jax.grad(inner), x), _expected_product(), 1e-11)


def test_reverse_over_forward():
    x, t = _arguments(), _direction()
    inner = lambda y: jax.jvp(_with("blockwise"), (y,), (t,))[1]  # noqa: E731
    assert_close(compiled(jax.grad(inner), x), _expected_product(), 1e-11)


def test_forward_over_forward():
    x, t = _arguments(), _direction()

    def twice(fn):
        once = lambda y: jax.jvp(fn, (y,), (t,))[1]  # noqa: E731
        return compiled(lambda x: jax.jvp(once, (x,), (t,)), x)

    assert_close(twice(_with("blockwise")), twice(_expected), 1e-11)


def test_lse_alone():
    q, k, _ = operands(SHAPE, jnp.float64)

    def loss(attend, q, k):
        return attend(q, k, k, mask=eqa.Causal(), return_lse=True)[1].sum()

    def derivatives(attend):
        def both(q, k):
            fn = ft.partial(loss, attend)
            return [d(fn, argnums=(0, 1))(q, k) for d in (jax.grad, jax.hessian)]

        return compiled(both, q[:, :5], k[:, :5])

    ours = ft.partial(eqa.attend, mechanism=MECHANISMS["blockwise"])
    assert_close(derivatives(ours), derivatives(testing.reference), 1e-11)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_per_example_gradients(name):
    """`vmap` of `grad`: a leaf that examples share has a gradient for each of them."""
    x = _arguments()
    queries = jnp.stack([x["q"], 2 * x["q"], x["q"] + 1])
    gradient = lambda q: jax.grad(_with(name))({**x, "q": q})  # noqa: E731
    one_by_one = list(map(fast_jit(gradient), queries))
    assert_close(
        compiled(jax.vmap(gradient), queries),
        jax.tree.map(lambda *a: jnp.stack(a), *one_by_one),
        1e-12,
    )


def test_per_example_products():
    x, t = _arguments(), _direction()
    biases = jnp.stack([x["bias"], -x["bias"]])

    def product(bias):
        return jax.jvp(jax.grad(_with("blockwise")), ({**x, "bias": bias},), (t,))[1]

    one_by_one = list(map(fast_jit(product), biases))
    expected = jax.tree.map(lambda *a: jnp.stack(a), *one_by_one)
    assert_close(compiled(jax.vmap(product), biases), expected, 1e-11)


def test_gradient_of_a_merge():
    """Split keys, merge partials, and differentiate: as if they had never been split."""
    q, k, v = operands(SHAPE, jnp.float64)

    def split(q, k, v):
        parts = [slice(0, 6), slice(6, 7), slice(7, 17)]
        partials = [
            eqa.attend(
                q,
                k[:, part],
                v[:, part],
                mask=eqa.Causal(),
                kv_positions=jnp.arange(17)[part],
                mechanism=MECHANISMS["blockwise"],
                return_lse=True,
            )
            for part in parts
        ]
        out, lse = eqa.merge(partials)
        return jnp.sin(out).sum() + (lse**2).sum()

    def whole(q, k, v):
        out, lse = testing.reference(q, k, v, mask=eqa.Causal(), return_lse=True)
        return jnp.sin(out).sum() + (lse**2).sum()

    found, expected = (
        compiled(jax.grad(fn, argnums=(0, 1, 2)), q, k, v) for fn in (split, whole)
    )
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_hop_contract(name):
    """`backward`, given the out and lse of all keys, is additive over sets of keys."""
    from eqx_attention._options import as_scale
    from eqx_attention._request import Call, request_of

    args = operands(SHAPE, jnp.float64)
    dout = jnp.asarray(np.random.default_rng(2).standard_normal((2, 13, 4, 5)))
    dlse = jnp.asarray(np.random.default_rng(3).standard_normal((2, 13, 4)))
    mechanism = MECHANISMS[name]

    def request(part, q, k, v):
        call = Call(
            query=q,
            key_=k[:, part],
            value=v[:, part],
            mask=eqa.Causal(),
            score=(eqa.SoftCap(2.0),),
            sinks=None,
            scale=as_scale(0.3),
            key=None,
            q_positions="start",
            kv_positions=jnp.arange(17)[part],
            dropout=0.0,
            precision=None,
            dtype=None,
            platform="cpu",
            shards=None,
        )
        return request_of(call)

    @fast_jit
    def backward(q, k, v, dout, dlse):
        everything = request(slice(0, 17), q, k, v)
        out, lse = mechanism.forward(everything)
        return [
            mechanism.backward(request(part, q, k, v), out, lse, dout, dlse, ())[:3]
            for part in (slice(0, 17), slice(0, 5), slice(5, 17))
        ]

    (dq, dk, dv), *hops = backward(*args, dout, dlse)
    assert_close(sum(h[0] for h in hops), dq, 1e-12)
    assert_close(jnp.concatenate([h[1] for h in hops], axis=1), dk, 1e-12)
    assert_close(jnp.concatenate([h[2] for h in hops], axis=1), dv, 1e-12)
