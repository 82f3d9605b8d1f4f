import jax.numpy as jnp
from jaxtyping import Array, Float

from .._axes import axes
from .._static import AnyArray, is_array
from .._tokens import Tile
from .base import AbstractScore


class Bias(AbstractScore):
    """Adds an array to the logits, pair by pair, by index."""

    array: Float[Array, "*batch heads q_len kv_len"] = axes("batch #head #query #key")

    def __init__(self, array: Float[AnyArray, "..."]):
        """**Arguments:**

        - `array`: what is added. It broadcasts against `(*batch, q_heads, q_len, kv_len)`,
            so that `(q_len, kv_len)` will do too. It is differentiable; its gradient has
            its own shape.

        **Raises:** `TypeError` if it is not a floating-point array of at least two axes;
            and, when used, if it does not broadcast.
        """
        if not is_array(array) or not jnp.issubdtype(array.dtype, jnp.floating):
            got = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"Bias(array): expected a floating-point array, got {got}.")
        if array.ndim < 2:
            raise TypeError(
                "Bias(array): expected an array of shape '*#batch #q_heads #q_len "
                f"#kv_len', got shape {array.shape}."
            )
        self.array = jnp.asarray(array)

    def __call__(
        self, logit: Float[Array, "head query key"], tile: Tile
    ) -> Float[Array, "head query key"]:
        return logit + self.array.astype(logit.dtype)
