"""Few queries over many keys, on Hopper: a kernel with all query heads that read one key
head in the rows of one tile, and with the keys of each row in several splits. It is the
forward kernel, or, for keys in 8 bits, one of their own."""

from jaxtyping import Array

from .._axes import ceil_div
from .._device import num_multiprocessors
from .._mechanism.base import Request
from .._mechanism.packed import packed, unpacked
from .._partial import merge_stacked
from .eight_bits import in_8_bits
from .hopper_decode_8bit import Blocks8, blocks_for, forward_8bit
from .hopper_forward import Blocks, forward


# A split has at least so many tiles of keys for each warpgroup that has tiles of its own,
# and of all multiprocessors so many are busy.
_TILES, _BUSY = 4, 0.95


def decode(request: Request, num_splits: int | None) -> tuple[Array, Array]:
    """`(out, lse)`, as of a mechanism; of heads that are padded already."""
    rows, batch = packed(request), request.query.shape[0]
    blocks = blocks_of(rows)
    tiles = ceil_div(request.lengths[1], blocks.key)
    splits = min(num_splits, tiles) if num_splits else splits_of(rows, blocks)
    if isinstance(blocks, Blocks8):
        out, lse = forward_8bit(rows, blocks, splits)
    else:
        out, lse = forward(rows, blocks, splits)
    out, lse = (x.reshape(-1, batch, *x.shape[1:]) for x in (out, lse))
    return unpacked(request, *merge_stacked(out, lse))


def blocks_of(request: Request) -> Blocks | Blocks8:
    """As many keys as there is room for are on their way; of 16 bits, to one warpgroup."""
    if in_8_bits(request.key_):
        _, q_len, _, head_dim = request.query.shape
        return blocks_for(head_dim, request.value.shape[-1], q_len)
    both = request.query.shape[-1] + request.value.shape[-1]
    blocks = Blocks(64, 64, 2, 1)
    free = 190 * 1024 - 4 * blocks.rows * both
    stages = free // (2 * blocks.key * both)
    return blocks._replace(stages=min(6, max(2, stages)))


def splits_of(request: Request, blocks: Blocks | Blocks8) -> int:
    """The fewest splits with which nearly all multiprocessors are busy."""
    batch, q_len, heads, _ = request.query.shape
    pieces = batch * heads * ceil_div(q_len, blocks.rows)
    programs = num_multiprocessors()
    most = max(1, request.lengths[1] // (_TILES * blocks.key * blocks.warpgroups))

    def busy(splits: int) -> float:
        rounds = ceil_div(pieces * splits, programs)
        return pieces * splits / (rounds * programs)

    tried = range(1, min(most, programs) + 1)
    return next((n for n in tried if busy(n) >= _BUSY), max(tried, key=busy))
