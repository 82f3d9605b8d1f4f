"""The softmax of the rows of a tile, one tile after another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._mechanism.base import Request
from .._mechanism.hidden import may_hide
from .hopper import along, full, LOG2E, ROW, TILE
from .terms import AtTile


# Of each row: the output so far, the largest logit, and the sum of the weights.
State = tuple[jax.Array, jax.Array, jax.Array]


class Softmax(NamedTuple):
    """Of tiles of a `shape`.

    - `factor`: what makes powers of two of products, or of what scores make of them.
    - `hides`: whether a score may hide a pair.
    - `rate`: that of dropout.
    - `dtype`: that of the weights, for the matrix units.
    """

    shape: tuple[int, int]
    factor: float
    hides: bool
    rate: float
    dtype: Any

    @staticmethod
    def of(request: Request, shape: tuple[int, int], scale: float) -> "Softmax":
        """`scale` is what products are to be multiplied with."""
        dropout = request.pairs.dropout
        return Softmax(
            shape,
            LOG2E * scale,
            may_hide(request),
            0.0 if dropout is None else dropout.rate,
            request.query.dtype,
        )

    def empty(self, value_dim: int) -> State:
        rows = self.shape[0]
        return (
            full((rows, value_dim), 0.0, TILE),
            full((rows,), -jnp.inf, ROW),
            full((rows,), 0.0, ROW),
        )

    def __call__(
        self,
        masked: bool,
        at: dict[str, AtTile],
        products: jax.Array,
        top: jax.Array,
        total: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Unnormalised weights; the new maxima and sums; and by how much the old ones
        shrink. `at` are the terms at the tile."""
        logits = at["logit"](0, products) if "logit" in at else products
        if "visible" in at:
            logits = jnp.where(at["visible"](), logits, -jnp.inf)
        new = jnp.maximum(top, logits.max(axis=1) * self.factor)
        base = jnp.where(new == -jnp.inf, 0.0, new) if masked or self.hides else new
        decay = jnp.exp2(top - base)
        weights = jnp.exp2(logits * self.factor - along(base, self.shape, 0))
        total = total * decay + weights.sum(axis=1)
        if "keep" in at:
            weights = jnp.where(at["keep"](), weights, 0.0)
        return weights.astype(self.dtype), new, total, decay

    def normalised(self, state: State) -> tuple[jax.Array, jax.Array]:
        """`(out, lse)`."""
        out, top, total = state
        inverse, lse = self.ended(top, total)
        rows, channels = out.shape
        return out * along(inverse, (rows, channels), 0), lse

    def ended(self, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the output is to be multiplied with, and lse."""
        lse = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(total)) * (1 / LOG2E))
        return 1 / (jnp.where(total == 0, 1.0, total) * (1 - self.rate)), lse
