"""The portable derivatives: a tangent that is linear by construction, and its transpose.

With the weights $p = \\exp(s - \\ell)$ recomputed from the log-sum-exp, and $\\dot s$ the
tangent of the logits,
$$\\dot\\ell = \\sum_j p_j \\dot s_j, \\qquad
  \\dot o = \\sum_j p_j (\\dot s_j v_j + \\dot v_j) - o \\dot\\ell,$$
which is a sum over tiles: nothing is rescaled, and nothing but one tile is ever held. It is
made of differentiable parts, so that JAX can derive it as often as is wanted; tiles are
rematerialised, so that it does so in memory that is linear in the lengths.
"""

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._axes import Block, cut
from .base import AbstractMechanism, Gradients, Request
from .gather import gather_keys, gather_leaf
from .plan import Grid, grid, kinds
from .tile import heads_first, TileOf
from .varying import vary, varying_axes


Tangents = tuple[Array, Array, Array]


def tangent(
    mechanism: AbstractMechanism,
    request: Request,
    out: Array,
    lse: Array,
    tangents: Tangents,
    tleaves: tuple[Array, ...],
    wrt: tuple[int, ...],
) -> tuple[Array, Array]:
    """The tangents of `out` and `lse`: linear in `tangents` (of query, key and value) and
    `tleaves` (of those leaves of `request.pairs` whose numbers are in `wrt`). Of keys that
    are split over devices, with the keys of all."""
    axes = tuple(name for name, _ in request.split.key)
    request, (more,) = gather_keys(request, tangents[1:])
    tangents = (tangents[0], *more)
    if axes:
        tleaves = tuple(gather_leaf(x, axes) for x in tleaves)
    tiles = grid(request, mechanism.blocks(request))
    counts, sizes = tiles.counts, tiles.sizes
    heads = sizes.heads * tiles.groups
    some = kinds(request, tiles, (True, True)).some
    some = jnp.broadcast_to(some, tuple(counts))
    some = some.reshape(-1, counts.query, counts.key)
    primals = (request.query, request.key_, request.value)
    q, k, v, tq, tk, tv = (heads_first(request, x) for x in (*primals, *tangents))
    rows = jnp.where(jnp.isneginf(lse), jnp.inf, lse).swapaxes(1, 2)[..., None]

    def group(_, xs):
        n, some, q_side, kv_side = xs
        start = (n // counts.heads * sizes.batch, n % counts.heads * heads)

        def row(_, xs):
            i, some, (q, tq, lse) = xs

            @jax.checkpoint
            def tile(state, xs):
                j, some, (k, v, tk, tv) = xs

                def compute(state):
                    block = Block(
                        (*start, tiles.starts(0, i), tiles.starts(1, j)),
                        (sizes.batch, heads, sizes.query, sizes.key),
                    )
                    at = TileOf(request, block, (tiles.fresh(0, i), tiles.fresh(1, j)))
                    primals, tangents = (q, k, v), (tq, tk, tv)
                    cuts = tuple(cut(x, block) for x in tleaves)
                    more = at.tangent(primals, tangents, lse[..., 0], wrt, cuts)
                    return state[0] + more[0], state[1] + more[1]

                return lax.cond(eqxi.unvmap_any(some), compute, lambda s: s, state), None

            shape = q.shape[:3]
            state = (request.full((*shape, v.shape[-1])), request.full(shape))
            xs = (jnp.arange(counts.key, dtype=jnp.int32), some, kv_side)
            return None, lax.scan(tile, state, xs)[0]

        xs = (jnp.arange(counts.query, dtype=jnp.int32), some, q_side)
        return None, lax.scan(row, None, xs)[1]

    xs = (
        jnp.arange(counts.batch * counts.heads, dtype=jnp.int32),
        some,
        tuple(_split(x, tiles, 0) for x in (q, tq, rows)),
        tuple(_split(x, tiles, 1) for x in (k, v, tk, tv)),
    )
    _, (tout, tlse) = lax.scan(group, None, xs)
    tout = _join(tout, tiles).swapaxes(1, 2)
    tlse = _join(tlse[..., None], tiles).swapaxes(1, 2)[..., 0]
    tout = tout - out.astype(request.dtype) * tlse[..., None]
    return tout.astype(request.result_dtype), tlse


def transpose(
    mechanism: AbstractMechanism,
    request: Request,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array | None,
    wrt: tuple[int, ...],
) -> Gradients:
    """`mechanism.backward`, by transposition of `tangent`: to be differentiated."""
    dlse = jnp.zeros_like(lse) if dlse is None else dlse
    leaves = jax.tree.leaves(request.pairs)

    def linear(tangents, tleaves):
        return tangent(mechanism, request, out, lse, tangents, tleaves, wrt)

    like = ((request.query, request.key_, request.value), tuple(leaves[n] for n in wrt))
    arguments = jax.tree.map(lambda x: x.astype(request.dtype), like)
    dqkv, dleaves = jax.linear_transpose(linear, *arguments)((dout, dlse))
    return (*(x.astype(request.result_dtype) for x in dqkv), dleaves)


def _split(x: Array, tiles: Grid, axis: int) -> Array:
    """Blocks of queries (`axis` 0) or keys (1), a group being a block of heads of a block
    of the batch: (group, block, batch, head, token, channel)."""
    counts, sizes = tiles.counts, tiles.sizes
    count, size = counts[2 + axis], sizes[2 + axis]
    if tiles.ragged(axis):
        x = jnp.take(x, tiles.indices(axis), axis=2)
    shape = (counts.batch, sizes.batch, counts.heads, -1, count, size, x.shape[-1])
    x = x.reshape(shape).transpose(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(-1, *x.shape[2:])


def _join(x: Array, tiles: Grid) -> Array:
    """The transpose of `_split`, for queries: (batch, head, token, channel)."""
    counts, sizes = tiles.counts, tiles.sizes
    x = x.reshape(counts.batch, counts.heads, *x.shape[1:]).transpose(0, 3, 1, 4, 2, 5, 6)
    x = x.reshape(counts.batch * sizes.batch, -1, *x.shape[4:])
    if not tiles.ragged(0):
        return x.reshape(*x.shape[:2], -1, x.shape[-1])
    zeros = jnp.zeros((*x.shape[:2], tiles.lengths[0], x.shape[-1]), x.dtype)
    zeros = vary(zeros, varying_axes(x))
    return zeros.at[:, :, tiles.indices(0)].add(x)
