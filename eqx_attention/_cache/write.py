"""How new tokens come to their slots: nothing else is copied."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from .._keys import Keys


def write(
    buffer: Keys,
    new: Keys,
    slots: Int32[Array, "..."],
    added: Int32[Array, "*batch"],
) -> Keys:
    """Writes the tokens of each sequence.

    **Arguments:**

    - `buffer`: `"*batch slots kv_heads channels"`.
    - `new`: `"*batch n kv_heads channels"`.
    - `slots`: where each of the tokens goes; or where the first one goes, and then all of
        them come one after another.
    - `added`: how many of the tokens, from the first on, are written, if each has a slot
        of its own.
    """
    batch_axes = added.ndim
    run = slots.ndim == batch_axes
    one = _write_run if run else _write_each
    for _ in range(batch_axes):
        one = jax.vmap(one)
    return jax.tree.map(lambda b, x: one(b, x, slots, added), buffer, new)


def _write_run(buffer: Array, new: Array, start: Array, _) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, axis=0)


def _write_each(buffer: Array, new: Array, slots: Array, added: Array) -> Array:
    index = jnp.arange(new.shape[0], dtype=jnp.int32)
    # Padding goes past the end, where it is dropped.
    slot = jnp.where(index < added, slots, buffer.shape[0])
    return buffer.at[slot].set(new, mode="drop", unique_indices=False)


def along(start: Int32[Array, "..."], n: int, step: int = 1) -> Int32[Array, "... n"]:
    """`start`, `start + step`, and so on: `n` numbers along a new last axis."""
    count = jnp.arange(n, dtype=jnp.int32) * step
    return start[..., None] + count.reshape((1,) * start.ndim + count.shape)
