"""Which byte comes next: the likeliest, or one drawn from some of the likeliest."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .config import flag, option


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How bytes are drawn: at a temperature, from the `top_k` likeliest, and of these from
    the fewest that have a probability of `top_p` together.

    **Raises:** a `ValueError` that names the flag, for what is no number to draw by.
    """

    temperature: float = option(0.7, "below 1 for likelier text; 0 is greedy")
    top_k: int = option(40, "bytes to draw from")
    top_p: float = option(
        1.0, "draw from the likeliest bytes, no more than have this probability together"
    )
    sample_seed: int = option(0, "equal seeds give equal text")

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be >= 0; got {self.temperature}")
        if not 1 <= self.top_k <= 256:
            raise ValueError(f"--top-k must be in [1, 256]; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be in (0, 1]; got {self.top_p}")
        if not 0 <= self.sample_seed < 2**32:
            name = flag("sample_seed")
            raise ValueError(f"{name} must be in [0, 2**32); got {self.sample_seed}")


def keep_top_k(logits: Float[Array, " vocabulary"], k: int) -> Float[Array, " vocabulary"]:
    """The `k` largest; -inf for all others."""
    largest, indices = jax.lax.top_k(logits, k)
    return jnp.full_like(logits, -jnp.inf).at[indices].set(largest)


def keep_top_p(
    logits: Float[Array, " vocabulary"], p: float
) -> Float[Array, " vocabulary"]:
    """The fewest of the largest whose probabilities add up to `p` or more, and never none;
    -inf for all others."""
    order = jnp.argsort(logits, descending=True)
    probabilities = jax.nn.softmax(logits)[order]
    likelier = jnp.cumsum(probabilities) - probabilities  # than each, together
    kept = jnp.zeros(logits.shape, bool).at[order].set(likelier < p)
    return jnp.where(kept, logits, -jnp.inf)


def pick(
    logits: Float[Array, " vocabulary"], sampling: Sampling, key: PRNGKeyArray
) -> Int[Array, ""]:
    if sampling.temperature == 0:
        return jnp.argmax(logits)
    logits = keep_top_k(logits / sampling.temperature, sampling.top_k)
    # Of a sum that is 1 but for rounding, the last few may be beyond the end.
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return jr.categorical(key, logits)
