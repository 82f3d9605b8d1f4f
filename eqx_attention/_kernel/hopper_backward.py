"""Attention on Hopper, backward, for heads of 64 and 128: one pass over the tiles, five
products each.

A block of threads has the keys and values of two warpgroups in shared memory, and goes
over the queries that see them. Gradients of keys and values stay in registers; those of
queries are added to global memory, in float32, by the copy engine. See
`hopper_forward.py` for the source.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._mechanism.base import Request
from .backward import Blocks, clean, DONE, dropped, WARPGROUPS, Work, WRITTEN
from .backward_row import Added, Rows
from .hopper import fence, launch, opaque, smem, sync, THREADS
from .terms import Place


_CHUNK = 64


def backward(
    request: Request, lse: jax.Array, delta: jax.Array, dout: jax.Array, blocks: Blocks
) -> tuple[jax.Array, ...]:
    """`(dq, dk, dv)`, the first in float32.

    **Arguments:**

    - `lse`, `delta`: `(batch, q_len, heads)` in float32: what is subtracted from the logits
        (`inf` for rows that see nothing) and from the gradients of the weights.
    - `dout`: as `out`, in the dtype of the operands.
    """
    head_dim, value_dim = request.query.shape[-1], request.value.shape[-1]
    keys = blocks.key * WARPGROUPS
    work = Work(request, lse, delta, dout, blocks, keys, stay=True)
    block, dtype = blocks.query, request.query.dtype
    stages, dout_stages = blocks.stages, blocks.dout_stages
    chunks, q_chunks = head_dim // _CHUNK, block // _CHUNK
    assert chunks * q_chunks == WARPGROUPS, "a part of dq for each warpgroup"
    shape = (blocks.key, block)

    def part_of(wg):
        """Which queries of a tile's gradient a warpgroup computes, and which channels."""
        return lax.div(wg, chunks), lax.rem(wg, chunks)

    def piece(wg):
        q_chunk, chunk = part_of(wg)
        return pl.ds(q_chunk * _CHUNK, _CHUNK), pl.ds(chunk * _CHUNK, _CHUNK)

    # Gradients of keys and values leave by where those of logits were, and by more.
    held = 2 * q_chunks
    more = parts_left_over(head_dim, value_dim, blocks)

    def kernel(*refs):
        refs, scratch = work.refs(refs)
        k_smem, v_smem, q_smem, dout_smem, small_smem, *scratch = scratch
        lse_smem, delta_smem, numbers = work.small(small_smem)
        ds_smem, dq_smem, *more_smem, barriers = scratch
        added = Added(dq_smem, [piece])
        rows = Rows(work, refs, numbers, barriers)
        wg = lax.axis_index("warpgroup")

        def leaving(n):
            if n < held:
                return ds_smem.at[n // q_chunks, n % q_chunks]
            return more_smem[0].at[n - held]

        def compute(row, _, done):
            k_base = row.k_base + wg * blocks.key
            own = pl.ds(wg * blocks.key, blocks.key)
            plgpu.barrier_wait(barriers.kv_ready)
            if work.may_hide:
                part = k_smem.at[0, own] if chunks == 1 else k_smem.at[wg]
                clean(part, [k_smem.at[c, own] for c in range(chunks)])
            # What left after the last row is read before it is overwritten.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def over_queries(dk_acc, dv_acc):
                def step(masked, n):
                    slot, dout_slot = (
                        lax.rem(done + n, size) for size in (stages, dout_stages)
                    )
                    buffer = lax.rem(done + n, 2)
                    low, delta = lse_smem.at[slot], delta_smem.at[dout_slot]
                    head, first = row.queries(n)
                    at = work.at(
                        refs, Place(row.batch, head, first, k_base, shape, 1), masked
                    )
                    me = opaque(wg)
                    own = pl.ds(me * blocks.key, blocks.key)
                    q_chunk, chunk = part_of(me)
                    kept_ = work.kept(at) if work.early else ()

                    def of_product(s_acc, dweights_acc):
                        work.begin(
                            at, (low, delta), row.ready(done + n), (s_acc, dweights_acc)
                        )
                        for c in range(chunks):
                            part = pl.ds(c * _CHUNK, _CHUNK)
                            q_part = q_smem.at[slot, 0, :, part]
                            plgpu.wgmma(s_acc, k_smem.at[c, own], q_part.T)
                        plgpu.wgmma(
                            dweights_acc, v_smem.at[0, own], dout_smem.at[dout_slot, 0].T
                        )
                        kept = kept_ if work.early else work.kept(at)
                        product = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        weights = work.weights(at, product, low)
                        used = dropped(weights, kept).astype(dtype)
                        weights = work.sloped(at, weights)
                        plgpu.wgmma(dv_acc, used, dout_smem.at[dout_slot, 0])
                        dweights = plgpu.wgmma_accumulator_load(dweights_acc, wait_n=1)
                        ds = work.ds(at, product, weights, dweights, delta, kept)
                        return ds.astype(dtype)

                    tile = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                    ds = pl.run_scoped(of_product, tile, tile)
                    for c in range(q_chunks):
                        ds_smem[buffer, c, own] = ds[:, c * _CHUNK : (c + 1) * _CHUNK]
                    fence()
                    sync(WRITTEN, WARPGROUPS * THREADS)

                    def of_tokens(dq_acc):
                        plgpu.wgmma(dq_acc, ds_smem.at[buffer, q_chunk].T, k_smem.at[chunk])
                        plgpu.wgmma(dk_acc, ds, q_smem.at[slot, 0])
                        dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
                        row.add(dq, added, 0, me, (head, first))
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(barriers.q_free.at[slot])
                        plgpu.barrier_arrive(barriers.dout_free.at[dout_slot])

                    accumulator = plgpu.WGMMAAccumulatorRef((_CHUNK, _CHUNK), jnp.float32)
                    pl.run_scoped(of_tokens, accumulator)

                row.for_tiles(step)
                plgpu.barrier_arrive(barriers.kv_free)
                return dk_acc[...], dv_acc[...]

            dk, dv = pl.run_scoped(
                over_queries,
                plgpu.WGMMAAccumulatorRef((blocks.key, head_dim), jnp.float32),
                plgpu.WGMMAAccumulatorRef((blocks.key, value_dim), jnp.float32),
            )
            # The other warpgroup may still read what this overwrites.
            sync(DONE, WARPGROUPS * THREADS)
            mine = (row.batch, pl.ds(k_base, blocks.key), row.kv_head)
            parts = [
                (to, x, c * _CHUNK)
                for to, x in ((refs.dv, dv), (refs.dk, dk * work.scale))
                for c in range(x.shape[1] // _CHUNK)
            ]
            for n, (_, x, c) in enumerate(parts):
                leaving(n)[own] = x[:, c : c + _CHUNK].astype(dtype)
            plgpu.commit_smem()
            for n, (to, _, c) in enumerate(parts):
                to = to.at[(*mine, pl.ds(c, _CHUNK))]
                plgpu.copy_smem_to_gmem(leaving(n).at[own], to)

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            rows.each(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _copy():
            rows.copy((k_smem, v_smem), (q_smem, lse_smem), (dout_smem, delta_smem), added)

    grads = launch(
        kernel,
        "backward",
        work.turns.programs,
        WARPGROUPS,
        out_type=work.out_type,
        scratch_types=(
            smem((chunks, keys, _CHUNK), dtype),
            smem((1, keys, value_dim), dtype),
            smem((stages, 1, block, head_dim), dtype),
            smem((dout_stages, 1, block, value_dim), dtype),
            work.small_type,
            smem((2, q_chunks, keys, _CHUNK), dtype),
            smem((WARPGROUPS, _CHUNK, _CHUNK), jnp.float32),
            *([smem((more, keys, _CHUNK), dtype)] if more else []),
            work.barriers(chunks + 1, 1),
        ),
    )(*work.arrays)
    return work.gradients(*grads)


def parts_left_over(head_dim: int, value_dim: int, blocks: Blocks) -> int:
    """How many parts of 64 channels the gradients of keys and values have, beyond those
    that leave by where the gradients of logits were."""
    return max(0, (head_dim + value_dim) // _CHUNK - 2 * (blocks.query // _CHUNK))
