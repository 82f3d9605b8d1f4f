"""Attention on Hopper to keys and values in 8 bits, of few queries: they are read as they
are stored, and become bfloat16 in registers.

A block of threads has one warpgroup that copies, and up to three that compute. Each of
these has tiles of its own, and each of its warps some keys of each tile: see `few_rows.py`.
What the warps of a block have is merged, and then what all blocks have of a row, by the one
that is the last of them: see `merge_rows.py`.
"""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._axes import ceil_div
from .._mechanism.base import Request
from .._mechanism.packed import packed
from .eight_bits import (
    await_scales,
    fetch_scales,
    find_nan,
    Narrow,
    place_of_scales,
    TOKENS,
)
from .few_rows import (
    add_values,
    COLUMNS,
    largest,
    LAYOUTS,
    OUT,
    OUT_ROWS,
    own_sum,
    products,
    ROWS,
    TILE,
    whole_sum,
    write,
)
from .head_rows import fetch_rows, HeadRows, pairs_of
from .hopper import fill, full, launch, smem, sync, THREADS
from .merge_rows import is_last, merge_rows
from .pages import Stored
from .row_tiles import row_tiles, schedule_of
from .schedule import place_of_split, section, tiles_of_split
from .softmax import Softmax
from .terms import forward_terms, Place, RowTerms


# Of the 16 named barriers of a block, Mosaic GPU uses the first ones.
_DONE = 8
_WARPS = 4  # of a warpgroup
# Of so many tiles does a warpgroup have scales: of one that it computes, and the next two.
_AHEAD = 3
# What it takes to start a row, in tiles; and bytes that tiles may take.
_START = 4
_SHARED = 225 * 1024


class Blocks8(NamedTuple):
    """How the kernel is cut: how many warpgroups compute, how many tiles of each are on
    their way, and rows of a tile."""

    warpgroups: int = 3
    stages: int = 4
    rows: int = 8

    @property
    def key(self) -> int:
        return TOKENS


def blocks_for(head_dim: int, value_dim: int, q_len: int = 1) -> Blocks8:
    """As many warpgroups as there are registers for, and as many tiles as there is room
    for."""
    rows = 8 if q_len <= 8 else 16
    warpgroups = 3 if max(head_dim, value_dim) <= 128 else 2
    scales = warpgroups * _AHEAD * 2 * TOKENS * 4
    free = _SHARED - 2 * OUT_ROWS * head_dim - scales
    stages = free // (warpgroups * TOKENS * (head_dim + value_dim))
    return Blocks8(warpgroups, min(stages, 4), rows)


def forward_8bit(
    request: Request, blocks: Blocks8, splits: int
) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)`, as of a mechanism; `out` is in the result's dtype. The tiles of each
    row are in so many splits. Keys and values are `Quantized`, or pages of such.

    **Raises:** `NotElementwise` if a mask or a score does more than a kernel can.
    """
    k, v = Narrow.of(request.key_), Narrow.of(request.value)
    own, rows = HeadRows.of(request), packed(request)
    q, result = request.query, request.result_dtype
    batch, _, heads, head_dim = rows.query.shape
    value_dim = v.values.shape[-1]
    dtype, (warpgroups, stages, block) = q.dtype, blocks
    count, shape = ceil_div(own.count, block), (block, TOKENS)
    tiles = row_tiles(rows, block, TOKENS)
    terms, scale = forward_terms(rows, block, TOKENS)
    soft = Softmax.of(rows, shape, scale)
    place = place_of_split(batch, heads, count, section(rows), splits)
    q_type = smem((OUT_ROWS, head_dim), dtype)
    k_type, v_type = (
        smem((warpgroups * stages, TOKENS, x.values.shape[-1]), x.values.dtype)
        for x in (k, v)
    )

    schedule = schedule_of(tiles, batch * heads * count * splits, place, _START)
    turns, pages, lists = schedule.arrays, [*k.pages, *v.pages], tiles.arrays
    counters = [jax.new_ref(jnp.zeros((batch, heads, count), jnp.int32))]
    counters = counters if splits > 1 else []
    warps, threads = warpgroups * _WARPS, warpgroups * THREADS
    types = [(batch, result), (splits * warps * batch, jnp.float32)]
    types += [(splits * batch, jnp.float32)] if splits > 1 else []

    def kernel(q_ref, k_ref, v_ref, ks_ref, vs_ref, *refs):
        tile_refs, refs = refs[: len(lists)], refs[len(lists) :]
        turn_refs, refs = refs[: len(turns)], refs[len(turns) :]
        page_refs, refs = refs[: len(pages)], refs[len(pages) :]
        inputs, refs = refs[: terms.count], refs[terms.count :]
        counter_refs, refs = refs[: len(counters)], refs[len(counters) :]
        (final, each_warp, *each_split), refs = pairs_of(refs, len(types))
        q_smem, k_smem, v_smem, scales, *barriers = refs
        k_ready, v_ready, k_free, v_free = barriers
        k_pages, v_pages = page_refs[: len(k.pages)], page_refs[len(k.pages) :]
        all_keys, all_values = Stored(k_ref, k_pages), Stored(v_ref, v_pages)
        of_keys, of_values = Stored(ks_ref, k_pages), Stored(vs_ref, v_pages)
        wg, number = lax.axis_index("warpgroup"), schedule.count(turn_refs)

        def work(n):
            """A piece: where it is, its first tile, and how many there are, FULL ones and
            all."""
            b, h, i, split = place(schedule.piece(turn_refs, n))
            reach = tiles.counts(tile_refs, (b, h, i))
            return (b, h, i, split), *tiles_of_split(*reach, split, splits)

        def share(wg, number):
            """How many of so many tiles are a warpgroup's: it has each third one, say."""
            return lax.div(number + (warpgroups - 1) - wg, warpgroups)

        def compute(n, done):
            """One piece; `done` is how many tiles this warpgroup had before it."""
            (b, h, i, split), before, whole, some = work(n)
            q_base, mine = i * block, share(wg, some)
            sync(_DONE, threads)  # All have read the queries before.
            at = (b, q_base, h)

            @pl.when(wg == 0)
            def _fetch():
                fetch_rows(q_smem, q_type.transforms, q_ref, at, own, pairs=True)

            sync(_DONE, threads)
            where = Place(b, h, q_base, 0, shape, layouts=LAYOUTS)
            given = RowTerms(terms, inputs, where)

            def key_of(j):
                """The first key of a tile."""
                j = before + wg + warpgroups * j
                return tiles.first_key(tile_refs, (b, h, i), j)

            def key_after(j):
                return key_of(jnp.minimum(j, mine - 1))

            def scales_of(k_base):
                key_ = place_of_scales(of_keys, b, k_base)
                return key_, place_of_scales(of_values, b, k_base)

            def fetch(j, key_, value):
                fetch_scales(scales.at[wg, lax.rem(j, _AHEAD)], key_, value, h)

            def softmax(masked, at, products, by_key, by_value, top, total):
                """Unnormalised weights, times the values' scales, for the matrix units; the
                new maxima and sums; and by how much the old ones shrink."""
                products = products * by_key
                logits = at["logit"](0, products) if "logit" in at else products
                if "visible" in at:
                    logits = jnp.where(at["visible"](), logits, -jnp.inf)
                new = jnp.maximum(top, largest(logits) * soft.factor)
                base = jnp.where(new == -jnp.inf, 0.0, new) if masked or soft.hides else new
                decay = jnp.exp2(top - base)
                weights = jnp.exp2(logits * soft.factor - _along(base, shape, 0))
                total = total * decay + own_sum(weights)
                scaled = weights * by_value
                if masked or soft.hides:  # Those that are hidden may have any scale.
                    scaled = jnp.where(weights == 0, 0.0, scaled)
                if "keep" in at:
                    scaled = jnp.where(at["keep"](), scaled, 0.0)
                return scaled.astype(dtype), new, total, decay

            def one(masked, j, carry):
                out, top, total, k_base, *ahead = carry
                slot, turn = wg * stages + lax.rem(done + j, stages), lax.rem(j, _AHEAD)
                keys, values = k_smem.at[slot], v_smem.at[slot]
                k_scales, v_scales = scales.at[wg, turn, 0], scales.at[wg, turn, 1]
                loaded = given.load(masked, lambda: k_base)
                later, places = key_after(j + 3), scales_of(ahead[1])
                # Its scales are there, and those of the last one are read.
                await_scales(1)
                plgpu.barrier_wait(k_ready.at[slot])
                if keys.dtype == jnp.uint8:
                    find_nan(keys, k_type.transforms, k_scales)
                logits = products(q_smem, q_type.transforms, block, keys, k_type.transforms)
                plgpu.barrier_arrive(k_free.at[slot])
                fetch(j + 2, *places)
                plgpu.barrier_wait(v_ready.at[slot])
                if values.dtype == jnp.uint8:
                    find_nan(values, v_type.transforms, v_scales)
                by_key, by_value = (
                    _along(plgpu.load(x, layout=COLUMNS, optimized=False), shape, 1)
                    for x in (k_scales, v_scales)
                )
                at = given.at(loaded)
                weights, top, total, decay = softmax(
                    masked, at, logits, by_key, by_value, top, total
                )
                out = add_values(out, decay, weights, values, v_type.transforms)
                plgpu.barrier_arrive(v_free.at[slot])
                return out, top, total, *ahead, later

            empty = (
                full((OUT_ROWS, value_dim), 0.0, OUT),
                full((block,), -jnp.inf, ROWS),
                full((block,), 0.0, ROWS),
            )

            def attend():
                first, second = key_of(0), key_after(1)
                fetch(0, *scales_of(first))
                fetch(1, *scales_of(second))
                carry = (*empty, first, second, key_after(2))
                unmasked = share(wg, whole)
                carry = lax.fori_loop(0, unmasked, ft.partial(one, False), carry)
                if terms.masked:
                    carry = lax.fori_loop(unmasked, mine, ft.partial(one, True), carry)
                await_scales(0)
                return carry[:3]

            out, top, total = lax.cond(mine > 0, attend, lambda: empty)
            total = whole_sum(total)
            inverse, lse = soft.ended(top, total)
            # Of all warps of the block, and then of all blocks that have this row.
            part, of_split = split * warps * batch + b, split * batch + b
            first = (part + wg * _WARPS * batch, batch, q_base, h)
            write(*each_warp, out, lse, inverse, first, own)
            sync(_DONE, threads)
            to, target = (each_split[0], of_split) if each_split else (final, b)
            parts = (part, batch, target, q_base, h)
            merge_rows((*each_warp, *to), parts, own, warps, block, threads)
            if not each_split:
                return done + mine
            last = is_last(counter_refs[0].at[b, h, i], splits, _DONE, threads)

            @pl.when(last)
            def _merge():
                parts = (b, batch, b, q_base, h)
                merge_rows((*to, *final), parts, own, splits, block, threads)

            return done + mine

        @pl.when(wg < warpgroups)
        def _compute():
            plgpu.set_max_registers(160 if warpgroups == 3 else 240, action="increase")
            lax.fori_loop(0, number, compute, jnp.int32(0))

        def copy(n, done):
            """The tiles of one piece, of each warpgroup in turn; `done` is how many each
            had before it."""
            (b, h, i, _), before, _, some = work(n)

            def look_up(j):
                """Of a tile of each warpgroup: its first key, and the pages of its keys and
                values. For the next tiles, so that they are there when they are needed."""

                def of_tile(wg):
                    t = before + jnp.minimum(wg + warpgroups * j, some - 1)
                    first = tiles.first_key(tile_refs, (b, h, i), jnp.maximum(t, 0))
                    return first, all_keys.page(b, first), all_values.page(b, first)

                return tuple(map(of_tile, range(warpgroups)))

            def load(j, found):
                after = look_up(j + 1)

                def tile(wg, done):
                    turn = done + j
                    slot = wg * stages + lax.rem(turn, stages)

                    first, k_page, v_page = found[wg]

                    def one(stored, page, smem, ready, free):
                        source, again = stored.tile(page, first, TOKENS, h), turn >= stages
                        fill(source, smem.at[slot], again, ready.at[slot], free.at[slot])

                    one(all_keys, k_page, k_smem, k_ready, k_free)
                    one(all_values, v_page, v_smem, v_ready, v_free)

                for wg in range(warpgroups):
                    there = wg + warpgroups * j < some
                    pl.when(there)(ft.partial(tile, wg, done[wg]))
                return after

            lax.fori_loop(0, share(0, some), load, look_up(0))
            return tuple(share(wg, some) + before for wg, before in enumerate(done))

        @pl.when(wg == warpgroups)
        def _copy():
            plgpu.set_max_registers(32 if warpgroups == 3 else 24, action="decrease")
            lax.fori_loop(0, number, copy, (jnp.int32(0),) * warpgroups)

    each = plgpu.Barrier(num_barriers=warpgroups * stages)
    out, lse, *_ = launch(
        kernel,
        "decode_8bit",
        schedule.programs,
        warpgroups,
        out_type=own.types(value_dim, types),
        scratch_types=(
            q_type,
            k_type,
            v_type,
            plgpu.SMEM((warpgroups, _AHEAD, 2, TOKENS), jnp.float32),
            *4 * (each,),
        ),
    )(
        q,
        *(k.values, v.values, k.scale, v.scale),
        *(*lists, *turns, *pages, *terms.arrays, *counters),
    )
    return out, lse


def _along(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """One number a row (`axis` 0) or column (1), on a whole tile."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), TILE)
