"""Damaged files, wrong calls, and many calls: nothing crashes, leaks or compiles again."""

import gc
import pathlib
import re
import subprocess
import sys

import eqx_attention as eqa
import hypothesis
import jax
import jax.numpy as jnp
import pytest

from . import fuzz_calls, fuzz_load
from .helpers import fast_jit, operands, Shape


_root = pathlib.Path(__file__).parent.parent

# Left out on the newest jax: what this is about is our own.
pytestmark = pytest.mark.slow


def test_damaged_files(tmp_path):
    results = fuzz_load.fuzz(210, 1, tmp_path)
    assert results.failures == []
    assert set(results.counts) == {*fuzz_load.FILES, "config"}
    for kind, counts in results.counts.items():
        assert counts["SerialisationError"] >= 10, kind
    # Of what was changed, some can still be read.
    for kind in ("shapes", "dtypes", "checksums", "payload"):
        assert results.counts[kind]["loaded"] > 0, kind


@pytest.mark.thorough
def test_ten_thousand_damaged_files():
    """In a process that may have only so much memory."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_load", "--count=10000"],
        capture_output=True,
        text=True,
        cwd=_root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"10,000 in all; (\d+) MiB more memory", done.stdout)
    assert found is not None and int(found[1]) < 512


@pytest.fixture(scope="module")
def every_frame():
    """Tracebacks tell which library an error comes from; and JAX is as users have it."""
    before = jax.config.jax_traceback_filtering  # pyright: ignore
    jax.config.update("jax_traceback_filtering", "off")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_traceback_filtering", before)


@hypothesis.settings(max_examples=60)
@hypothesis.given(fuzz_calls.calls)
def test_wrong_calls(every_frame, call):
    fuzz_calls.outcome(*call)


@pytest.mark.thorough
@hypothesis.settings(max_examples=2000)
@hypothesis.given(fuzz_calls.calls)
def test_two_thousand_wrong_calls(every_frame, call):
    hypothesis.event(fuzz_calls.outcome(*call))


def test_calls_that_should_fail_the_fuzzing(every_frame):
    def silent():
        raise ValueError

    with pytest.raises(AssertionError, match="says nothing"):
        fuzz_calls.outcome(silent, (), {})
    with pytest.raises(AssertionError, match="jax.lax.dot"):
        fuzz_calls.outcome(lambda: jax.lax.dot(jnp.ones(2), jnp.ones(3)), (), {})
    with pytest.raises(KeyError):
        fuzz_calls.outcome(lambda: {}["x"], (), {})


@pytest.fixture
def compilations():
    """The number so far, as the one item of a list."""
    count = [0]

    def listen(event, duration, **kwargs):
        count[0] += "backend_compile" in event

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def _memory() -> int:
    """The bytes of this process that are in memory."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def _train(query, key_, value, key):
    def loss(x):
        options = dict(mask=eqa.Causal() & eqa.SlidingWindow(3), dropout=0.1, key=key)
        return eqa.attend(*x, score=eqa.SoftCap(5.0), **options).sum()

    return jax.grad(loss)((query, key_, value))[0]


def _decode(query, key_, value, cache):
    cache = cache.append(key_, value)
    return cache.attend(query, mask=eqa.Causal()), cache


def test_a_thousand_calls(compilations):
    """No call but the first compiles, and none leaves anything behind."""
    train, decode = fast_jit(_train), fast_jit(_decode)
    query, key_, value = operands(Shape((), 4, 4, 2, 1, 4, 4))
    token = (query[:1], key_[:1], value[:1])
    cache = eqa.RollingCache.init(4, 1, 4)
    keys = list(jax.random.split(jax.random.key(0), 1000))

    def calls(n: int):
        nonlocal cache
        for i in range(n):
            dquery = train(query, key_, value, keys[i])
            out, cache = decode(*token, cache)
            alone = eqa.attend(query, key_, value, mask=eqa.Causal())
        jax.block_until_ready((dquery, out, alone))
        gc.collect()
        return len(jax.live_arrays()), _memory()

    arrays, _ = calls(10)
    compiled, (_, memory) = compilations[0], calls(100)
    assert compiled > 0
    after = calls(1000)
    assert compilations[0] == compiled
    assert after[0] == arrays
    assert after[1] - memory < 2**22
