"""Attention on Hopper to keys and values in 16 bits, of few queries: nothing but the time
that it takes to read them.

A block of threads has one warpgroup that copies keys and values into shared memory, as many
tiles ahead as there is room for, and one that computes. What a split of the keys gives is
merged by the block that is the last of its row to finish, so that nothing but this kernel
runs: see `merge_rows.py`.
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
from .head_rows import fetch_rows, HeadRows, pairs_of, write_rows
from .hidden_values import replace_nan
from .hopper import all_finite, along, fence, fill, launch, smem, sync, THREADS
from .merge_rows import is_last, merge_rows
from .pages import pages_of, Stored
from .row_tiles import row_tiles, schedule_of
from .schedule import place_of_split, section, tiles_of_split
from .softmax import Softmax
from .terms import forward_terms, Place, RowTerms


# Of the 16 named barriers of a block, Mosaic GPU uses the first ones.
_FETCHED, _DONE, _LOOK = 7, 8, 10
# What it takes to start a row, in tiles; and bytes that tiles may take.
_START = 2
_SHARED = 220 * 1024


class Blocks16(NamedTuple):
    """How the kernel is cut: how many tiles of keys are on their way, keys of a tile, and
    rows."""

    stages: int = 6
    key: int = 64
    rows: int = 64
    warpgroups: int = 1


def blocks_for(head_dim: int, value_dim: int) -> Blocks16:
    """As many tiles as there is room for, but no more than help."""
    blocks = Blocks16()
    free = _SHARED - 2 * blocks.rows * head_dim
    stages = free // (2 * blocks.key * (head_dim + value_dim))
    return blocks._replace(stages=min(6, max(2, stages)))


def forward_16bit(
    request: Request, blocks: Blocks16, splits: int
) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)`, as of a mechanism; `out` is in the result's dtype. The tiles of each
    row are in so many splits.

    **Raises:** `NotElementwise` if a mask or a score does more than a kernel can.
    """
    own, rows = HeadRows.of(request), packed(request)
    (k, k_pages), (v, v_pages) = pages_of(request.key_), pages_of(request.value)
    q, result = request.query, request.result_dtype
    batch, _, heads, head_dim = rows.query.shape
    value_dim, dtype = v.shape[-1], q.dtype
    (stages, block_k, block_q, _), count = blocks, ceil_div(own.count, blocks.rows)
    tiles = row_tiles(rows, block_q, block_k)
    terms, scale = forward_terms(rows, block_q, block_k)
    shape = (block_q, block_k)
    soft = Softmax.of(rows, shape, scale)
    place = place_of_split(batch, heads, count, section(rows), splits)
    q_type = smem((block_q, head_dim), dtype)
    schedule = schedule_of(tiles, batch * heads * count * splits, place, _START)
    turns, pages, lists = schedule.arrays, [*k_pages, *v_pages], tiles.arrays
    counters = [jax.new_ref(jnp.zeros((batch, heads, count), jnp.int32))]
    counters = counters if splits > 1 else []
    types = [(batch, result)]
    types += [(splits * batch, jnp.float32)] if splits > 1 else []

    def kernel(q_ref, k_ref, v_ref, *refs):
        tile_refs, refs = refs[: len(lists)], refs[len(lists) :]
        turn_refs, refs = refs[: len(turns)], refs[len(turns) :]
        page_refs, refs = refs[: len(pages)], refs[len(pages) :]
        inputs, refs = refs[: terms.count], refs[terms.count :]
        counter_refs, refs = refs[: len(counters)], refs[len(counters) :]
        (final, *each_split), refs = pairs_of(refs, len(types))
        q_smem, k_smem, v_smem, bad_smem, k_ready, v_ready, k_free, v_free = refs
        number = schedule.count(turn_refs)

        def work(n):
            b, h, i, split = place(schedule.piece(turn_refs, n))
            reach = tiles.counts(tile_refs, (b, h, i))
            return b, h, i, split, tiles_of_split(*reach, split, splits)

        def compute(n, done):
            """One piece; `done` is how many tiles were before it."""
            b, h, i, split, (before, whole, some) = work(n)
            given = RowTerms(terms, inputs, Place(b, h, i * block_q, 0, shape))
            sync(_FETCHED, THREADS)  # All have read the queries before.
            fetch_rows(q_smem, q_type.transforms, q_ref, (b, i * block_q, h), own)
            fence()
            sync(_FETCHED, THREADS)

            def loads(masked, t):
                """What the terms are given of a tile."""
                first_key = ft.partial(tiles.first_key, tile_refs, (b, h, i), before + t)
                return given.load(masked, first_key)

            def one(masked, t, carry):
                out, top, total = carry
                slot = lax.rem(done + t, stages)
                plgpu.barrier_wait(k_ready.at[slot])

                def product(acc):
                    plgpu.wgmma(acc, q_smem, k_smem.at[slot].T)
                    loaded = loads(masked, t)
                    return acc[...], loaded

                accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                products, loaded = pl.run_scoped(product, accumulator)
                plgpu.barrier_arrive(k_free.at[slot])
                weights, top, total, decay = soft(
                    masked, given.at(loaded), products, top, total
                )
                out = out * along(decay, out.shape, 0)
                plgpu.barrier_wait(v_ready.at[slot])
                if masked or soft.hides:
                    values = v_smem.at[slot]
                    finite = all_finite(values, _LOOK)
                    total = replace_nan(finite, values, bad_smem, weights, total, 1)

                def attended(acc):
                    plgpu.wgmma(acc, weights, v_smem.at[slot])

                out = pl.run_state(attended)(plgpu.WGMMAAccumulatorRef.init(out))
                plgpu.barrier_arrive(v_free.at[slot])
                return out, top, total

            carry = soft.empty(value_dim)
            carry = lax.fori_loop(0, whole, ft.partial(one, False), carry)
            if terms.masked:
                carry = lax.fori_loop(whole, some, ft.partial(one, True), carry)
            out, lse = soft.normalised(carry)
            if not each_split:
                write_rows(*final, out.astype(result), lse, (b, i * block_q, h), own)
                return done + some
            part = (split * batch + b, i * block_q, h)
            write_rows(*each_split[0], out, lse, part, own)
            last = is_last(counter_refs[0].at[b, h, i], splits, _DONE, THREADS)

            @pl.when(last)
            def _merge():
                parts = (b, batch, b, i * block_q, h)
                refs = (*each_split[0], *final)
                merge_rows(refs, parts, own, splits, block_q, THREADS)

            return done + some

        wg = lax.axis_index("warpgroup")

        @pl.when(wg == 0)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            lax.fori_loop(0, number, compute, jnp.int32(0))

        keys = Stored(k_ref, page_refs[: len(k_pages)])
        values = Stored(v_ref, page_refs[len(k_pages) :])

        def copy(n, done):
            b, h, i, _, (before, _, some) = work(n)

            def look_up(t):
                """The first key of a tile, and the pages of its keys and values: for the
                next tile, so that it is there when it is needed."""
                t = before + jnp.minimum(t, jnp.maximum(some, 1) - 1)
                k_base = tiles.first_key(tile_refs, (b, h, i), t)
                return k_base, keys.page(b, k_base), values.page(b, k_base)

            def load(t, found):
                slot, after = lax.rem(done + t, stages), look_up(t + 1)
                k_base, k_page, v_page = found

                again = done + t >= stages

                def one(stored, page, smem, ready, free):
                    source = stored.tile(page, k_base, block_k, h)
                    fill(source, smem.at[slot], again, ready.at[slot], free.at[slot])

                one(keys, k_page, k_smem, k_ready, k_free)
                one(values, v_page, v_smem, v_ready, v_free)
                return after

            lax.fori_loop(0, some, load, look_up(0))
            return done + some

        @pl.when(wg == 1)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")
            lax.fori_loop(0, number, copy, jnp.int32(0))

    each = plgpu.Barrier(num_barriers=stages)
    out, lse, *_ = launch(
        kernel,
        "decode_16bit",
        schedule.programs,
        1,
        out_type=own.types(value_dim, types),
        scratch_types=(
            q_type,
            smem((stages, block_k, head_dim), dtype),
            smem((stages, block_k, value_dim), dtype),
            plgpu.SMEM((block_k,), jnp.float32),
            *4 * (each,),
        ),
    )(q, k, v, *lists, *turns, *pages, *terms.arrays, *counters)
    return out, lse
