"""Generating text, one byte at a time, through a key-value cache."""

from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .model import Caches, LanguageModel


def pick(
    logits: Float[Array, " vocabulary"],
    temperature: float,
    top_k: int,
    key: PRNGKeyArray,
) -> Int[Array, ""]:
    """Draws a byte from the `top_k` likeliest; at temperature 0, takes the likeliest."""
    if temperature == 0:
        return jnp.argmax(logits)
    largest, indices = jax.lax.top_k(logits, top_k)
    return indices[jr.categorical(key, largest / temperature)]


# The caches are donated, so that appending to them writes in place.
@eqx.filter_jit(donate="all-except-first")
def _next_byte(
    constants: tuple[LanguageModel, Int[Array, " seq"], float, int, PRNGKeyArray],
    caches: Caches,
) -> tuple[Int[Array, ""], Caches]:
    model, tokens, temperature, top_k, key = constants
    logits, caches = model(tokens, caches)
    return pick(logits[-1], temperature, top_k, key), caches


def generate(
    model: LanguageModel,
    prompt: bytes,
    num_bytes: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
) -> Iterator[int]:
    """Continues the prompt. Each byte costs one token's work, not the whole text's.

    **Arguments:**

    - `prompt`: At least one byte.
    - `num_bytes`: How many bytes to yield.
    - `temperature`: Below 1 for likelier text, 0 for the likeliest byte each time.
    - `top_k`: How many bytes to draw from, at most 256.
    - `seed`: Equal seeds give equal text.
    """
    caches = model.init_caches(len(prompt) + num_bytes)
    tokens = jnp.array(list(prompt), jnp.int32)
    for i in range(num_bytes):
        key = jr.fold_in(jr.key(seed), i)
        # All of the prompt at first, and then the byte that was drawn last.
        byte, caches = _next_byte((model, tokens, temperature, top_k, key), caches)
        yield int(byte)
        tokens = byte[None].astype(jnp.int32)
