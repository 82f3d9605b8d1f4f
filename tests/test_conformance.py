"""Every mechanism against the independent float64 reference, over generated cases."""

import eqx_attention as eqa
import pytest
from eqx_attention import testing


NAMES = ["vanilla", "blockwise", "auto"]
CHUNK = 20


def _chunk(n: int, dtype: str):
    """The n-th of the chunks into which cases are cut, so that processes share them."""
    return testing.cases((n + 1) * CHUNK, dtype=dtype)[n * CHUNK :]


@pytest.mark.parametrize("n", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_float64(name, n):
    testing.check(name, cases=_chunk(n, "float64")).raise_on_failure()


@pytest.mark.thorough
@pytest.mark.parametrize("n", range(5, 15))
@pytest.mark.parametrize("name", NAMES)
def test_float64_more(name, n):
    testing.check(name, cases=_chunk(n, "float64")).raise_on_failure()


@pytest.mark.parametrize("block_q, block_k", [(1, 1), (8, 5), (16, 64)])
def test_blocks(block_q, block_k):
    mechanism = eqa.Blockwise(block_q=block_q, block_k=block_k)
    cases = testing.cases(CHUNK, seed=1, dtype="float64")
    testing.check(mechanism, cases=cases).raise_on_failure()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["vanilla", "blockwise"])
def test_narrow(name, dtype):
    cases = testing.cases(CHUNK, seed=2, dtype=dtype)
    testing.check(name, cases=cases).raise_on_failure()


@pytest.mark.thorough
@pytest.mark.parametrize("n", range(15))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_more(name, dtype, n):
    testing.check(name, cases=_chunk(n, dtype)).raise_on_failure()


def test_eager():
    cases = testing.cases(6, seed=3, dtype="float64")
    testing.check("blockwise", cases=cases, jit=False).raise_on_failure()
