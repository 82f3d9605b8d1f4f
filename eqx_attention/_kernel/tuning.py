"""Which tiles the kernels use: a table that `python -m eqx_attention.tune` measures."""

import functools as ft
import json
import pathlib
from typing import Any, NamedTuple

from .._axes import ceil_div
from .._mask import Full
from .._mechanism.base import Request
from .._mechanism.negligible import may_be_negligible
from . import backward, hopper_backward, hopper_backward_wide, hopper_forward
from .hidden_values import PART
from .tables import sees_no_later


TABLE = pathlib.Path(__file__).parent / "tuning.json"
# Bytes of shared memory that tiles may take, and registers of a thread.
_SHARED = 225 * 1024
_ALIGNED = 1024
_REGISTERS = {2: 208, 3: 136}  # by the number of warpgroups


class Sizes(NamedTuple):
    """What the choice goes by: the sizes to which heads are padded, and whether there is
    any mask."""

    head_dim: int
    value_dim: int
    masked: bool

    @property
    def narrow(self) -> bool:
        """Whether one warpgroup has the gradients of whole heads in its registers."""
        return max(self.head_dim, self.value_dim) <= 128


def sizes_of(request: Request) -> Sizes:
    sizes = request.query.shape[-1], request.value.shape[-1]
    head_dim, value_dim = (64 * ceil_div(size, 64) for size in sizes)
    masked = not isinstance(request.pairs.mask, Full)
    # The backward shares the gradient of queries out among warpgroups by `head_dim`.
    return Sizes(max(head_dim, value_dim), value_dim, masked)


@ft.cache
def _measured() -> dict[str, dict[Sizes, dict[str, Any]]]:
    table = json.loads(TABLE.read_text())
    return {
        which: {Sizes(**row["sizes"]): row["blocks"] for row in table[which]}
        for which in ("forward", "backward")
    }


def forward_fits(sizes: Sizes, blocks: hopper_forward.Blocks) -> bool:
    """Whether there is room for the forward's tiles."""
    both = sizes.head_dim + sizes.value_dim
    shared = 2 * (blocks.rows * sizes.head_dim + blocks.stages * blocks.key * both)
    # The logits, the output and the weights, of 64 queries in 128 threads.
    registers = blocks.key // 2 + sizes.value_dim // 2 + blocks.key // 4
    room = shared <= _SHARED and registers <= _REGISTERS[blocks.warpgroups]
    return room and blocks.key <= PART * blocks.warpgroups


def backward_fits(sizes: Sizes, blocks: backward.Blocks) -> bool:
    """Whether there is room for the backward's tiles."""
    both = sizes.head_dim + sizes.value_dim
    queries = blocks.stages * sizes.head_dim + blocks.dout_stages * sizes.value_dim
    keys = 2 * blocks.key if sizes.narrow else blocks.key
    # Weights and gradients of logits, twice; and gradients of queries.
    pairs = 4 * blocks.key * blocks.query
    piece = 64 if sizes.narrow else hopper_backward_wide.piece_of(sizes.head_dim)
    added = 2 * 64 * piece
    numbers = 4 * blocks.query * (blocks.stages + blocks.dout_stages + 1)
    shared = 2 * (keys * both + blocks.query * queries + pairs) + 4 * added
    shared += ceil_div(numbers, _ALIGNED) * _ALIGNED
    if sizes.narrow:
        parts = hopper_backward.parts_left_over(sizes.head_dim, sizes.value_dim, blocks)
        shared += 2 * parts * keys * 64
    return shared <= _SHARED + _ALIGNED


def forward_blocks(sizes: Sizes) -> hopper_forward.Blocks:
    found = _measured()["forward"].get(sizes)
    if found is not None:
        return hopper_forward.Blocks(**found)
    blocks = hopper_forward.Blocks()
    return blocks if forward_fits(sizes, blocks) else blocks._replace(key=64)


def backward_kernels(sizes: Sizes) -> Any:
    """The module that has the backward."""
    return hopper_backward if sizes.narrow else hopper_backward_wide


def faster_in_order(request: Request) -> bool:
    """Whether the backward takes less time if gradients of queries are added up in the same
    order each time: where rows do not wait, as each is behind the one before it."""
    narrow = sizes_of(request).narrow
    return narrow and sees_no_later(request) and not may_be_negligible(request)


def backward_blocks(sizes: Sizes, in_order: bool) -> backward.Blocks:
    found: dict[str, Any] | None = _measured()["backward"].get(sizes)
    if found is None:
        found = dict[str, Any](dout_stages=2 if sizes.value_dim <= 128 else 1)
    return backward.Blocks(**found, in_order=in_order)
