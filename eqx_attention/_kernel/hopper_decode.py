"""Few queries over many keys, on Hopper: the forward kernel, with all query heads that read
one key head in the rows of one tile, and with the keys of each row in several splits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._axes import ceil_div
from .._device import num_multiprocessors
from .._mechanism.base import Request
from .._partial import merge_stacked
from .._static import is_array
from .._tokens import Tokens
from .hopper_forward import Blocks, forward


# A split has at least so many tiles of keys, and of all multiprocessors so many are busy.
_TILES, _BUSY = 4, 0.95


def decode(request: Request, num_splits: int | None) -> tuple[Array, Array]:
    """`(out, lse)`, as of a mechanism; of heads that are padded already."""
    batch, q_len, heads, _ = request.query.shape
    rows = packed(request)
    blocks = blocks_of(rows)
    splits = num_splits or splits_of(rows, blocks)
    out, lse = forward(rows, blocks, splits)
    out, lse = (x.reshape(splits, batch, *x.shape[1:]) for x in (out, lse))
    out, lse = merge_stacked(out, lse)
    shape = (batch, q_len, request.groups, heads // request.groups)
    out = out.reshape(*shape, -1).swapaxes(2, 3)
    lse = lse.reshape(shape).swapaxes(2, 3)
    return out.reshape(batch, q_len, heads, -1), lse.reshape(batch, q_len, heads)


def blocks_of(request: Request) -> Blocks:
    """One warpgroup computes, and as many keys as there is room for are on their way."""
    both = request.query.shape[-1] + request.value.shape[-1]
    blocks = Blocks(64, 64, 2, 1)
    free = 190 * 1024 - 4 * blocks.rows * both
    stages = free // (2 * blocks.key * both)
    return blocks._replace(stages=min(6, max(2, stages)))


def splits_of(request: Request, blocks: Blocks) -> int:
    """The fewest splits with which nearly all multiprocessors are busy."""
    batch, q_len, heads, _ = request.query.shape
    pieces = batch * heads * ceil_div(q_len, blocks.rows)
    programs = num_multiprocessors()
    most = max(1, request.lengths[1] // (_TILES * blocks.key))

    def busy(splits: int) -> float:
        rounds = ceil_div(pieces * splits, programs)
        return pieces * splits / (rounds * programs)

    tried = range(1, min(most, programs) + 1)
    return next((n for n in tried if busy(n) >= _BUSY), max(tried, key=busy))


def packed(request: Request) -> Request:
    """The same, with one query head a key head: what were heads are rows. Its results are
    in the dtype of accumulation."""
    batch, q_len, heads, dim = request.query.shape
    kv_heads, groups = request.key_.shape[2], request.groups
    query = request.query.reshape(batch, q_len, kv_heads, groups, dim)
    query = query.swapaxes(2, 3).reshape(batch, q_len * groups, kv_heads, dim)

    def leaf(x):
        if not is_array(x) or x.shape[1:3] == (1, 1):
            return x
        first, h, q, *rest = x.shape
        split = (kv_heads, groups) if h > 1 else (1, 1)
        x = jnp.moveaxis(x.reshape(first, *split, q, *rest), 2, 3)
        x = jnp.broadcast_to(x, (first, split[0], q_len, groups, *rest))
        return x.reshape(first, split[0], q_len * groups, *rest)

    pairs, count = request.pairs, lambda n: jnp.arange(n, dtype=jnp.int32)  # noqa: E731
    head, q = pairs.head, pairs.q
    head = count(heads)[None, :, None, None] if head is None else head
    index = count(q_len)[None, None, :, None] if q.index is None else q.index
    pairs = dataclasses.replace(pairs, head=head, q=Tokens(q.position, 0, q.shift, index))
    pairs = jax.tree.map(leaf, pairs)
    tokens = dataclasses.replace(pairs.q, length=q_len * groups)
    pairs = dataclasses.replace(pairs, q=tokens)
    kept = dict(query=query, pairs=pairs, result_dtype=request.dtype)
    return dataclasses.replace(request, **kept)
