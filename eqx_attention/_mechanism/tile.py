"""The arithmetic of one tile: its mask, its logits, its gradient and its tangent.

Arrays of a tile have the axes (batch, head, query, key); those of queries have (batch,
query head, query, channel), those of keys (batch, key head, key, channel).
"""

import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._axes import Block, cut, over_batch
from .._static import is_array, unwrap
from .._tokens import places, tile
from .base import Pairs, Request
from .hidden import seen_rows


class TileOf:
    """One tile of a request: `Pairs` sliced to a block, and what follows from that.

    Its arrays have the axes (batch, head, query, key); those of queries that it is given
    have (batch, query head, query, channel), those of keys (batch, key head, key,
    channel).
    """

    def __init__(
        self, request: Request, block: Block, fresh: tuple = (None, None), masked=True
    ):
        """**Arguments:**

        - `request`: all of it.
        - `block`: which queries, keys, heads and batch elements the tile has.
        - `fresh`: the first (query, key) that no earlier tile holds: what comes before is
            hidden. By default, all of the tile is fresh.
        - `masked`: whether to look at the mask: not needed if all is visible.
        """
        self.request = request
        leaves, self.treedef = jax.tree.flatten(request.pairs)
        self.leaves = [cut(x, block) if is_array(x) else x for x in leaves]
        self.pairs: Pairs = jax.tree.unflatten(self.treedef, self.leaves)
        self.tokens = tile(self.pairs.q, self.pairs.kv, self.pairs.head, block)
        self.visible = self._visible(fresh, block) if masked else None

    def _visible(self, fresh, block: Block) -> Bool[Array, "#batch #head #query #key"]:
        def of_mask(tree):
            pairs, tokens = tree
            return pairs.mask.visible(tokens)

        visible = over_batch(of_mask, (self.pairs, self.tokens))
        for axis, first in zip((2, 3), fresh, strict=True):
            if first is not None:
                visible = visible & (places(block, axis) >= first)
        return visible

    def logits(self, qk: Array, wrt: tuple[int, ...] = (), leaves=()) -> Array:
        """Scale, scores and mask, of the dot products of a tile."""
        old = list(self.leaves)
        for n, leaf in zip(wrt, leaves, strict=True):
            old[n] = leaf
        pairs: Pairs = jax.tree.unflatten(self.treedef, old)

        def scaled_and_scored(tree, logit):
            pairs, tokens = tree
            scale = unwrap(pairs.scale)
            logit = logit * (scale.astype(logit.dtype) if is_array(scale) else scale)
            for score in pairs.score:
                logit = score(logit, tokens)
            return logit

        if self.visible is not None and (pairs.score or is_array(pairs.scale)):
            # Where nothing is seen, no derivative of a score may meet a NaN.
            qk = jnp.where(self.visible, qk, 0)
        logits = over_batch(scaled_and_scored, (pairs, self.tokens), qk)
        if self.visible is not None:
            logits = jnp.where(self.visible, logits, -jnp.inf)
        return logits

    def drop(self, weights: Array) -> Array:
        """The weights after dropout, if there is any."""
        dropout = self.pairs.dropout
        if dropout is None:
            return weights
        return jnp.where(dropout.keep(), weights / (1 - dropout.rate), 0)

    @property
    def hides(self) -> bool:
        """Whether the mask, or a score that gives -inf, may hide a pair of this tile."""
        return self.visible is not None or bool(self.pairs.score)

    def clean(self, x: Array) -> Array:
        """Keys and values for the products with weights: weights of 0 must give 0, also
        where a token that is not seen holds a NaN."""
        return jnp.where(jnp.isfinite(x), x, 0) if self.hides else x

    def attended(self, weights: Array, value: Array) -> Array:
        """The weighted sum of values, of those that are seen: 0 times NaN is 0."""
        product = ft.partial(weights_by_keys, self.request)
        if not self.hides:
            return product(weights, value)

        def with_holes():
            seen = (weights > 0).astype(weights.dtype)
            has = lambda x: product(seen, x.astype(weights.dtype)) > 0  # noqa: E731
            more, less = has(jnp.isposinf(value)), has(jnp.isneginf(value))
            out = product(weights, self.clean(value))
            out = jnp.where(more, jnp.inf, jnp.where(less, -jnp.inf, out))
            return jnp.where((more & less) | has(jnp.isnan(value)), jnp.nan, out)

        plain = ft.partial(product, weights, value)
        finite = jnp.isfinite(value.sum(dtype=self.request.dtype))
        return lax.cond(finite, plain, with_holes)

    def gradient(self, q, k, v, rows: tuple[Array, Array, Array], wrt: tuple[int, ...]):
        """The tile's part of the gradient, `(dq, dk, dv, dleaves)`.

        **Arguments:**

        - `q`, `k`, `v`: those of the tile, heads first.
        - `rows`: `(lse, dout, delta)` of the queries of the tile: see `row_terms`.
        - `wrt`: which of the leaves of `request.pairs` to differentiate, by number.
        """
        request, (lse, dout, delta) = self.request, rows
        k, v = self.clean(k), self.clean(v)
        qk = queries_by_keys(request, q, k)
        leaves = tuple(self.leaves[n] for n in wrt)
        logits, pull = jax.vjp(lambda qk, xs: self.logits(qk, wrt, xs), qk, leaves)
        weights = jnp.exp(logits - lse[..., None])
        dweights = self.drop(queries_by_keys(request, dout, v))
        dlogits = weights * (dweights - delta[..., None])
        dqk, dleaves = pull(dlogits)
        dq = weights_by_keys(request, dqk, k)
        dk = weights_by_queries(request, dqk, q)
        dv = weights_by_queries(request, self.drop(weights), dout)
        return dq, dk, dv, dleaves

    def tangent(self, primals, tangents, lse, wrt: tuple[int, ...], tleaves):
        """This tile's part of the tangent of `out` and `lse`, but for the term
        `-out * dlse` of the former. Linear in `tangents` and `tleaves`."""
        request, (q, k, v), (tq, tk, tv) = self.request, primals, tangents
        leaves = tuple(self.leaves[n] for n in wrt)

        def of_inputs(q, k, leaves):
            return self.logits(queries_by_keys(request, q, k), wrt, leaves)

        k = self.clean(k)
        primal, tangent = (q, k, leaves), (tq, tk, tuple(tleaves))
        logits, tlogits = jax.jvp(of_inputs, primal, tangent)
        weights = jnp.exp(logits - lse[..., None])
        moved = weights * tlogits
        tout = weights_by_keys(request, self.drop(moved), self.clean(v))
        tout = tout + weights_by_keys(request, self.drop(weights), tv)
        return tout, moved.sum(-1)


def queries_by_keys(request: Request, q: Array, k: Array) -> Array:
    """`q kᵀ`: (batch, query head, query, key)."""
    return _product(request, _grouped(q, k.shape[1]), k, 3, 3, q.shape[:3])


def weights_by_keys(request: Request, p: Array, k: Array) -> Array:
    """`p k`: (batch, query head, query, channel)."""
    return _product(request, _grouped(p, k.shape[1]), k, 3, 2, p.shape[:3])


def weights_by_queries(request: Request, p: Array, q: Array) -> Array:
    """`pᵀ q`, summed over the query heads of each key head: (batch, key head, key,
    channel)."""
    heads = p.shape[1] // request.groups
    p, q = _grouped(p, heads), _grouped(q, heads)
    return _product(request, p, q, 2, 2, (*p.shape[:2], p.shape[3]))


def _grouped(x: Array, heads: int) -> Array:
    """All rows of the query heads that read one key head, as the rows of that head."""
    return x.reshape(x.shape[0], heads, -1, x.shape[-1])


def _product(request: Request, a: Array, b: Array, axis_a: int, axis_b: int, shape):
    out = lax.dot_general(
        a.astype(request.operand_dtype),
        b.astype(request.operand_dtype),
        (((axis_a,), (axis_b,)), ((0, 1), (0, 1))),
        precision=request.precision,
        preferred_element_type=request.dtype,
    )
    return out.reshape(*shape, out.shape[-1])


def heads_first(request: Request, x: Float[Array, "batch len heads channels"]) -> Array:
    """As tiles have it: `(batch, heads, len, channels)`, in the dtype of products."""
    return x.transpose(0, 2, 1, 3).astype(request.operand_dtype)


def tokens_first(x: Float[Array, "batch heads len channels"]) -> Array:
    """As requests have it: `(batch, len, heads, channels)`."""
    return x.transpose(0, 2, 1, 3)


def row_terms(request: Request, out, lse, dout, dlse):
    """What the gradient needs of each row, heads first: `(q, (lse, dout, delta))`, as by
    `seen_rows`."""
    q = jnp.where(jnp.isneginf(lse)[..., None], 0, request.query)
    rows = seen_rows(request, out, lse, dout, dlse)
    lse, dout, delta = (x.swapaxes(1, 2) for x in rows)
    return heads_first(request, q), (lse, dout, delta)
