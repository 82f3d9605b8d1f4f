"""Tiles whose weights are too small to matter, as a score such as `ALiBi` makes them.

A logit is at most the product of the norms of its query and its key, plus what the score
adds at most. The log-sum-exp of a row is at least the logit of any one key that it sees.
Where the first is below the second by far enough for all rows of a tile, no weight of the
tile changes what rounding leaves of the row's result.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._axes import Block, blocks as reduce_blocks, over_batch
from .._keys import is_stored
from .._score import AbstractBoundedScore
from .._static import is_array, unwrap
from .._tokens import Bounds, Tokens
from .base import Blocks, Request
from .tile import TileOf


# The fewest queries of a key head, and the fewest keys, for which it pays to look.
_FEWEST = 1024
# Of the products of norms, for the rounding of logits.
_SLACK = 2.0**-10


def may_be_negligible(request: Request) -> bool:
    """Whether a score is there that may make tiles negligible, and it pays to look."""
    score, (q_len, kv_len) = request.pairs.score, request.lengths
    bounded = bool(score) and all(isinstance(s, AbstractBoundedScore) for s in score)
    enough = min(q_len * request.groups, kv_len) >= _FEWEST
    return bounded and enough and not is_stored(request.key_, request.value)


def negligible(
    request: Request, sizes: Blocks, ranges: Bounds
) -> Bool[Array, "batch q_heads q_blocks kv_blocks"]:
    """Which tiles, of so many queries and keys, add nothing.

    All that they hold together is less than a quarter of the rounding of a row's largest
    weight; times the largest distance, by which a gradient multiplies. None is where a
    query or a key has a NaN or an infinity, or a value of the tile does, or where a row
    does not see the key that is looked at.
    """
    request = jax.tree.map(lambda x: lax.stop_gradient(x) if is_array(x) else x, request)
    dtype, pairs = request.dtype, request.pairs

    def of_blocks(x, size, op):
        return jnp.moveaxis(reduce_blocks(x, 1, size, op), 1, 2)

    def longest(x, size, also: Array | bool = True):
        square = jnp.square(x.astype(dtype)).sum(-1)
        square = jnp.where(jnp.isfinite(square) & also, square, jnp.inf)
        return jnp.sqrt(of_blocks(square, size, jnp.max))

    finite = jnp.isfinite(jnp.abs(request.value.astype(dtype)).sum(-1))
    queries = longest(request.query, sizes.query)
    keys = jnp.repeat(longest(request.key_, sizes.key, finite), request.groups, axis=1)
    product = jnp.abs(jnp.asarray(unwrap(pairs.scale), dtype))
    product = product * queries[..., :, None] * keys[..., None, :]
    least = of_blocks(_seen_logits(request), sizes.query, jnp.min)[..., None]
    far = jnp.maximum(
        ranges.upper.kv_position - ranges.lower.q_position,
        ranges.upper.q_position - ranges.lower.kv_position,
    ).max()
    below = math.log(4 / float(jnp.finfo(dtype).eps)) + math.log(request.lengths[1])
    below = below + jnp.log(jnp.maximum(far, 1).astype(dtype))
    # A comparison with a NaN is false.
    most = product * (1 + _SLACK) + _most_added(request, sizes, ranges)
    return most - least < -below


def _most_added(
    request: Request, sizes: Blocks, ranges: Bounds
) -> Float[Array, "#batch #q_heads #q_blocks #kv_blocks"]:
    """The most that the scores add to a logit of each tile."""

    def reduced(op):
        def leaf(x):
            if not is_array(x):
                return x
            if jnp.issubdtype(x.dtype, jnp.floating):
                x = x.astype(request.dtype)
            return reduce_blocks(reduce_blocks(x, 2, sizes.query, op), 3, sizes.key, op)

        return jax.tree.map(leaf, request.pairs.score)

    def most(tree):
        lower, upper, ranges = tree
        return sum(a.most(b, ranges) for a, b in zip(lower, upper, strict=True))

    return over_batch(most, (reduced(jnp.min), reduced(jnp.max), ranges))


def _seen_logits(request: Request) -> Float[Array, "batch q_len q_heads"]:
    """For each query, the logit of one key; minus infinity if it does not see that. Each
    pair is a tile of its own, so that the mask and the scores need not know of it."""
    pairs, (q_len, kv_len) = request.pairs, request.lengths
    batch, _, heads, _ = request.query.shape
    own = _own_keys(pairs.q, pairs.kv, kv_len)

    def chosen(x, index, axis):
        index = index.reshape(*index.shape, *(1,) * (x.ndim - index.ndim))
        return jnp.take_along_axis(x, index, axis, mode="promise_in_bounds")

    def of_pairs(x):
        """From (batch, head, query, key, ...) to (batch * query, head, 1, 1, ...)."""
        if not is_array(x) or x.shape[0] == x.shape[2] == x.shape[3] == 1:
            return x
        if x.shape[3] > 1 and x.shape[2] > 1:
            x = chosen(x, jnp.asarray(own)[:, None, :, None], 3)
        elif x.shape[3] > 1:
            x = chosen(x, jnp.asarray(own)[:, None, None, :], 3).swapaxes(2, 3)
        heads, rest = x.shape[1], x.shape[4:]
        x = jnp.broadcast_to(x, (batch, heads, q_len, 1, *rest))
        return x.swapaxes(1, 2).reshape(batch * q_len, heads, 1, 1, *rest)

    q, kv = (
        Tokens(position, 1, 0, index)
        for index, position in (_said(pairs.q, 2), _said(pairs.kv, 3))
    )
    pairs = dataclasses.replace(pairs, dropout=None, q=q, kv=kv)
    single = dataclasses.replace(request, pairs=jax.tree.map(of_pairs, pairs))
    whole = Block((0, 0, 0, 0), (batch * q_len, heads, 1, 1))

    key_, first = request.key_, own[0, 0]
    if isinstance(own, np.ndarray) and (own[0] == first + np.arange(q_len)).all():
        key_ = lax.slice_in_dim(key_, int(first), int(first) + q_len, axis=1)
    else:
        key_ = chosen(key_, jnp.asarray(own), 1)
    query = request.query.reshape(batch, q_len, -1, request.groups, key_.shape[-1])
    qk = query.astype(request.dtype) * key_.astype(request.dtype)[:, :, :, None]
    logits = TileOf(single, whole).logits(qk.sum(-1).reshape(whole.sizes))
    logits = jnp.where(jnp.isfinite(logits), logits, -jnp.inf)
    return logits.reshape(batch, q_len, heads)


def _own_keys(
    q: Tokens, kv: Tokens, kv_len: int
) -> Int[Array | np.ndarray, "#batch q_len"]:
    """The index of a key for each query that it is likely to see, and to be near to: that
    at its own position where keys are counted, and else that of its own number."""
    if q.counted or not kv.counted:
        shift = q.shift - kv.shift if kv.counted else kv_len - q.length
        return np.clip(np.arange(q.length, dtype=np.int32) + shift, 0, kv_len - 1)[None]
    _, position = _said(q, 2)
    return jnp.clip(position[:, 0, :, 0] - kv.shift, 0, kv_len - 1)


def _said(tokens: Tokens, axis: int) -> tuple[Array, Array]:
    """The index and the position of each query (`axis` 2) or key (3)."""
    shape = [1, 1, 1, 1]
    shape[axis] = tokens.length
    index, position = tokens.index, tokens.position
    if index is None:
        index = jnp.arange(tokens.length, dtype=jnp.int32).reshape(shape)
    return index, index + tokens.shift if position is None else position
