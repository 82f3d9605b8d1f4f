"""What masks, scores and mechanisms of your own are made of.

Imported when it is first used. Nothing here is needed to attend.
"""

from ._axes import add as add, axes as axes, Block as Block, cut as cut
from ._mask.base import Summary as Summary
from ._mechanism.base import Blocks as Blocks, Pairs as Pairs, Request as Request
from ._mechanism.tile import (
    heads_first as heads_first,
    queries_by_keys as queries_by_keys,
    row_terms as row_terms,
    TileOf as TileOf,
    tokens_first as tokens_first,
)
from ._tokens import Bounds as Bounds, Tile as Tile
