"""Query heads that read the same keys, as more queries of one head."""

import dataclasses

import jax
import jax.numpy as jnp

from .._static import is_array
from .._tokens import Tokens
from .base import Request


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
