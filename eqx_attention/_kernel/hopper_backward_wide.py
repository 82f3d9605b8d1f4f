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
from .backward import Blocks, clean, dropped, WARPGROUPS, Work
from .backward_row import Added, Row
from .hopper import fence, launch, opaque, smem, sync, THREADS
from .terms import Place


_WRITTEN, _DONE = 5, 6
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
    rows = blocks.key
    work = Work(request, lse, delta, dout, blocks, rows)
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
        k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, *scratch = scratch
        weights_smem, ds_smem, dq_smem, kv_ready, q_ready, dout_ready, *scratch = scratch
        q_free, dout_free, *dq_barriers = scratch
        added = Added(dq_smem, pieces, dq_barriers)
        row = Row(work, refs)
        wg = lax.axis_index("warpgroup")

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            plgpu.barrier_wait(kv_ready)
            if work.may_mask:
                clean(k_smem.at[wg])
                clean(v_smem.at[wg])
                plgpu.commit_smem()
                sync(_DONE, WARPGROUPS * THREADS)

            def over_queries(dk_acc, dv_acc):
                def step(masked, n):
                    slot, dout_slot = lax.rem(n, stages), lax.rem(n, dout_stages)
                    buffer = lax.rem(n, 2)
                    head, first = row.queries(n)
                    me = opaque(wg)
                    mine = pl.ds(me * shape[1], shape[1])
                    place = Place(
                        row.batch, head, first + me * shape[1], row.k_base, shape, 1
                    )
                    at = work.at(refs, place, masked)
                    low, delta = lse_smem.at[slot, mine], delta_smem.at[dout_slot, mine]

                    def of_product(s_acc, dweights_acc):
                        ready = q_ready.at[slot], dout_ready.at[dout_slot]
                        work.begin(at, (low, delta), ready, (s_acc, dweights_acc))
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
                    sync(_WRITTEN, WARPGROUPS * THREADS)
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
                    plgpu.barrier_arrive(dout_free.at[dout_slot])
                    plgpu.barrier_arrive(q_free.at[slot])

                row.for_tiles(step)
                return dk_acc[...], dv_acc[...]

            dk, dv = pl.run_scoped(
                over_queries,
                plgpu.WGMMAAccumulatorRef((blocks.key, half), jnp.float32),
                plgpu.WGMMAAccumulatorRef((blocks.key, v_half), jnp.float32),
            )
            # The other warpgroup may still read what this overwrites.
            sync(_DONE, WARPGROUPS * THREADS)
            k_smem[wg] = (dk * work.scale).astype(dtype)
            v_smem[wg] = dv.astype(dtype)
            plgpu.commit_smem()
            keys = (row.batch, pl.ds(row.k_base, blocks.key), row.kv_head)
            to = refs.dk.at[(*keys, pl.ds(wg * half, half))]
            plgpu.copy_smem_to_gmem(k_smem.at[wg], to)
            to = refs.dv.at[(*keys, pl.ds(wg * v_half, v_half))]
            plgpu.copy_smem_to_gmem(v_smem.at[wg], to)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _copy():
            row.copy(
                (k_smem, v_smem, kv_ready),
                (q_smem, lse_smem, q_ready, q_free),
                (dout_smem, delta_smem, dout_ready, dout_free),
                added,
            )

    def tiled(*shape):
        return smem(shape, dtype, _SWIZZLE)

    dk, dv = launch(
        kernel,
        "backward",
        work.num_blocks,
        WARPGROUPS,
        out_type=work.out_type,
        scratch_types=(
            tiled(2, rows, half),
            tiled(2, rows, v_half),
            tiled(stages, 2, block, half),
            tiled(dout_stages, 2, block, v_half),
            plgpu.SMEM((stages, block), jnp.float32),
            plgpu.SMEM((dout_stages, block), jnp.float32),
            tiled(2, blocks.key, block),
            tiled(2, blocks.key, block),
            smem((WARPGROUPS, block, piece), jnp.float32),
            *work.barriers(4, 2),
        ),
    )(*work.arrays)
    return work.gradients(dk, dv)
