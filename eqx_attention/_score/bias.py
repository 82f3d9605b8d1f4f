from jaxtyping import Array, Float

from .._arguments import as_array
from .._axes import axes
from .._static import AnyArray
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
        self.array = _array(array)

    def __check_init__(self):
        _array(self.array)

    def __call__(
        self, logit: Float[Array, "head query key"], tile: Tile
    ) -> Float[Array, "head query key"]:
        return logit + self.array.astype(logit.dtype)


def _array(x) -> Array:
    return as_array("Bias(array)", x, "floating-point numbers", "... #q_len #kv_len")
