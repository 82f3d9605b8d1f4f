"""How masks are made: what their constructors and operators take, and refuse."""

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_attention.testing import Shape

from .helpers import assert_close, MECHANISMS, operands


# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


Q, K, V = operands(Shape((2,), 5, 7, 2, 2, 4, 4))
BOOLEANS = np.random.default_rng(0).random((5, 7)) < 0.6


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_operators_take_boolean_arrays(make):
    array, causal, dense = make(BOOLEANS), eqa.Causal(), eqa.Dense(BOOLEANS)
    for mask, expected in (
        (causal & array, eqa.And((causal, dense))),
        (array & causal, eqa.And((dense, causal))),
        (causal | array, eqa.Or((causal, dense))),
        (array | causal, eqa.Or((dense, causal))),
        (causal & array & ~causal, eqa.And((causal, dense, ~causal))),
    ):
        assert jax.tree.structure(mask) == jax.tree.structure(expected)
        assert (eqa.attend(Q, K, V, mask=mask) == eqa.attend(Q, K, V, mask=expected)).all()


def test_operators_take_traced_arrays():
    @jax.jit
    def fn(array):
        return tuple(
            eqa.attend(Q, K, V, mask=mask)
            for mask in (eqa.Causal() & array, array & eqa.Causal())
        )

    expected = eqa.attend(Q, K, V, mask=eqa.Causal() & eqa.Dense(BOOLEANS))
    for out in fn(BOOLEANS):
        assert_close(out, expected, 1e-6)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_operators_refuse_other_arrays(make):
    for array in (make(np.ones((5, 7), np.float32)), make(np.ones((5, 7), np.int32))):
        for operate in (
            lambda: eqa.Causal() & array,
            lambda: array & eqa.Causal(),
            lambda: eqa.Causal() | array,
            lambda: array | eqa.Causal(),
        ):
            with pytest.raises(TypeError, match=r"(?s)Dense.*array"):
                operate()
    with pytest.raises(TypeError, match=r"#q_len #kv_len.*\(7,\)"):
        assert eqa.Causal() & make(np.ones(7, bool))


@pytest.mark.parametrize("other", [True, 3, None, "causal"])
def test_operators_refuse_all_else(other):
    for operate in (
        lambda: eqa.Causal() & other,
        lambda: other & eqa.Causal(),
        lambda: eqa.Causal() | other,
        lambda: other | eqa.Causal(),
    ):
        with pytest.raises(TypeError, match="unsupported operand"):
            operate()


def test_combinations_are_of_masks():
    for make in (lambda: eqa.Not(3), lambda: eqa.And((eqa.Causal(), 3))):
        with pytest.raises(TypeError, match="mask"):
            make()


@pytest.mark.parametrize("name", list(MECHANISMS))
@pytest.mark.parametrize("lengths", [(4, None), (4, 3), (0, 2), (9, 9)])
@pytest.mark.parametrize("invert", [False, True])
def test_padding_by_numbers(name, lengths, invert):
    kv_length, q_length = lengths
    visible = (jnp.arange(7) < kv_length)[None]
    if q_length is not None:
        visible = visible & (jnp.arange(5) < q_length)[:, None]
    padding, dense = eqa.Padding(kv_length, q_length), eqa.Dense(visible)
    assert jax.tree.leaves(padding) == []
    assert (padding.kv_lengths, padding.q_lengths) == lengths
    padding, dense = (~padding, ~dense) if invert else (padding, dense)
    out = eqa.attend(Q, K, V, mask=padding, mechanism=MECHANISMS[name])
    assert_close(out, eqa.attend(Q, K, V, mask=dense, mechanism="vanilla"), 1e-6)


def test_padding_by_a_number_and_an_array():
    mask = eqa.Padding(6, jnp.array([2, 5]))
    expected = eqa.Padding(jnp.array([6, 6]), jnp.array([2, 5]))
    for mechanism in ("vanilla", eqa.Blockwise(2, 3)):
        outs = [eqa.attend(Q, K, V, mask=m, mechanism=mechanism) for m in (mask, expected)]
        assert_close(*outs, 1e-6)


def test_padding_refuses():
    for make in (
        lambda: eqa.Padding(2.0),
        lambda: eqa.Padding(True),
        lambda: eqa.Padding(None),
        lambda: eqa.Padding(jnp.ones(2)),
    ):
        with pytest.raises(TypeError, match="kv_lengths"):
            make()
    with pytest.raises(ValueError, match=r"Padding\(q_lengths\): expected at least 0"):
        eqa.Padding(3, -1)


@pytest.mark.parametrize(
    "lengths, total, ids",
    [
        ([2, 3], None, [0, 0, 1, 1, 1]),
        ((2, 1), 5, [0, 0, 1, 2, 2]),
        (np.array([2, 0, 1]), None, [0, 0, 2]),
        (jnp.array([3]), 3, [0, 0, 0]),
        (np.array([[1, 2], [3, 0]]), None, [[0, 1, 1], [0, 0, 0]]),
        ([], None, []),
        ([], 3, [0, 0, 0]),
        ([0, 0], None, []),
    ],
)
def test_segments_from_lengths(lengths, total, ids):
    segments = eqa.Segments.from_lengths(lengths, total)
    assert segments.q_ids.tolist() == segments.kv_ids.tolist() == ids
    assert segments.q_ids.dtype == jnp.int32
    if total is not None and len(ids) > 0:
        traced = jax.jit(lambda x: eqa.Segments.from_lengths(x, total))
        assert traced(np.asarray(lengths, np.int32)).q_ids.tolist() == ids


@pytest.mark.parametrize(
    "lengths",
    [[1.0, 2.0], np.zeros(0), [True], None, "ab", 5, np.array(5), [[1, 2], [3]], {3: 4}],
)
def test_segments_from_what_are_no_lengths(lengths):
    with pytest.raises(TypeError, match="lengths"):
        eqa.Segments.from_lengths(lengths)


def test_segments_of_no_total():
    with pytest.raises(TypeError, match="total"):
        eqa.Segments.from_lengths([2], 2.0)  # pyright: ignore


@pytest.mark.parametrize(
    "lengths, total, words",
    [
        ([3, -1], None, "(lengths): expected none < 0, got [ 3 -1]"),
        ([3, -1], 9, "(lengths): expected none < 0, got [ 3 -1]"),
        ([3, 4], 6, "(lengths): expected documents of at most total=6 tokens in all, got"),
        (np.array([[1, 1], [3, 4]]), 6, "(lengths): expected documents of at most total=6"),
        ([3], -1, "(total): expected at least 0, got -1"),
    ],
)
def test_segments_from_wrong_lengths(lengths, total, words):
    with pytest.raises(ValueError) as caught:
        eqa.Segments.from_lengths(lengths, total)
    assert f"Segments.from_lengths{words}" in str(caught.value)


def test_segments_from_traced_lengths():
    with pytest.raises(ValueError, match=r"from_lengths\(total\): expected an integer"):
        jax.jit(eqa.Segments.from_lengths)(jnp.array([1, 2]))
