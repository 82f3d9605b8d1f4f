"""How the forward kernel is cut, and what it holds in shared memory."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._mechanism.base import Request
from .hopper import smem


# Bytes that tiles may take.
_SHARED = 225 * 1024


class Blocks(NamedTuple):
    """How the forward kernel is cut: queries of a warpgroup, keys of a tile, how many tiles
    of keys are in flight, how many warpgroups compute; and whether a warpgroup, if nothing
    is hidden, has the matrix units compute the next tile's logits and the last one's output
    while it computes its softmax."""

    query: int = 64
    key: int = 128
    stages: int = 2
    warpgroups: int = 2
    overlap: bool = False

    @property
    def rows(self) -> int:
        """Queries of a block of threads."""
        return self.query * self.warpgroups


def operands(
    request: Request, blocks: Blocks, head_dim: int, value_dim: int
) -> tuple[Any, bool]:
    """Shared memory for `((queries, keys), (output,))`, and whether there is room for all
    of it: if not, the output takes the place of the others."""
    dtype, result = request.query.dtype, request.result_dtype
    queries = (blocks.warpgroups, blocks.query)
    parts = (
        (
            smem((*queries, head_dim), dtype),
            smem((blocks.stages, blocks.key, head_dim), dtype),
        ),
        (smem((*queries, value_dim), result),),
    )
    keys = blocks.stages * blocks.key * (head_dim + value_dim)
    size = (blocks.rows * head_dim + keys) * dtype.itemsize
    size += blocks.rows * value_dim * jnp.dtype(result).itemsize
    if size > _SHARED:
        return plgpu.RefUnion(*parts), False
    return parts, True
