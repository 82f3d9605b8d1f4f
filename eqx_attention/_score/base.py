from abc import abstractmethod
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from .._tokens import Bounds, Tile


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


class AbstractBoundedScore(AbstractScore):
    """A score that adds to the logit what does not depend on it, and that knows how much
    it adds to a tile at most: so tiles may be found of which no weight matters."""

    @abstractmethod
    def most(
        self, upper: Any, bounds: Bounds
    ) -> Float[Array, "#head #q_blocks #kv_blocks"]:
        """An upper bound of what it adds to any logit of a tile, for all tiles at once. The
        derivative of what it adds by one of its arrays is no larger than the largest
        distance of positions.

        **Arguments:**

        - `self`, `upper`: the score, each of whose arrays holds the least (the greatest)
            value in each tile, in the dtype of the logits: axes `(head, query block, key
            block, *rest)`.
        - `bounds`: likewise, the least and greatest indices and positions.
        """
