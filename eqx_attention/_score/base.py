from abc import abstractmethod

import equinox as eqx
from jaxtyping import Array, Float

from .._tokens import Tile


class AbstractScore(eqx.Module):
    """Maps the scaled logit of a (query token, key token) pair to a new logit.

    Scores are elementwise, as masks are; a tuple of scores applies in order. A logit of
    $-\\infty$ hides the pair. Gradients reach every floating-point array of a score.
    """

    @abstractmethod
    def __call__(
        self, logit: Float[Array, "head query key"], tile: Tile
    ) -> Float[Array, "head query key"]:
        """Evaluates the score on a tile.

        **Arguments:**

        - `self`: the score, each of whose arrays is sliced to the tile and has the axes
            `(head, query, key, *rest)`, of size one where it does not have the axis.
        - `logit`: the logits so far, in at least float32.
        - `tile`: the indices, positions and heads of the tile.

        **Returns:**

        The new logits, of the same shape and dtype.
        """
