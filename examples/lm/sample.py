"""Generating text, one byte at a time, through a key-value cache."""

from collections.abc import Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int

from .caches import CHUNK
from .model import Caches, LanguageModel
from .pick import pick, Sampling


# The caches are donated, so that appending to them writes in place.
@eqx.filter_jit(donate="all-except-first")
def next_bytes(
    constants: tuple[
        LanguageModel, Sampling, Int[Array, "batch seq"], Int[Array, " batch"] | None
    ],
    caches: Caches,
) -> tuple[Int[Array, " batch"], Caches]:
    """Reads the tokens of each sequence, or as many as its length says, and picks the byte
    that comes next."""
    model, sampling, tokens, lengths = constants

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
    - `caches`: Empty ones, from `init_caches`, which are not to be used again.
    - `sampling`: How to draw.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    chunk = min(CHUNK, max(lengths))
    tokens = np.zeros((len(prompts), max(lengths) + -max(lengths) % chunk), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = list(prompt)
    drawn = jnp.zeros(len(prompts), jnp.int32)
    for start in range(0, tokens.shape[1], chunk):
        left = np.clip(lengths - start, 0, chunk)
        part = jnp.asarray(tokens[:, start : start + chunk])
        new, caches = next_bytes((model, sampling, part, jnp.asarray(left)), caches)
        # The byte that follows a prompt is drawn where the prompt ends.
        drawn = jnp.where(left > 0, new, drawn)
    for i in range(num_bytes):
        if i > 0:
            constants = (model, sampling, drawn[:, None], None)
            drawn, caches = next_bytes(constants, caches)
        yield drawn.tolist()
