"""A step of decoding of a whole model, and how much of it are kernels, and those that
attend: the model of examples/train_lm.py, with as many heads, of as many channels, as the
caches here have."""

import functools as ft
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr

from .profile import profiled


# The example's own depth.
DEPTH, STEPS = 3, 20
# In the names of kernels that attend: ours, and cuDNN's.
_ATTENDS = ("eqx_attention", "sdpa", "lean_reduction")


def _model(heads: int, kv_heads: int, dim: int, dtype: Any) -> Any:
    examples = pathlib.Path(__file__).parent.parent.parent / "examples"
    sys.path.insert(0, str(examples))
    from lm.config import RunConfig  # pyright: ignore[reportMissingImports]
    from lm.model import LanguageModel  # pyright: ignore[reportMissingImports]

    config = RunConfig(width=heads * dim, heads=heads, kv_heads=kv_heads, depth=DEPTH)

    @eqx.filter_jit
    def made():
        model = LanguageModel(config, key=jr.key(0))
        cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x  # noqa: E731
        return jax.tree.map(cast, model)

    return made()


def _step_of(model: Any) -> Callable[[Any, Any], Any]:
    """Of caches and tokens, which are donated. `eqx.filter_jit` would wait for each step to
    end before the next one is prepared, as the example does not."""
    arrays, static = eqx.partition(model, eqx.is_array)

    @ft.partial(jax.jit, donate_argnums=(1, 2))
    def step(arrays, caches, tokens):
        model = eqx.combine(arrays, static)

        def one(caches, token):
            logits, caches = model(token[None], caches)
            return caches, logits[0].argmax().astype(token.dtype)

        return jax.vmap(one)(caches, tokens)

    return ft.partial(step, arrays)


def _kernels(run: Any) -> tuple[float, float]:
    """Seconds of all kernels that `run` runs, and of those that attend."""
    events = [event for found in profiled(run).values() for event in found]
    attend = [event for event in events if any(word in event.name for word in _ATTENDS)]
    whole, attending = (
        sum(event.end - event.start for event in found) * 1e-9 for found in (events, attend)
    )
    return whole, attending


def step(batch: int, length: int, heads: tuple[int, int, int], dtype: Any) -> dict:
    """**Arguments:**

    - `batch`, `length`: so many sequences, of nearly so many tokens.
    - `heads`: those of queries, those of keys, and channels.
    """
    model, (_, kv_heads, dim) = _model(*heads, dtype), heads
    shape = (batch, length, kv_heads, dim)
    lengths = jnp.full(batch, length - 4 * STEPS, jnp.int32)

    @jax.jit
    def filled(key):
        k, v = (jr.normal(key, shape, dtype) for key in jr.split(key))
        return eqa.StaticCache(k, v, lengths)

    caches = tuple(filled(key) for key in jr.split(jr.key(1), DEPTH))
    state = [caches, jnp.zeros(batch, jnp.int32)]
    next_of = _step_of(model)

    def run():
        for _ in range(STEPS):
            state[:] = next_of(*state)
        jax.block_until_ready(state)

    run()
    start = time.perf_counter()
    run()
    seconds = (time.perf_counter() - start) / STEPS
    whole, attends = (x / STEPS for x in _kernels(run))
    return {
        "batch": batch,
        "length": length,
        "heads": list(heads),
        "depth": DEPTH,
        "step_us": seconds * 1e6,
        "attention_kernels_us": attends * 1e6,
        "kernels_us": whole * 1e6,
        "of_step": attends / seconds,
        "kernels_of_step": whole / seconds,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "on_error": os.environ.get("EQX_ON_ERROR", "raise"),
        "tokens_s": batch / seconds,
    }
