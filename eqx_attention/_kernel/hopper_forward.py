"""Attention on Hopper, forward: FlashAttention-3's schedule with any mask and score.

A block of threads has one warpgroup that copies keys and values into shared memory (one of
its warps) and looks at values that may be hidden (another), and two or three that compute,
each on 64 queries. They take turns: while one of them has the
matrix units, another computes its softmax. Where there is room for the output beside them,
a block stays for several rows of tiles: the keys of the next row are copied, and its
queries, before the output of the last one is written.

??? cite

    [FlashAttention-3: Fast and Accurate Attention with Asynchrony and
    Low-precision](https://arxiv.org/abs/2407.08608)

    ```bibtex
    @inproceedings{shah2024flashattention3,
        title={Flash{A}ttention-3: Fast and Accurate Attention with Asynchrony and
               Low-precision},
        author={Shah, Jay and Bikshandi, Ganesh and Zhang, Ying and Thakkar, Vijay and
                Ramani, Pradeep and Dao, Tri},
        booktitle={Advances in Neural Information Processing Systems},
        year={2024}
    }
    ```
"""

import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._axes import ceil_div
from .._mechanism.base import Request
from .forward import Blocks as Blocks, operands
from .hidden_values import replace_nan
from .hopper import (
    all_finite,
    along,
    arrive,
    fill,
    launch,
    read_word,
    smem,
    sync,
    THREADS,
    whole_rows,
    write_word,
)
from .schedule import place_of, section
from .softmax import Softmax
from .tables import longest_first, table
from .terms import forward_terms, Place, RowTerms
from .turns import Turns


# Of the 16 named barriers of a block, Mosaic GPU uses the first ones.
_TURN, _DONE = 5, 8


def forward(request: Request, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)`, as of a mechanism; `out` is in the result's dtype.

    **Raises:** `NotElementwise` if a mask or a score does more than a kernel can.
    """
    q, k, v = map(whole_rows, (request.query, request.key_, request.value))
    batch, q_len, heads, head_dim = request.query.shape
    value_dim = v.shape[-1]
    groups, dtype, result = request.groups, q.dtype, request.result_dtype
    stages, warpgroups = blocks.stages, blocks.warpgroups
    rows = ceil_div(q_len, blocks.rows)
    tiles = table(request, blocks.rows, blocks.key)
    terms, scale = forward_terms(request, blocks.rows, blocks.key)
    may_mask = terms.masked
    shape = (blocks.query, blocks.key)
    soft = Softmax.of(request, shape, scale)
    overlap = blocks.overlap and not soft.hides
    # Whether values may be hidden: then a warp looks whether they are finite.
    looks = may_mask or soft.hides
    side_by_side = section(request) * groups
    order = place_of(batch, heads, rows, side_by_side)
    held, stays = operands(request, blocks, head_dim, value_dim)

    def row_of(b, h, i):
        return tiles.at(b, lax.div(h, groups) if groups > 1 else h, i)

    def row_at(piece):
        """The last rows come first: under a causal mask, they are the longest."""
        b, h, i = order(piece)
        return b, h, rows - 1 - i

    def by_length():
        """The pieces, of which long rows come first within a section; `None` if they do."""
        if (longest := longest_first(tiles)) is None:
            return None

        def piece_of(n):
            b, h, i = order(n)
            return n + (longest[row_of(b, h, i)] - i) * side_by_side

        return jax.vmap(piece_of)(jnp.arange(pieces, dtype=jnp.int32))

    pieces = batch * heads * rows
    turns = Turns.of(pieces, by_length) if stays else Turns(pieces, pieces)
    turn_arrays = turns.arrays

    def kernel(q_ref, k_ref, v_ref, columns_ref, full_ref, some_ref, *refs):
        turn_refs, refs = refs[: len(turn_arrays)], refs[len(turn_arrays) :]
        *inputs, out_ref, lse_ref = refs[: terms.count + 2]
        first, v_smem, lse_smem, small_smem, *barriers = refs[terms.count + 2 :]
        (q_smem, k_smem), (out_smem,) = first
        q_ready, k_ready, v_ready, looked, k_free, v_free, *of_turns = barriers
        turn_refs, wg = [*turn_refs, *of_turns], lax.axis_index("warpgroup")
        zero, bad_smem = jnp.int32(0), small_smem.at[pl.ds(0, blocks.key)]
        numbers = small_smem.at[pl.ds(blocks.key, 2)]
        finite_smem = small_smem.at[pl.ds(blocks.key + 2, stages)]

        def give_turn():
            arrive(_TURN + lax.rem(wg + 1, warpgroups), 2 * THREADS)

        def take_turn():
            sync(_TURN + wg, 2 * THREADS)

        def mine(i):
            return pl.ds(i * blocks.rows + wg * blocks.query, blocks.query)

        def fetch_queries(piece):
            b, h, i = row_at(piece)
            source = q_ref.at[b, mine(i), h]
            plgpu.copy_gmem_to_smem(source, q_smem.at[wg], q_ready.at[wg])

        def tiles_of(piece):
            """How many of its row are FULL, and how many there are."""
            row = row_of(*row_at(jnp.minimum(piece, pieces - 1)))
            return full_ref[row], some_ref[row]

        def compute(state):
            """The row of tiles of one round; `done` is how many tiles were before it."""
            n, piece, whole, some, done = state
            b, h, i = row_at(piece)
            row = row_of(b, h, i)
            q_base = i * blocks.rows + wg * blocks.query
            given = RowTerms(terms, inputs, Place(b, h, q_base, 0, shape))

            def key_at(t):
                """The first key of a tile, or of the last one."""
                return columns_ref[(*row, jnp.minimum(t, some - 1))] * blocks.key

            def loads(masked, key):
                """What the terms are given of a tile."""
                return given.load(masked, lambda: key)

            def one_by_one(masked, t, carry):
                """One tile: its logits, softmax and output, one after another, while
                another warpgroup does the same a little later. What is loaded of the next
                tile is asked for before it is needed."""
                (out, top, total), loaded, after = carry
                slot = slot_of(t)

                def product(acc):
                    plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[slot].T)
                    give_turn()
                    return acc[...]

                accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                products = pl.run_scoped(product, accumulator)
                plgpu.barrier_arrive(k_free.at[slot])
                weights, top, total, decay = soft(
                    masked, given.at(loaded), products, top, total
                )
                out = out * along(decay, out.shape, 0)
                # Nothing of the softmax is to wait for the turn at the matrix units.
                out, weights, top, total = lax.optimization_barrier(
                    (out, weights, top, total)
                )
                loaded, after = loads(masked, after), key_at(t + 2)
                plgpu.barrier_wait(v_ready.at[slot])
                if masked or soft.hides:
                    plgpu.barrier_wait(looked.at[slot])
                    finite = read_word(finite_smem, slot) != 0
                    args = (v_smem.at[slot], bad_smem, weights, total, warpgroups)
                    total = replace_nan(finite, *args)
                take_turn()

                def attended(acc):
                    plgpu.wgmma(acc, weights, v_smem.at[slot])
                    pl.when(t + 1 < some)(ft.partial(await_key, t + 1))
                    if masked:
                        # Since the turn was taken, nobody reads those of this row.
                        pl.when((t + 1 == some) & more)(fetch_following)

                out = pl.run_state(attended)(plgpu.WGMMAAccumulatorRef.init(out))
                plgpu.barrier_arrive(v_free.at[slot])
                return (out, top, total), loaded, after

            def each(masked, first, last, carry):
                """Tiles one by one."""
                carry = carry, loads(masked, key_at(first)), key_at(first + 1)
                step = ft.partial(one_by_one, masked)
                return lax.fori_loop(first, last, step, carry)[0]

            def slot_of(t):
                return lax.rem(done + t, stages)

            def await_key(t):
                plgpu.barrier_wait(k_ready.at[slot_of(t)])

            def overlapped(out_acc):
                """All FULL tiles, of which there is one: the softmax of each, while the one
                before it is attended to."""

                def first(acc):
                    plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[slot_of(0)].T)
                    loaded = loads(False, key_at(0))
                    return acc[...], loaded

                def step(t, carry):
                    weights, top, total = carry
                    slot, before = slot_of(t), slot_of(t - 1)

                    def products(acc):
                        await_key(t)
                        take_turn()
                        plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[slot].T)
                        plgpu.barrier_wait(v_ready.at[before])
                        plgpu.wgmma(out_acc, weights, v_smem.at[before])
                        give_turn()
                        loaded = loads(False, key_at(t))
                        products = plgpu.wgmma_accumulator_load(acc, wait_n=1)
                        plgpu.barrier_arrive(k_free.at[slot])
                        return soft(False, given.at(loaded), products, top, total)

                    accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                    new, top, total, decay = pl.run_scoped(products, accumulator)
                    out = plgpu.wgmma_accumulator_load(out_acc, wait_n=0)
                    # Until here the old weights are read, which the compiler does not know:
                    # it would give their registers to the new ones.
                    out, _ = lax.optimization_barrier((out, weights))
                    plgpu.barrier_arrive(v_free.at[before])
                    out_acc[...] = out * along(decay, out.shape, 0)
                    return new, top, total

                await_key(0)
                products, loaded = pl.run_scoped(
                    first, plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                )
                plgpu.barrier_arrive(k_free.at[slot_of(0)])
                *carry, _ = soft(False, given.at(loaded), products, *empty[1:])
                weights, top, total = lax.fori_loop(1, whole, step, tuple(carry))
                last = slot_of(whole - 1)
                plgpu.barrier_wait(v_ready.at[last])
                plgpu.wgmma(out_acc, weights, v_smem.at[last])
                out = out_acc[...]
                plgpu.barrier_arrive(v_free.at[last])
                return out, top, total

            empty = soft.empty(value_dim)
            plgpu.barrier_wait(q_ready.at[wg])
            if overlap:
                whole_out = (blocks.query, value_dim)
                accumulator = plgpu.WGMMAAccumulatorRef(whole_out, jnp.float32)
                attend = ft.partial(pl.run_scoped, overlapped, accumulator)
                carry = lax.cond(whole > 0, attend, lambda: empty) if may_mask else attend()
                pl.when(whole < some)(ft.partial(await_key, whole))
                take_turn()
            else:
                await_key(0)
                take_turn()
                carry = each(False, 0, whole, empty)
            following = turns.told(turn_refs, numbers, n + 1, piece)
            more = turns.left(following)
            fetch_following = ft.partial(fetch_queries, following)
            if may_mask:
                carry = each(True, whole, some, carry)
            pl.when((wg < warpgroups - 1) | more)(give_turn)
            pl.when(more & (whole == some))(fetch_following)
            # Now, so that the next row need not wait for them.
            found = tiles_of(following)
            out, lse = soft.normalised(carry)
            out = out.astype(result)
            if stays:
                plgpu.wait_smem_to_gmem(0)  # that of the round before
            else:
                # The other warpgroup may still read what this overwrites.
                sync(_DONE, warpgroups * THREADS)
            out_smem[wg] = out
            lse_smem[wg] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[b, mine(i), h])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, h, mine(i)])

            return n + 1, following, *found, done + some

        def left(state):
            return turns.left(state[1])

        @pl.when(wg < warpgroups)
        def _compute():
            plgpu.set_max_registers(160 if warpgroups == 3 else 240, action="increase")
            piece = turns.told(turn_refs, numbers, zero, turns.before_first())
            pl.when(turns.left(piece))(ft.partial(fetch_queries, piece))
            # The first turn is that of the first warpgroup.
            pl.when((wg == warpgroups - 1) & turns.left(piece))(give_turn)
            lax.while_loop(left, compute, (zero, piece, *tiles_of(piece), zero))
            plgpu.wait_smem_to_gmem(0)

        def copy(state):
            n, piece, done = state
            b, h, i = row_at(piece)
            row = row_of(b, h, i)
            some = some_ref[row]
            kv_head = lax.div(h, groups) if groups > 1 else h

            def load(t, _):
                slot = lax.rem(done + t, stages)
                keys = (b, pl.ds(columns_ref[(*row, t)] * blocks.key, blocks.key), kv_head)

                def one(ref, smem, ready, free):
                    again = done + t >= stages
                    fill(ref.at[keys], smem.at[slot], again, ready.at[slot], free.at[slot])

                one(k_ref, k_smem, k_ready, k_free)
                one(v_ref, v_smem, v_ready, v_free)

            # Keys of this row first, so that they do not wait for the next one's number.
            load(0, None)
            following = turns.take(turn_refs, numbers, n + 1, piece)
            lax.fori_loop(1, some, load, None)
            return n + 1, following, done + some

        def look(state):
            n, piece, done = state
            whole, some = tiles_of(piece)
            first = 0 if soft.hides else whole

            def one(t, _):
                slot = lax.rem(done + t, stages)
                plgpu.barrier_wait(v_ready.at[slot])

                @pl.when(t >= first)
                def _():
                    finite = all_finite(v_smem.at[slot], None)
                    write_word(finite_smem, slot, jnp.where(finite, 1, 0))
                    plgpu.barrier_arrive(looked.at[slot])

                plgpu.barrier_arrive(v_free.at[slot])

            lax.fori_loop(0, some, one, None)
            following = turns.told(turn_refs, numbers, n + 1, piece)
            return n + 1, following, done + some

        def each_row(body, following):
            piece = following(turn_refs, numbers, zero, turns.before_first())
            lax.while_loop(left, body, (zero, piece, zero))

        @pl.when(wg == warpgroups)
        def _copy():
            plgpu.set_max_registers(32 if warpgroups == 3 else 24, action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(lambda: each_row(copy, turns.take))
                if looks:
                    pl.when(warp == 1)(lambda: each_row(look, turns.told))

    out, lse = launch(
        kernel,
        "forward",
        turns.programs,
        warpgroups,
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:3], value_dim), result),
            jax.ShapeDtypeStruct((batch, heads, rows * blocks.rows), jnp.float32),
        ),
        scratch_types=(
            held,
            smem((stages, blocks.key, value_dim), dtype),
            plgpu.SMEM((warpgroups, blocks.query), jnp.float32),
            plgpu.SMEM((blocks.key + 2 + stages,), jnp.float32),
            plgpu.Barrier(num_barriers=warpgroups),
            *3 * (plgpu.Barrier(num_barriers=stages),),
            plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
            plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups + looks),
            *turns.scratch(warpgroups + looks),
        ),
    )(q, k, v, *tiles, *turn_arrays, *terms.arrays)
    return out[:, :q_len], lse[..., :q_len].swapaxes(1, 2)
