"""Attention on Hopper, forward: FlashAttention-3's schedule with any mask and score.

A block of threads has one warpgroup that copies keys and values into shared memory, and
two or three that compute, each on 64 queries. They take turns: while one of them has the
matrix units, another computes its softmax.

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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._axes import ceil_div
from .._mechanism.base import Request
from .._score import ALiBi, SoftCap
from .hopper import (
    along,
    any_nan,
    arrive,
    COLUMN,
    fence,
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
from .schedule import place_of, section
from .tables import never_masked, table
from .terms import folded_scale, keep_fn, logit_fn, Place, terms_of, visible_fn


# Of the 16 named barriers of a block, Mosaic GPU uses the first ones.
_TURN, _DONE, _LOOKED, _LOOK = 5, 8, 9, 10


# So many keys does a warpgroup look at, at a time.
_PART = 64


class Blocks(NamedTuple):
    """How the forward kernel is cut: queries of a warpgroup, keys of a tile, how many tiles
    of keys are in flight, how many warpgroups compute; and whether a warpgroup, if nothing
    is hidden, has the matrix units compute the next tile's logits and the last one's output
    while it computes its softmax."""

    query: int = 64
    key: int = 128
    stages: int = 2
    warpgroups: int = 2
    overlap: bool = False

    @property
    def rows(self) -> int:
        """Queries of a block of threads."""
        return self.query * self.warpgroups


def forward(request: Request, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)`, as of a mechanism; `out` is in the result's dtype.

    **Raises:** `NotElementwise` if a mask or a score does more than a kernel can.
    """
    q, k, v = (whole_rows(x) for x in (request.query, request.key_, request.value))
    batch, q_len, heads, head_dim = request.query.shape
    value_dim = v.shape[-1]
    groups, dtype = request.groups, q.dtype
    stages, warpgroups = blocks.stages, blocks.warpgroups
    rows = ceil_div(q_len, blocks.rows)
    tiles = table(request, blocks.rows, blocks.key)
    scale = folded_scale(request.pairs)
    may_mask = not never_masked(request, blocks.key)
    terms = terms_of(
        request,
        blocks.rows,
        blocks.key,
        {
            "visible": visible_fn(request, blocks.key) if may_mask else None,
            "logit": logit_fn if scale is None else None,
            "keep": keep_fn if request.pairs.dropout is not None else None,
        },
    )
    hides = any(not isinstance(s, ALiBi | SoftCap) for s in request.pairs.score)
    overlap = blocks.overlap and not hides
    factor = LOG2E * (1.0 if scale is None else scale)
    shape = (blocks.query, blocks.key)
    order = place_of(batch, heads, rows, section(request) * groups)

    def kernel(q_ref, k_ref, v_ref, columns_ref, full_ref, some_ref, *refs):
        *inputs, out_ref, lse_ref = refs[: terms.count + 2]
        ((q_smem, k_smem), (out_smem,)), v_smem, lse_smem, bad_smem, *barriers = refs[
            terms.count + 2 :
        ]
        q_ready, k_ready, v_ready, k_free, v_free = barriers
        # The last rows come first: under a causal mask, they are the longest.
        b, h, i = order(lax.axis_index("block"))
        i = rows - 1 - i
        kv_head = lax.div(h, groups) if groups > 1 else h
        wg = lax.axis_index("warpgroup")
        row = tiles.at(b, kv_head, i)
        whole, some = full_ref[row], some_ref[row]

        def give_turn():
            after = lax.rem(wg + 1, warpgroups)
            arrive(_TURN + after, 2 * THREADS)

        def take_turn():
            sync(_TURN + wg, 2 * THREADS)

        @pl.when(wg < warpgroups)
        def _compute():
            plgpu.set_max_registers(240 if warpgroups == 2 else 160, action="increase")
            q_base = i * blocks.rows + wg * blocks.query
            mine = pl.ds(q_base, blocks.query)
            plgpu.copy_gmem_to_smem(q_ref.at[b, mine, h], q_smem.at[wg], q_ready.at[wg])
            given = terms.given(inputs)
            place = Place(b, h, q_base, 0, shape)
            held = {name: term.load(place) for name, term in given.items()}

            def loads(masked, t):
                """What the terms are given of a tile."""
                use = [n for n in given if masked or n != "visible"]
                if not use:
                    return None, {}
                k_base = columns_ref[(*row, t)] * blocks.key
                here = place._replace(key=k_base)
                return k_base, {n: given[n].load(here, held[n]) for n in use}

            def softmax(masked, products, loaded, top, total):
                """Unnormalised weights, for the matrix units; the new maxima and sums; and
                by how much the old ones shrink."""
                k_base, loaded = loaded
                here = place._replace(key=k_base)
                at = {n: given[n].at(xs, here) for n, xs in loaded.items()}
                logits = at["logit"](0, products) if "logit" in at else products
                if "visible" in at:
                    logits = jnp.where(at["visible"](), logits, -jnp.inf)
                new = jnp.maximum(top, logits.max(axis=1) * factor)
                base = jnp.where(new == -jnp.inf, 0.0, new) if masked or hides else new
                decay = jnp.exp2(top - base)
                weights = jnp.exp2(logits * factor - along(base, shape, 0))
                total = total * decay + weights.sum(axis=1)
                if "keep" in at:
                    weights = jnp.where(at["keep"](), weights, 0.0)
                return weights.astype(dtype), new, total, decay

            def without_nan(t, masked, weights, total):
                """Waits for the values of a tile. Those that are hidden may hold NaN, of
                which 0 times is NaN: they become 0, and the sum of a row that does see
                one NaN."""
                slot = lax.rem(t, stages)
                plgpu.barrier_wait(v_ready.at[slot])
                if not (masked or hides):
                    return total

                def bad(rows):
                    return (v_smem[slot, rows].astype(jnp.float32) * 0.0).sum(axis=1)

                def replace():
                    # All have looked, and have read what was found in the last tile.
                    sync(_LOOKED, warpgroups * THREADS)

                    @pl.when(wg < blocks.key // _PART)
                    def _():
                        own = pl.ds(wg * _PART, _PART)
                        bad_smem[own] = bad(own)
                        x = v_smem[slot, own]
                        finite = jnp.abs(x.astype(jnp.float32)) < jnp.inf
                        v_smem[slot, own] = jnp.where(finite, x, jnp.zeros_like(x))

                    fence()
                    sync(_LOOKED, warpgroups * THREADS)
                    found = along(plgpu.load(bad_smem, layout=COLUMN), shape, 1)
                    seen = weights.astype(jnp.float32) > 0
                    return total + jnp.where(seen, found, 0.0).sum(axis=1)

                parts = [pl.ds(n, _PART) for n in range(0, blocks.key, _PART)]
                found = ft.reduce(jnp.add, map(bad, parts))
                return lax.cond(any_nan(found, _LOOK + wg), replace, lambda: total)

            def in_turn(masked, t, carry):
                """One tile: its logits, softmax and output, one after another, while
                another warpgroup does the same a little later."""
                out, top, total = carry
                slot = lax.rem(t, stages)

                def product(acc):
                    plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[slot].T)
                    give_turn()
                    loaded = loads(masked, t)
                    return acc[...], loaded

                accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
                products, loaded = pl.run_scoped(product, accumulator)
                plgpu.barrier_arrive(k_free.at[slot])
                weights, top, total, decay = softmax(masked, products, loaded, top, total)
                out = out * along(decay, out.shape, 0)
                # Nothing of the softmax is to wait for the turn at the matrix units.
                out, weights, top, total = lax.optimization_barrier(
                    (out, weights, top, total)
                )
                total = without_nan(t, masked, weights, total)
                take_turn()

                def attended(acc):
                    plgpu.wgmma(acc, weights, v_smem.at[slot])
                    pl.when(t + 1 < some)(ft.partial(await_key, t + 1))

                out = pl.run_state(attended)(plgpu.WGMMAAccumulatorRef.init(out))
                plgpu.barrier_arrive(v_free.at[slot])
                return out, top, total

            def await_key(t):
                plgpu.barrier_wait(k_ready.at[lax.rem(t, stages)])

            def overlapped(out_acc):
                """All FULL tiles, of which there is one: the softmax of each, while the one
                before it is attended to."""

                def first(acc):
                    plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[0].T)
                    loaded = loads(False, 0)
                    return acc[...], loaded

                def step(t, carry):
                    weights, top, total = carry
                    slot, before = lax.rem(t, stages), lax.rem(t - 1, stages)

                    def products(acc):
                        await_key(t)
                        take_turn()
                        plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[slot].T)
                        plgpu.barrier_wait(v_ready.at[before])
                        plgpu.wgmma(out_acc, weights, v_smem.at[before])
                        give_turn()
                        loaded = loads(False, t)
                        products = plgpu.wgmma_accumulator_load(acc, wait_n=1)
                        plgpu.barrier_arrive(k_free.at[slot])
                        return softmax(False, products, loaded, top, total)

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
                plgpu.barrier_arrive(k_free.at[0])
                *carry, _ = softmax(False, products, loaded, *empty[1:])
                weights, top, total = lax.fori_loop(1, whole, step, tuple(carry))
                last = lax.rem(whole - 1, stages)
                plgpu.barrier_wait(v_ready.at[last])
                plgpu.wgmma(out_acc, weights, v_smem.at[last])
                out = out_acc[...]
                plgpu.barrier_arrive(v_free.at[last])
                return out, top, total

            empty = (
                full((blocks.query, value_dim), 0.0, TILE),
                full((blocks.query,), -jnp.inf, ROW),
                full((blocks.query,), 0.0, ROW),
            )
            plgpu.barrier_wait(q_ready.at[wg])
            # The first turn is that of the first warpgroup.
            pl.when(wg == warpgroups - 1)(give_turn)
            if overlap:
                accumulator = plgpu.WGMMAAccumulatorRef(empty[0].shape, jnp.float32)
                attend = ft.partial(pl.run_scoped, overlapped, accumulator)
                carry = (
                    attend() if not may_mask else lax.cond(whole > 0, attend, lambda: empty)
                )
                pl.when(whole < some)(ft.partial(await_key, whole))
                take_turn()
            else:
                await_key(0)
                take_turn()
                carry = lax.fori_loop(0, whole, ft.partial(in_turn, False), empty)
            if may_mask:
                carry = lax.fori_loop(whole, some, ft.partial(in_turn, True), carry)
            pl.when(wg < warpgroups - 1)(give_turn)
            out, top, total = carry
            lse = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(total)) * (1 / LOG2E))
            kept = 1 - request.pairs.dropout.rate if request.pairs.dropout else 1.0
            inverse = 1 / (jnp.where(total == 0, 1.0, total) * kept)
            # The other warpgroup may still read what this overwrites.
            sync(_DONE, warpgroups * THREADS)
            out_smem[wg] = (out * along(inverse, out.shape, 0)).astype(request.result_dtype)
            lse_smem[wg] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[b, mine, h])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, h, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == warpgroups)
        def _copy():
            plgpu.set_max_registers(24 if warpgroups == 2 else 32, action="decrease")

            def load(t, _):
                slot = lax.rem(t, stages)
                keys = (b, pl.ds(columns_ref[(*row, t)] * blocks.key, blocks.key), kv_head)

                def one(ref, smem, ready, free):
                    @pl.when(t >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(ref.at[keys], smem.at[slot], ready.at[slot])

                one(k_ref, k_smem, k_ready, k_free)
                one(v_ref, v_smem, v_ready, v_free)

            lax.fori_loop(0, some, load, None)

    free = plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups)
    ready = plgpu.Barrier(num_barriers=stages)
    out, lse = launch(
        kernel,
        "forward",
        batch * heads * rows,
        warpgroups,
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:3], value_dim), request.result_dtype),
            jax.ShapeDtypeStruct((batch, heads, rows * blocks.rows), jnp.float32),
        ),
        scratch_types=(
            plgpu.RefUnion(
                (
                    smem((warpgroups, blocks.query, head_dim), dtype),
                    smem((stages, blocks.key, head_dim), dtype),
                ),
                (smem((warpgroups, blocks.query, value_dim), request.result_dtype),),
            ),
            smem((stages, blocks.key, value_dim), dtype),
            plgpu.SMEM((warpgroups, blocks.query), jnp.float32),
            plgpu.SMEM((blocks.key,), jnp.float32),
            plgpu.Barrier(num_barriers=warpgroups),
            ready,
            ready,
            free,
            free,
        ),
    )(q, k, v, *tiles[:3], *terms.arrays)
    return out[:, :q_len], lse[..., :q_len].swapaxes(1, 2)
