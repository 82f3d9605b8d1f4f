"""The kit on `jax.nn.dot_product_attention`: it finds the differences that are known, and
no others."""

import dataclasses

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention import testing
from eqx_attention.testing import Case, check


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


def jax_nn(
    query,
    key_,
    value,
    *,
    mask,
    score=(),
    scale=None,
    q_positions="start",
    kv_positions=None,
    return_lse=False,
):
    """`jax.nn.dot_product_attention` with the signature of `attend`, and a dense mask."""
    if value.shape[-1] != key_.shape[-1]:
        raise eqa.UnsupportedError("jax.nn: value_dim must be head_dim")
    if not isinstance(score, eqa.Bias) and score != ():
        raise eqa.UnsupportedError(f"jax.nn: the score {type(score).__name__}")
    if isinstance(scale, jax.Array):
        raise eqa.UnsupportedError("jax.nn: an array as scale")
    if query.ndim > 4:
        raise eqa.UnsupportedError("jax.nn: more than one batch axis")
    *batch, q_len, q_heads, _ = query.shape
    visible = testing.visible_pairs(
        mask,
        tuple(batch),
        q_heads,
        q_len,
        key_.shape[-3],
        q_positions=q_positions,
        kv_positions=kv_positions,
    )
    return jax.nn.dot_product_attention(
        query,
        key_,
        value,
        bias=None if score == () else jnp.broadcast_to(score.array, visible.shape),
        mask=jnp.asarray(visible),
        scale=scale,
        return_residual=return_lse,
    )


@pytest.fixture(autouse=True)
def implicit_promotion():
    """jax.nn relies on it, in its gradient too."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


_SHAPES = ("square", "one_query", "one_kv_head")


def _cases(n, dtype="float32", **fields):
    """Random masks and positions, with options that jax.nn has."""
    common = dict(score=(), sinks=False, scale=0.3, dropout=0.0, poison=False)
    return [
        dataclasses.replace(case, shape=_SHAPES[i % 3], **(common | fields))
        for i, case in enumerate(testing.cases(n, dtype=dtype))
    ]


def _has_empty_rows(case):
    query, key_, _, options, *_ = case.build()
    batch, (q_len, q_heads, _) = query.shape[:-3], query.shape[-3:]
    positions = {n: x for n, x in options.items() if n.endswith("positions")}
    visible = testing.visible_pairs(
        options["mask"], batch, q_heads, q_len, key_.shape[-3], **positions
    )
    return not np.all(np.any(visible, axis=-1))


def _wrong(outcome):
    return {c.name for c in outcome.comparisons if not c.ok}


@pytest.mark.parametrize("dtype, n", [("float32", 28), ("bfloat16", 14)])
def test_empty_rows_are_the_only_difference_in_the_output(dtype, n):
    cases = _cases(n, dtype, return_lse=False)
    report = check(jax_nn, cases=cases, jit=False)
    assert not report.unsupported
    failed = {o.case.name for o in report.failures}
    assert failed == {case.name for case in cases if _has_empty_rows(case)}
    assert 3 < len(failed) < n - 3
    for outcome in report.failures:
        problems = {c.name: c.problem for c in outcome.comparisons}
        assert problems["out"] == "is wrong where no key is visible"


def test_empty_rows_are_the_mean_of_the_values():
    case = Case("empty", mask="nothing", shape="square")
    query, key_, value, options, *_ = case.build()
    mean = jnp.broadcast_to(jnp.mean(value, axis=-3, keepdims=True), value.shape)
    out = jax_nn(query, key_, value, mask=options["mask"])
    np.testing.assert_allclose(out, mean, rtol=0, atol=1e-6)
    ours = eqa.attend(query, key_, value, mask=options["mask"])
    assert not np.any(np.asarray(ours))


def test_the_gradient_of_lse_is_dropped():
    cases = [c for c in _cases(28, return_lse=True) if not _has_empty_rows(c)]
    check(jax_nn, cases=cases, gradients=False, jit=False).raise_on_failure()
    report = check(jax_nn, cases=cases, jit=False)
    # With one visible key a row, or hidden ones, the gradients may happen to be zero.
    assert len(report.failures) == len(cases)
    for outcome in report.failures:
        assert _wrong(outcome) == {"dquery", "dkey_"}


def test_lse_is_cast_to_the_dtype_of_the_inputs():
    cases = [
        Case("causal", mask="causal", shape="square", dtype="bfloat16"),
        Case("bias", score=("bias",), shape="one_kv_head", dtype="bfloat16"),
    ]
    report = check(jax_nn, cases=cases, gradients=False, jit=False)
    for outcome in report.outcomes:
        assert _wrong(outcome) == {"lse"}
        assert "has dtype bfloat16, expected float32" in str(outcome)


def test_hidden_nan_spreads():
    case = Case("nan", mask="keys", shape="square", return_lse=False, poison=True)
    (outcome,) = check(jax_nn, cases=[case], jit=False).failures
    problems = {c.name: c.problem for c in outcome.comparisons}
    assert problems["out"] == problems["dquery"] == "has NaN"


def test_softmax_is_in_single_precision():
    case = Case("double", mask="causal", dtype="float64", return_lse=False)
    (outcome,) = check(jax_nn, cases=[case], jit=False).failures
    assert all(1e-12 < c.error < 1e-5 for c in outcome.comparisons)


def test_what_it_does_not_have():
    cases = [
        Case("sinks", sinks=True),
        Case("dropout", dropout=0.1),
        Case("cap", score=("soft_cap",)),
        Case("scale", scale="array"),
        Case("value_dim", shape="primes"),
        Case("batch", shape=testing.Shape((1, 2), 3, 3, 1, 1, 4, 4)),
    ]
    report = check(jax_nn, cases=cases, jit=False)
    assert len(report.unsupported) == len(cases)
