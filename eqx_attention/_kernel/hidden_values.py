"""Values that are hidden may hold NaN, of which a weight of 0 makes NaN."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .hopper import along, COLUMN, fence, sync, THREADS


# Of the 16 named barriers of a block, of which the forward kernel has those before.
_LOOKED = 9
# So many keys does a warpgroup replace.
PART = 64


def replace_nan(
    finite: jax.Array,
    values: Any,
    found: Any,
    weights: jax.Array,
    total: jax.Array,
    warpgroups: int,
) -> jax.Array:
    """What is not finite in a tile of values, in shared memory, becomes 0; and the sums of
    the rows that do see such a value become NaN, and are returned. Nothing is done if all
    of it is `finite`.

    All warpgroups that compute call this, each with its weights and sums, and each replaces
    at most `PART` keys. `found` is one number a key, in shared memory.
    """
    shape = (weights.shape[0], values.shape[0])
    wg, keys = lax.axis_index("warpgroup"), shape[1]

    def bad(part):
        return (values[part].astype(jnp.float32) * 0.0).sum(axis=1)

    def replace():
        # All have looked, and have read what was found in the last tile.
        sync(_LOOKED, warpgroups * THREADS)

        @pl.when(wg < keys // PART)
        def _():
            own = pl.ds(wg * PART, PART)
            found[own] = bad(own)
            x = values[own]
            finite = jnp.abs(x.astype(jnp.float32)) < jnp.inf
            values[own] = jnp.where(finite, x, jnp.zeros_like(x))

        fence()
        sync(_LOOKED, warpgroups * THREADS)
        each = along(plgpu.load(found, layout=COLUMN), shape, 1)
        seen = weights.astype(jnp.float32) > 0
        return total + jnp.where(seen, each, 0.0).sum(axis=1)

    return lax.cond(finite, lambda: total, replace)
