"""Attention on Hopper to keys and values in 8 bits, of few queries: they are read as they
are stored, and become bfloat16 in shared memory.

A block of threads has one warpgroup that copies, and up to three that compute. Each of
these has tiles of its own, and so a partial of its own. While the matrix units compute the
logits of a tile, its values are converted; while they compute its output, the keys of the
next one are.
"""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._axes import ceil_div
from .._mechanism.base import Request
from .._score import ALiBi, SoftCap
from .eight_bits import (
    await_scales,
    fetch_scales,
    Narrow,
    place_of_scales,
    TOKENS,
    widen,
)
from .hopper import (
    along,
    COLUMN,
    full,
    launch,
    LOG2E,
    ROW,
    smem,
    sync,
    THREADS,
    TILE,
    whole_rows,
)
from .pages import place_of_keys
from .schedule import in_turn, place_of, section
from .tables import never_masked, table
from .terms import folded_scale, keep_fn, logit_fn, Place, terms_of, visible_fn


# Of the 16 named barriers of a block, Mosaic GPU uses the first ones.
_DONE = 8
_ROWS = 64
# Of so many tiles does a warpgroup have scales: of one that it computes, and the next two.
_AHEAD = 3
# What it takes to start a row, in tiles; and bytes that tiles may take.
_START = 4
_SHARED = 225 * 1024


class Blocks8(NamedTuple):
    """How the kernel is cut: how many warpgroups compute, and how many tiles of each are on
    their way."""

    warpgroups: int = 3
    stages: int = 2

    @property
    def rows(self) -> int:
        return _ROWS

    @property
    def key(self) -> int:
        return TOKENS


def blocks_for(head_dim: int, value_dim: int) -> Blocks8:
    """As many warpgroups as there is room for, with at least two tiles each."""
    both, wider = head_dim + value_dim, max(head_dim, value_dim)
    free = _SHARED - 2 * _ROWS * head_dim
    stage, own = TOKENS * both, 4 * _ROWS * wider + 2048
    for warpgroups in (3, 2, 1):
        stages = (free // warpgroups - own) // stage
        if stages >= 2 and (warpgroups < 3 or wider <= 128):
            return Blocks8(warpgroups, min(stages, 4))
    return Blocks8(1, 1)


def forward_8bit(
    request: Request, blocks: Blocks8, splits: int
) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)` of as many partials as there are `splits` times warpgroups, one after
    another along the batch. Keys and values are `Quantized`, or pages of such.

    **Raises:** `NotElementwise` if a mask or a score does more than a kernel can.
    """
    q = whole_rows(request.query)
    k, v = Narrow.of(request.key_), Narrow.of(request.value)
    batch, q_len, heads, head_dim = request.query.shape
    value_dim, wider = v.values.shape[-1], max(head_dim, v.values.shape[-1])
    dtype, result = q.dtype, request.result_dtype
    warpgroups, stages = blocks.warpgroups, blocks.stages
    rows, shape = ceil_div(q_len, _ROWS), (_ROWS, TOKENS)
    tiles = table(request, _ROWS, TOKENS)
    scale = folded_scale(request.pairs)
    may_mask = not never_masked(request, TOKENS)
    terms = terms_of(
        request,
        _ROWS,
        TOKENS,
        {
            "visible": visible_fn(request, TOKENS) if may_mask else None,
            "logit": logit_fn if scale is None else None,
            "keep": keep_fn if request.pairs.dropout is not None else None,
        },
    )
    hides = any(not isinstance(s, ALiBi | SoftCap) for s in request.pairs.score)
    factor = LOG2E * (1.0 if scale is None else scale)
    order = place_of(batch, heads, rows, section(request))
    wide = smem((warpgroups, 2, TOKENS, wider), dtype)

    def place(n):
        """`(batch, head, row of tiles, split)` of the n-th piece of all."""
        b, h, i = order(lax.div(n, splits))
        return b, h, rows - 1 - i, lax.rem(n, splits)

    def cost(n):
        known = not isinstance(tiles.some, Tracer)
        return tiles.some[tiles.at(*place(n)[:3])] + _START if known else jnp.ones_like(n)

    schedule = in_turn(batch * heads * rows * splits, cost)
    turns, pages = schedule.arrays, [*k.pages, *v.pages]

    def kernel(q_ref, k_ref, v_ref, ks_ref, vs_ref, columns_ref, full_ref, some_ref, *refs):
        turn_refs, refs = refs[: len(turns)], refs[len(turns) :]
        page_refs, refs = refs[: len(pages)], refs[len(pages) :]
        *inputs, out_ref, lse_ref = refs[: terms.count + 2]
        first, q_smem, k_smem, v_smem, scales, lse_smem, *barriers = refs[terms.count + 2 :]
        (wide_smem,), (out_smem,) = first
        q_ready, k_ready, v_ready, k_free, v_free = barriers
        k_pages, v_pages = page_refs[: len(k.pages)], page_refs[len(k.pages) :]
        wg, count = lax.axis_index("warpgroup"), schedule.count(turn_refs)

        def work(n):
            """A piece: where it is, the row of its tables, its first tile, and how many
            there are, FULL ones and all."""
            b, h, i, split = place(schedule.piece(turn_refs, n))
            row = tiles.at(b, h, i)
            whole, some = full_ref[row], some_ref[row]
            if splits == 1:
                return (b, h, i, split), row, 0, whole, some
            first, last = (lax.div(n * some, splits) for n in (split, split + 1))
            whole = jnp.clip(whole, first, last) - first
            return (b, h, i, split), row, first, whole, last - first

        def own(wg, number):
            """How many of so many tiles are a warpgroup's: it has each third one, say."""
            return lax.div(number + (warpgroups - 1) - wg, warpgroups)

        def fetch_queries(n):
            (b, h, i, _), *_ = work(n)
            plgpu.copy_gmem_to_smem(
                q_ref.at[b, pl.ds(i * _ROWS, _ROWS), h], q_smem, q_ready
            )

        def compute(n, done):
            """One piece; `done` is how many tiles this warpgroup had before it."""
            (b, h, i, split), row, before, whole, some = work(n)
            q_base, mine = i * _ROWS, own(wg, some)
            given = terms.given(inputs)
            place = Place(b, h, q_base, 0, shape)
            held = {name: term.load(place) for name, term in given.items()}

            def slot_of(j):
                return wg * stages + lax.rem(done + j, stages)

            def key_of(j):
                """The first key of a tile."""
                return columns_ref[(*row, before + wg + warpgroups * j)] * TOKENS

            def key_after(j):
                return key_of(jnp.minimum(j, mine - 1))

            def fetch(j, k_base):
                key_ = place_of_scales(ks_ref, k_pages, b, k_base)
                value = place_of_scales(vs_ref, v_pages, b, k_base)
                fetch_scales(scales.at[wg, lax.rem(j, _AHEAD)], key_, value, h)

            def scales_at(j):
                at = lax.rem(j, _AHEAD)
                return scales.at[wg, at, 0], scales.at[wg, at, 1]

            def operand(which, channels):
                ref = wide_smem.at[wg, which]
                return ref if channels == wider else ref.at[:, pl.ds(0, channels)]

            def widen_keys(j):
                slot = slot_of(j)
                plgpu.barrier_wait(k_ready.at[slot])
                to = operand(0, head_dim)
                widen(k_smem.at[slot], to, scales_at(j)[0], wide.transforms)
                plgpu.barrier_arrive(k_free.at[slot])

            def widen_values(j):
                slot = slot_of(j)
                plgpu.barrier_wait(v_ready.at[slot])
                to = operand(1, value_dim)
                widen(v_smem.at[slot], to, scales_at(j)[1], wide.transforms)
                plgpu.barrier_arrive(v_free.at[slot])

            def loads(masked, j):
                """What the terms are given of a tile."""
                use = [n for n in given if masked or n != "visible"]
                if not use:
                    return None, {}
                k_base = key_of(j)
                here = place._replace(key=k_base)
                return k_base, {n: given[n].load(here, held[n]) for n in use}

            def softmax(masked, j, products, loaded, top, total):
                """Unnormalised weights, times the values' scales, for the matrix units; the
                new maxima and sums; and by how much the old ones shrink."""
                k_base, loaded = loaded
                here = place._replace(key=k_base)
                at = {n: given[n].at(xs, here) for n, xs in loaded.items()}
                by_key, by_value = (
                    along(plgpu.load(x, layout=COLUMN), shape, 1) for x in scales_at(j)
                )
                products = products * by_key
                logits = at["logit"](0, products) if "logit" in at else products
                if "visible" in at:
                    logits = jnp.where(at["visible"](), logits, -jnp.inf)
                new = jnp.maximum(top, logits.max(axis=1) * factor)
                base = jnp.where(new == -jnp.inf, 0.0, new) if masked or hides else new
                decay = jnp.exp2(top - base)
                weights = jnp.exp2(logits * factor - along(base, shape, 0))
                total = total * decay + weights.sum(axis=1)
                scaled = weights * by_value
                if masked or hides:  # Those that are hidden may have any scale.
                    scaled = jnp.where(weights == 0, 0.0, scaled)
                if "keep" in at:
                    scaled = jnp.where(at["keep"](), scaled, 0.0)
                return scaled.astype(dtype), new, total, decay

            def one(masked, j, carry):
                out, top, total, ahead = carry
                # All have converted its keys, and read the values of the last one.
                plgpu.commit_smem()

                def product(acc):
                    plgpu.wgmma(acc, q_smem, operand(0, head_dim).T)
                    fetch(j + 2, ahead)
                    later = key_after(j + 3)
                    loaded = loads(masked, j)
                    widen_values(j)
                    await_scales(1)
                    return acc[...], loaded, later

                accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                products, loaded, ahead = pl.run_scoped(product, accumulator)
                # All have converted its values, and read its keys.
                plgpu.commit_smem()
                weights, top, total, decay = softmax(
                    masked, j, products, loaded, top, total
                )
                out = out * along(decay, out.shape, 0)
                out, weights, top, total = lax.optimization_barrier(
                    (out, weights, top, total)
                )

                def attended(acc):
                    plgpu.wgmma(acc, weights, operand(1, value_dim))
                    pl.when(j + 1 < mine)(ft.partial(widen_keys, j + 1))

                out = pl.run_state(attended)(plgpu.WGMMAAccumulatorRef.init(out))
                # Until here the weights are read, which the compiler does not know.
                out, _ = lax.optimization_barrier((out, weights))
                return out, top, total, ahead

            empty = (
                full((_ROWS, value_dim), 0.0, TILE),
                full((_ROWS,), -jnp.inf, ROW),
                full((_ROWS,), 0.0, ROW),
            )

            def attend():
                fetch(0, key_of(0))
                fetch(1, key_after(1))
                await_scales(1)
                plgpu.commit_smem()
                widen_keys(0)
                carry = (*empty, key_after(2))
                unmasked = own(wg, whole)
                carry = lax.fori_loop(0, unmasked, ft.partial(one, False), carry)
                if may_mask:
                    carry = lax.fori_loop(unmasked, mine, ft.partial(one, True), carry)
                await_scales(0)
                return carry[:3]

            plgpu.barrier_wait(q_ready)
            out, top, total = lax.cond(mine > 0, attend, lambda: empty)
            sync(_DONE, warpgroups * THREADS)  # All have read the queries.
            pl.when((wg == 0) & (n + 1 < count))(ft.partial(fetch_queries, n + 1))
            lse = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(total)) * (1 / LOG2E))
            kept = 1 - request.pairs.dropout.rate if request.pairs.dropout else 1.0
            inverse = 1 / (jnp.where(total == 0, 1.0, total) * kept)
            out = (out * along(inverse, out.shape, 0)).astype(result)
            to = (split * warpgroups + wg) * batch + b
            out_smem[wg] = out
            lse_smem[wg] = lse
            plgpu.commit_smem()
            here = pl.ds(q_base, _ROWS)
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[to, here, h])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[to, h, here])
            plgpu.wait_smem_to_gmem(0)
            # What one warpgroup converts takes the place of what another one copied.
            sync(_DONE, warpgroups * THREADS)
            return done + mine

        @pl.when(wg < warpgroups)
        def _compute():
            plgpu.set_max_registers(160 if warpgroups == 3 else 240, action="increase")
            pl.when(wg == 0)(ft.partial(fetch_queries, jnp.int32(0)))
            lax.fori_loop(0, count, compute, jnp.int32(0))

        def copy(n, done):
            """The tiles of one piece, of each warpgroup in turn; `done` is how many each
            had before it."""
            (b, h, *_), row, before, _, some = work(n)

            def load(j, _):
                def tile(wg, done):
                    turn = done + j
                    slot = wg * stages + lax.rem(turn, stages)
                    k_base = columns_ref[(*row, before + wg + warpgroups * j)] * TOKENS

                    def one(ref, pages, smem, ready, free):
                        keys = (*place_of_keys(ref, pages, b, k_base, TOKENS), h)

                        @pl.when(turn >= stages)
                        def _():
                            plgpu.barrier_wait(free.at[slot])

                        plgpu.copy_gmem_to_smem(ref.at[keys], smem.at[slot], ready.at[slot])

                    one(k_ref, k_pages, k_smem, k_ready, k_free)
                    one(v_ref, v_pages, v_smem, v_ready, v_free)

                for wg in range(warpgroups):
                    there = wg + warpgroups * j < some
                    pl.when(there)(ft.partial(tile, wg, done[wg]))

            lax.fori_loop(0, own(0, some), load, None)
            return tuple(own(wg, some) + before for wg, before in enumerate(done))

        @pl.when(wg == warpgroups)
        def _copy():
            plgpu.set_max_registers(32 if warpgroups == 3 else 24, action="decrease")
            lax.fori_loop(0, count, copy, (jnp.int32(0),) * warpgroups)

    free = ready = plgpu.Barrier(num_barriers=warpgroups * stages)
    parts = splits * warpgroups * batch
    out, lse = launch(
        kernel,
        "decode_8bit",
        schedule.programs,
        warpgroups,
        out_type=(
            jax.ShapeDtypeStruct((parts, *q.shape[1:3], value_dim), result),
            jax.ShapeDtypeStruct((parts, heads, rows * _ROWS), jnp.float32),
        ),
        scratch_types=(
            plgpu.RefUnion((wide,), (smem((warpgroups, _ROWS, value_dim), result),)),
            smem((_ROWS, head_dim), dtype),
            plgpu.SMEM((warpgroups * stages, TOKENS, head_dim), k.values.dtype),
            plgpu.SMEM((warpgroups * stages, TOKENS, value_dim), v.values.dtype),
            plgpu.SMEM((warpgroups, _AHEAD, 2, TOKENS), jnp.float32),
            plgpu.SMEM((warpgroups, _ROWS), jnp.float32),
            plgpu.Barrier(),
            ready,
            ready,
            free,
            free,
        ),
    )(
        q,
        *(k.values, v.values, k.scale, v.scale),
        *(*tiles[:3], *turns, *pages, *terms.arrays),
    )
    return out[:, :q_len], lse[..., :q_len].swapaxes(1, 2)
