"""Generating text, one byte at a time, through a key-value cache."""

import functools as ft
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int

from .caches import CHUNK
from .model import Caches, LanguageModel
from .pick import pick, Sampling


def split(tree: Any) -> tuple[Any, Any]:
    """What a program is compiled for, in a form that is quick to compare, and the arrays
    that it is given."""
    arrays, static = eqx.partition(tree, eqx.is_array)
    leaves, structure = jax.tree.flatten(static)
    return (structure, tuple(leaves)), arrays


# The caches are donated, so that appending to them writes in place. `eqx.filter_jit` would
# wait for each step to end before Python prepares the next one.
@ft.partial(jax.jit, static_argnames="static", donate_argnames="caches")
def next_bytes(
    static: Any,
    arrays: Any,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"] | None,
    caches: Caches,
) -> tuple[Int[Array, " batch"], Caches]:
    """Reads the tokens of each sequence, or as many as its length says, and picks the byte
    that comes next. The first two arguments are a `LanguageModel` and a `Sampling`."""
    model, sampling = eqx.combine(arrays, jax.tree.unflatten(*static))

    def of_one_sequence(row, tokens, length, caches):
        logits, caches = model(tokens, caches, length)
        last = tokens.shape[0] - 1 if length is None else length - 1
        # Each byte of each sequence has random bits of its own.
        key = jr.fold_in(jr.fold_in(jr.key(sampling.sample_seed), row), caches[0].length)
        return pick(logits[last], sampling, key).astype(tokens.dtype), caches

    rows = jnp.arange(tokens.shape[0])
    axes = (0, 0, None if lengths is None else 0, 0)
    return jax.vmap(of_one_sequence, in_axes=axes)(rows, tokens, lengths, caches)


def generate(
    model: LanguageModel,
    prompts: Sequence[bytes],
    num_bytes: int,
    caches: Caches,
    sampling: Sampling,
) -> Iterator[list[int]]:
    """Continues the prompts. Each byte costs one token's work, not the whole text's.

    **Arguments:**

    - `prompts`: Of any lengths, each at least one byte; read in chunks.
    - `num_bytes`: How many bytes each goes on for. Yields one a prompt at a time.
    - `caches`: Empty ones, from `init_caches`, with room for prompts and `num_bytes`.
        They are not to be used again.
    - `sampling`: How to draw.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    chunk = min(CHUNK, max(lengths))
    tokens = np.zeros((len(prompts), max(lengths) + -max(lengths) % chunk), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = list(prompt)
    step = ft.partial(next_bytes, *split((model, sampling)))
    drawn = jnp.zeros(len(prompts), jnp.int32)
    for start in range(0, tokens.shape[1], chunk):
        left = np.clip(lengths - start, 0, chunk)
        part = jnp.asarray(tokens[:, start : start + chunk])
        new, caches = step(part, jnp.asarray(left), caches)
        # The byte that follows a prompt is drawn where the prompt ends.
        drawn = jnp.where(left > 0, new, drawn)
    for num_left in reversed(range(num_bytes)):
        read = drawn
        if num_left:
            # While this byte is shown, the next one is computed.
            drawn, caches = step(read[:, None], None, caches)
        yield read.tolist()
