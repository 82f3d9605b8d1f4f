"""Attention on Hopper, backward, for heads of more than 128.

Gradients of 64 keys and their values fill the registers of two warpgroups, each of which
has half of a head of them. So each computes the weights of half of a tile's queries, and
the two exchange them through shared memory. Otherwise as `hopper_backward.py`.
"""

import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._axes import largest_divisor
from .._mechanism.base import Request
from .backward import Blocks, clean, DONE, dropped, WARPGROUPS, Work, WRITTEN
from .backward_row import Added, Rows
from .hopper import fence, launch, opaque, smem, sync, THREADS
from .terms import Place


# Bytes of a row of shared memory's tiles: those of the queries of a warpgroup.
_SWIZZLE = 64


def piece_of(head_dim: int) -> int:
    """How many columns of dq a warpgroup writes at once."""
    return 32 * largest_divisor(head_dim // 64, 3)


def backward(
    request: Request, lse: jax.Array, delta: jax.Array, dout: jax.Array, blocks: Blocks
) -> tuple[jax.Array, ...]:
    """As `hopper_backward.backward`."""
    head_dim, value_dim = request.query.shape[-1], request.value.shape[-1]
    # To stay for several rows would take registers that there are none of.
    work = Work(request, lse, delta, dout, blocks, blocks.key, stay=False)
    block, dtype = blocks.query, request.query.dtype
    stages, dout_stages = blocks.stages, blocks.dout_stages
    half, v_half = head_dim // 2, value_dim // 2
    piece = piece_of(head_dim)
    shape = (blocks.key, block // 2)

    def channels(c, wg):
        return pl.ds(0, block), pl.ds(wg * half + c * piece, piece)

    pieces = [ft.partial(channels, c) for c in range(half // piece)]

    def kernel(*refs):
        refs, scratch = work.refs(refs)
        k_smem, v_smem, q_smem, dout_smem, small_smem, *scratch = scratch
        lse_smem, delta_smem, numbers = work.small(small_smem)
        weights_smem, ds_smem, dq_smem, barriers = scratch
        added = Added(dq_smem, pieces)
        rows = Rows(work, refs, numbers, barriers)
        wg = lax.axis_index("warpgroup")

        def compute(row, _, done):
            plgpu.barrier_wait(barriers.kv_ready)
            if work.may_hide:
                clean(k_smem.at[wg], [k_smem.at[wg]], _SWIZZLE)

            def over_queries(dk_acc, dv_acc):
                def step(masked, n):
                    slot, dout_slot = (
                        lax.rem(done + n, size) for size in (stages, dout_stages)
                    )
                    buffer = lax.rem(done + n, 2)
                    head, first = row.queries(n)
                    me = opaque(wg)
                    mine = pl.ds(me * shape[1], shape[1])
                    place = Place(
                        row.batch, head, first + me * shape[1], row.k_base, shape, 1
                    )
                    at = work.at(refs, place, masked)
                    low, delta = lse_smem.at[slot, mine], delta_smem.at[dout_slot, mine]

                    def of_product(s_acc, dweights_acc):
                        work.begin(
                            at, (low, delta), row.ready(done + n), (s_acc, dweights_acc)
                        )
                        for c in range(2):
                            plgpu.wgmma(s_acc, k_smem.at[c], q_smem.at[slot, c, mine].T)
                        for c in range(2):
                            dout_part = dout_smem.at[dout_slot, c, mine]
                            plgpu.wgmma(dweights_acc, v_smem.at[c], dout_part.T)
                        kept = work.kept(at)
                        product = plgpu.wgmma_accumulator_load(s_acc, wait_n=2)
                        weights = work.weights(at, product, low)
                        used = dropped(weights, kept).astype(dtype)
                        weights = work.sloped(at, weights)
                        weights_smem[buffer, :, mine] = used
                        dweights = plgpu.wgmma_accumulator_load(dweights_acc, wait_n=0)
                        ds = work.ds(at, product, weights, dweights, delta, kept)
                        ds_smem[buffer, :, mine] = ds.astype(dtype)

                    tile = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                    pl.run_scoped(of_product, tile, tile)
                    fence()
                    sync(WRITTEN, WARPGROUPS * THREADS)
                    plgpu.wgmma(
                        dv_acc, weights_smem.at[buffer], dout_smem.at[dout_slot, me]
                    )
                    for c in range(half // piece):

                        def of_tokens(dq_acc):
                            k_part = k_smem.at[me, :, c * piece : (c + 1) * piece]
                            plgpu.wgmma(dq_acc, ds_smem.at[buffer].T, k_part)
                            if c == 0:
                                plgpu.wgmma(dk_acc, ds_smem.at[buffer], q_smem.at[slot, me])
                            dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=int(c == 0))
                            row.add(dq, added, c, me, (head, first))

                        accumulator = plgpu.WGMMAAccumulatorRef((block, piece), jnp.float32)
                        pl.run_scoped(of_tokens, accumulator)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(barriers.dout_free.at[dout_slot])
                    plgpu.barrier_arrive(barriers.q_free.at[slot])

                row.for_tiles(step)
                return dk_acc[...], dv_acc[...]

            dk, dv = pl.run_scoped(
                over_queries,
                plgpu.WGMMAAccumulatorRef((blocks.key, half), jnp.float32),
                plgpu.WGMMAAccumulatorRef((blocks.key, v_half), jnp.float32),
            )
            # The other warpgroup may still read what this overwrites.
            sync(DONE, WARPGROUPS * THREADS)
            k_smem[wg] = (dk * work.scale).astype(dtype)
            v_smem[wg] = dv.astype(dtype)
            plgpu.commit_smem()
            keys = (row.batch, pl.ds(row.k_base, blocks.key), row.kv_head)
            to = refs.dk.at[(*keys, pl.ds(wg * half, half))]
            plgpu.copy_smem_to_gmem(k_smem.at[wg], to)
            to = refs.dv.at[(*keys, pl.ds(wg * v_half, v_half))]
            plgpu.copy_smem_to_gmem(v_smem.at[wg], to)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(barriers.kv_free)

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            rows.each(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _copy():
            rows.copy(
                (k_smem, v_smem),
                (q_smem, lse_smem),
                (dout_smem, delta_smem),
                added,
                _SWIZZLE,
            )

    def tiled(*shape):
        return smem(shape, dtype, _SWIZZLE)

    grads = launch(
        kernel,
        "backward",
        work.turns.programs,
        WARPGROUPS,
        out_type=work.out_type,
        scratch_types=(
            tiled(2, blocks.key, half),
            tiled(2, blocks.key, v_half),
            tiled(stages, 2, block, half),
            tiled(dout_stages, 2, block, v_half),
            work.small_type,
            tiled(2, blocks.key, block),
            tiled(2, blocks.key, block),
            smem((WARPGROUPS, block, piece), jnp.float32),
            work.barriers(4, 2),
        ),
    )(*work.arrays)
    return work.gradients(*grads)
