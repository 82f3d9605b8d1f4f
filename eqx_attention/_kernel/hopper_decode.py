"""Few queries over many keys, on Hopper: a kernel with all query heads that read one key
head in the rows of one tile, and with the keys of each row in several splits. There is
one for keys in 16 bits, and one for those in 8."""

from jaxtyping import Array

from .._axes import ceil_div
from .._device import num_multiprocessors
from .._mechanism.base import Request
from .eight_bits import in_8_bits
from .head_rows import HeadRows
from .hopper_decode_8bit import Blocks8, blocks_for as blocks_for_8, forward_8bit
from .hopper_decode_16bit import Blocks16, blocks_for as blocks_for_16, forward_16bit


# A split has at least so many tiles of keys for each warpgroup that has tiles of its own,
# and of all multiprocessors so many are busy.
_TILES, _BUSY = 4, 0.95


def decode(request: Request, num_splits: int | None) -> tuple[Array, Array]:
    """`(out, lse)`, as of a mechanism; of heads that are padded already."""
    blocks = blocks_of(request)
    tiles = ceil_div(request.lengths[1], blocks.key)
    splits = min(num_splits, tiles) if num_splits else splits_of(request, blocks)
    if isinstance(blocks, Blocks8):
        return forward_8bit(request, blocks, splits)
    return forward_16bit(request, blocks, splits)


def blocks_of(request: Request) -> Blocks16 | Blocks8:
    """As many keys as there is room for are on their way."""
    head_dim, value_dim = request.query.shape[-1], request.value.shape[-1]
    if in_8_bits(request.key_):
        return blocks_for_8(head_dim, value_dim, HeadRows.of(request).count)
    return blocks_for_16(head_dim, value_dim)


def splits_of(request: Request, blocks: Blocks16 | Blocks8) -> int:
    """The fewest splits with which nearly all multiprocessors are busy."""
    batch, heads = request.key_.shape[0], request.key_.shape[2]
    pieces = batch * heads * ceil_div(HeadRows.of(request).count, blocks.rows)
    programs = num_multiprocessors()
    most = max(1, request.lengths[1] // (_TILES * blocks.key * blocks.warpgroups))

    def busy(splits: int) -> float:
        rounds = ceil_div(pieces * splits, programs)
        return pieces * splits / (rounds * programs)

    tried = range(1, min(most, programs) + 1)
    return next((n for n in tried if busy(n) >= _BUSY), max(tried, key=busy))
