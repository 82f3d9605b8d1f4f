"""Every mechanism against the independent float64 reference, over generated cases."""

import eqx_attention as eqa
import jax
import pytest
from eqx_attention import testing


NAMES = ["vanilla", "blockwise", "auto"]
CHUNK = 10


def _chunk(n: int, dtype: str):
    """The n-th of the chunks into which cases are cut, so that processes share them."""
    return testing.cases((n + 1) * CHUNK, dtype=dtype)[n * CHUNK :]


def _check_all(cases):
    # In one test, so that the mechanisms share the reference of each case.
    for name in NAMES:
        testing.check(name, cases=cases).raise_on_failure()


def test_float64():
    _check_all(testing.cases(6, dtype="float64"))


@pytest.mark.parametrize(
    "block_q, block_k", [(1, 1), pytest.param(8, 5, marks=pytest.mark.thorough)]
)
def test_blocks(block_q, block_k):
    mechanism = eqa.Blockwise(block_q=block_q, block_k=block_k)
    cases = testing.cases(4, seed=1, dtype="float64")
    testing.check(mechanism, cases=cases).raise_on_failure()


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        pytest.param("float32", marks=pytest.mark.slow),
        pytest.param("float16", marks=pytest.mark.slow),
    ],
)
def test_narrow(dtype):
    cases = testing.cases(4, seed=2, dtype=dtype)
    for name in ("vanilla", "blockwise"):
        testing.check(name, cases=cases).raise_on_failure()


@pytest.mark.thorough
@pytest.mark.parametrize("n", range(30))
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_many(dtype, n):
    """300 cases of each dtype."""
    _check_all(_chunk(n, dtype))


@pytest.mark.slow
def test_eager():
    cases = testing.cases(2, seed=3, dtype="float64")
    testing.check("blockwise", cases=cases, jit=False).raise_on_failure()


@pytest.mark.thorough
@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize(
    "mechanism, axes",
    [
        ("all_gather", {"sequence": "a"}),
        ("ulysses", {"sequence": "a"}),
        (eqa.Ulysses(inner="all_gather"), {"sequence": ("b", "a")}),
        ("blockwise", {"key_sequence": ("a", "b")}),
        ("vanilla", {"query_sequence": "b", "key_sequence": "a"}),
    ],
)
def test_over_a_mesh(mechanism, axes, n):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=kinds)
    options = dict(mechanism=mechanism, sharding=eqa.Sharding(**axes), mesh=mesh)

    def attend(query, key_, value, **kwargs):
        return eqa.attend(query, key_, value, **options, **kwargs)

    testing.check(attend, cases=_chunk(n, "float64")).raise_on_failure()
