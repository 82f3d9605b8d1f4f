"""Attention on Hopper, backward: one pass over the tiles, five products each.

A block of threads has the keys and values of two warpgroups in shared memory, and goes
over the queries that see them. Gradients of keys and values stay in registers; those of
queries are added to global memory, in float32, by the copy engine. See
`hopper_forward.py` for the source.
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
from .hopper import along, COLUMN, launch, LOG2E, smem, sync, THREADS, whole_rows
from .schedule import place_of, section
from .tables import never_masked, table
from .terms import folded_scale, keep_fn, logit_fn, Place, terms_of, visible_fn


_WRITTEN, _DONE = 5, 6
_CHUNK = 64


class Blocks(NamedTuple):
    """How the backward kernel is cut: queries of a tile, keys of a warpgroup, how many
    tiles of queries are in flight; and whether the matrix units compute the next tile's
    logits while the gradient of queries is written, which needs more registers."""

    query: int = 64
    key: int = 64
    stages: int = 2
    overlap: bool = False

    warpgroups = 2

    @property
    def rows(self) -> int:
        """Keys of a block of threads."""
        return self.key * self.warpgroups


def backward(
    request: Request, lse: jax.Array, delta: jax.Array, dout: jax.Array, blocks: Blocks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(dq, dk, dv)`, the first in float32.

    **Arguments:**

    - `lse`, `delta`: `(batch, q_len, heads)` in float32: what is subtracted from the logits
        (`inf` for rows that see nothing) and from the gradients of the weights.
    - `dout`: as `out`, in the dtype of the operands.
    """
    names = (request.query, request.key_, request.value, dout)
    q, k, v, dout = (whole_rows(x) for x in names)
    batch, q_len, heads, head_dim = request.query.shape
    kv_len, kv_heads, value_dim = request.value.shape[1:]
    groups, dtype = request.groups, q.dtype
    stages, warpgroups, block = blocks.stages, blocks.warpgroups, blocks.query
    chunks, q_chunks = head_dim // _CHUNK, block // _CHUNK
    assert chunks * q_chunks == warpgroups, "a part of dq for each warpgroup"
    rows = ceil_div(kv_len, blocks.rows)
    tiles = table(request, block, blocks.rows, by_key=True)
    folded = folded_scale(request.pairs)
    # Queries beyond the end see nothing, but a score may make NaN of them.
    ragged = folded is None and q_len % block != 0
    rate = request.pairs.dropout.rate if request.pairs.dropout else 0.0
    masked_ever = not never_masked(request, blocks.rows)
    terms = terms_of(
        request,
        block,
        blocks.rows,
        {
            "visible": visible_fn(request, blocks.rows) if masked_ever else None,
            "logit": logit_fn if folded is None else None,
            "keep": keep_fn if rate else None,
        },
        by_key=True,
    )
    scale = 1.0 if folded is None else folded
    shape = (blocks.key, block)
    order = place_of(batch, kv_heads, rows, section(request))

    def padded(x, value):
        x = x.swapaxes(1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, -q_len % block)), constant_values=value)

    # Products begin with these, where nothing comes between.
    lse = padded(lse * (-LOG2E if folded is None else -1 / folded), -jnp.inf)
    delta = padded(-delta, 0)
    dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32))

    def kernel(*refs):
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, columns_ref, full_ref, some_ref = (
            refs[:9]
        )
        *inputs, dq_ref, dk_ref, dv_ref = refs[9 : terms.count + 12]
        (
            k_smem,
            v_smem,
            q_smem,
            do_smem,
            lse_smem,
            delta_smem,
            ds_smem,
            dq_smem,
            kv_ready,
            q_ready,
            do_ready,
            q_free,
            do_free,
        ) = refs[terms.count + 12 :]
        b, kv_head, j = order(lax.axis_index("block"))
        wg = lax.axis_index("warpgroup")
        row = tiles.at(b, kv_head, j)
        whole, some = full_ref[row], some_ref[row]

        @pl.when(wg < warpgroups)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            own = pl.ds(wg * blocks.key, blocks.key)
            k_base = j * blocks.rows + wg * blocks.key
            mine = pl.ds(k_base, blocks.key)
            q_chunk, chunk = lax.div(wg, chunks), lax.rem(wg, chunks)
            given = terms.given(inputs)
            plgpu.barrier_wait(kv_ready)
            if masked_ever:
                # What is not seen may hold NaN, of which 0 times is NaN. What is seen does
                # not need it here: lse and delta are NaN as well.
                for part in (*(k_smem.at[c, own] for c in range(chunks)), v_smem.at[own]):
                    x = part[...]
                    finite = jnp.abs(x.astype(jnp.float32)) < jnp.inf
                    part[...] = jnp.where(finite, x, jnp.zeros_like(x))
                plgpu.commit_smem()
                sync(_DONE, warpgroups * THREADS)

            def columns(ref):
                return along(plgpu.load(ref, layout=COLUMN), shape, 1)

            def start(acc, ref, folded):
                """What is to be added to each column of a product, in passing."""
                if folded:
                    acc[...] = columns(ref)

            def product_of(acc, slot):
                start(acc, lse_smem.at[slot], "logit" not in terms.terms)
                for c in range(chunks):
                    part = pl.ds(c * _CHUNK, _CHUNK)
                    plgpu.wgmma(acc, k_smem.at[c, own], q_smem.at[slot, :, part].T)

            def over_queries(dk_acc, dv_acc):
                def step(masked, g, t, carried):
                    h = kv_head * groups + g
                    n = g * some + t
                    slot, buffer = lax.rem(n, stages), lax.rem(n, 2)
                    after = lax.rem(n + 1, stages)
                    q_base = columns_ref[(*row, t)] * block
                    place = Place(b, h, q_base, k_base, shape, axis=1)
                    use = [x for x in given if masked or x != "visible"]
                    at = {
                        x: given[x].at(given[x].load(place, given[x].load(place)), place)
                        for x in use
                    }

                    def weights_and_ds(dp_acc, s_acc=None):
                        product = carried
                        if s_acc is not None:
                            await_queries(n)
                            product_of(s_acc, slot)
                        plgpu.barrier_wait(do_ready.at[slot])
                        start(dp_acc, delta_smem.at[slot], "keep" not in terms.terms)
                        plgpu.wgmma(dp_acc, v_smem.at[own], do_smem.at[slot].T)
                        if s_acc is not None:
                            product = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        logits = at["logit"](0, product) if "logit" in use else product
                        logits = logits * (scale * LOG2E)
                        if "logit" in use:
                            logits = logits + columns(lse_smem.at[slot])
                        weights = jnp.exp2(logits)
                        if "visible" in use:
                            weights = jnp.where(at["visible"](), weights, 0.0)
                        if ragged:
                            real = columns(lse_smem.at[slot]) > -jnp.inf
                            weights = jnp.where(real, weights, 0.0)
                        dropped = weights
                        if "keep" in use:
                            keep = at["keep"]()
                            dropped = jnp.where(keep, weights * (1 / (1 - rate)), 0.0)
                        plgpu.wgmma(dv_acc, dropped.astype(dtype), do_smem.at[slot])
                        dweights = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
                        if "keep" in use:
                            dweights = jnp.where(keep, dweights * (1 / (1 - rate)), 0.0)
                            dweights = dweights + columns(delta_smem.at[slot])
                        ds = weights * dweights
                        if "logit" in use:
                            ds = at["logit"](1, product, ds)
                        if "visible" in use or ragged:
                            # What is not seen may be NaN, of which 0 times is NaN.
                            ds = jnp.where(weights == 0, 0.0, ds)
                        return ds.astype(dtype)

                    tile = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                    tiles_of = (tile,) if blocks.overlap else (tile, tile)
                    ds = pl.run_scoped(weights_and_ds, *tiles_of)
                    for c in range(q_chunks):
                        ds_smem[buffer, c, own] = ds[:, c * _CHUNK : (c + 1) * _CHUNK]
                    plgpu.commit_smem()
                    sync(_WRITTEN, warpgroups * THREADS)

                    def gradients(dq_acc, s_acc=None):
                        plgpu.wgmma(dq_acc, ds_smem.at[buffer, q_chunk].T, k_smem.at[chunk])
                        plgpu.wgmma(dk_acc, ds, q_smem.at[slot])
                        if s_acc is not None:
                            # After the last tile, this is of no use, and does no harm.
                            await_queries(n + 1)
                            product_of(s_acc, after)
                        in_flight = 1 if s_acc is None else 1 + chunks
                        dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=in_flight)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        dq_smem[wg] = dq
                        plgpu.commit_smem()
                        to = (
                            b,
                            pl.ds(q_base + q_chunk * _CHUNK, _CHUNK),
                            h,
                            pl.ds(chunk * _CHUNK, _CHUNK),
                        )
                        plgpu.copy_smem_to_gmem(
                            dq_smem.at[wg], dq_ref.at[to], reduction_op="add"
                        )
                        plgpu.wgmma_wait(0 if s_acc is None else chunks)
                        plgpu.barrier_arrive(q_free.at[slot])
                        plgpu.barrier_arrive(do_free.at[slot])
                        if s_acc is not None:
                            return plgpu.wgmma_accumulator_load(s_acc, wait_n=0)

                    accumulator = plgpu.WGMMAAccumulatorRef((_CHUNK, _CHUNK), jnp.float32)
                    tiles_of = (accumulator, tile) if blocks.overlap else (accumulator,)
                    return pl.run_scoped(gradients, *tiles_of)

                def await_queries(n):
                    @pl.when(n < groups * some)
                    def _():
                        plgpu.barrier_wait(q_ready.at[lax.rem(n, stages)])

                def group(g, product):
                    product = lax.fori_loop(0, whole, ft.partial(step, False, g), product)
                    if masked_ever:
                        steps = ft.partial(step, True, g)
                        product = lax.fori_loop(whole, some, steps, product)
                    return product

                def first(acc):
                    await_queries(0)
                    product_of(acc, 0)
                    return acc[...]

                product = None
                if blocks.overlap:
                    accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                    product = pl.run_scoped(first, accumulator)
                if groups == 1:
                    group(0, product)
                else:
                    lax.fori_loop(0, groups, group, product)
                return dk_acc[...], dv_acc[...]

            dk, dv = pl.run_scoped(
                over_queries,
                plgpu.WGMMAAccumulatorRef((blocks.key, head_dim), jnp.float32),
                plgpu.WGMMAAccumulatorRef((blocks.key, value_dim), jnp.float32),
            )
            # The other warpgroup may still read what this overwrites.
            sync(_DONE, warpgroups * THREADS)
            dk = dk * scale
            for c in range(chunks):
                k_smem[c, own] = dk[:, c * _CHUNK : (c + 1) * _CHUNK].astype(dtype)
            v_smem[own] = dv.astype(dtype)
            plgpu.commit_smem()
            for c in range(chunks):
                plgpu.copy_smem_to_gmem(
                    k_smem.at[c, own],
                    dk_ref.at[b, mine, kv_head, pl.ds(c * _CHUNK, _CHUNK)],
                )
            plgpu.copy_smem_to_gmem(v_smem.at[own], dv_ref.at[b, mine, kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == warpgroups)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")
            keys = pl.ds(j * blocks.rows, blocks.rows)
            for c in range(chunks):
                part = pl.ds(c * _CHUNK, _CHUNK)
                plgpu.copy_gmem_to_smem(
                    k_ref.at[b, keys, kv_head, part], k_smem.at[c], kv_ready
                )
            plgpu.copy_gmem_to_smem(v_ref.at[b, keys, kv_head], v_smem, kv_ready)

            def load(n, _):
                slot = lax.rem(n, stages)
                h = kv_head * groups + (lax.div(n, some) if groups > 1 else 0)
                t = lax.rem(n, some) if groups > 1 else n
                queries = pl.ds(columns_ref[(*row, t)] * block, block)

                def both(ref, smem, rows_ref, rows_smem, ready, free):
                    @pl.when(n >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    to = ready.at[slot]
                    plgpu.copy_gmem_to_smem(ref.at[b, queries, h], smem.at[slot], to)
                    rows = rows_ref.at[b, h, queries]
                    plgpu.copy_gmem_to_smem(rows, rows_smem.at[slot], to)

                both(q_ref, q_smem, lse_ref, lse_smem, q_ready, q_free)
                both(do_ref, do_smem, delta_ref, delta_smem, do_ready, do_free)

            lax.fori_loop(0, groups * some, load, None)

    free = plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups)
    ready = plgpu.Barrier(num_barriers=stages, num_arrivals=2)
    dk, dv = launch(
        kernel,
        "backward",
        batch * kv_heads * rows,
        warpgroups,
        out_type=(
            jax.ShapeDtypeStruct(k.shape, dtype),
            jax.ShapeDtypeStruct(v.shape, dtype),
        ),
        scratch_types=(
            smem((chunks, blocks.rows, _CHUNK), dtype),
            smem((blocks.rows, value_dim), dtype),
            smem((stages, block, head_dim), dtype),
            smem((stages, block, value_dim), dtype),
            plgpu.SMEM((stages, block), jnp.float32),
            plgpu.SMEM((stages, block), jnp.float32),
            smem((2, q_chunks, blocks.rows, _CHUNK), dtype),
            smem((warpgroups, _CHUNK, _CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=chunks + 1),
            ready,
            ready,
            free,
            free,
        ),
    )(q, k, v, dout, lse, delta, *tiles, *terms.arrays, dq)
    return dq[...][:, :q_len] * scale, dk[:, :kv_len], dv[:, :kv_len]
