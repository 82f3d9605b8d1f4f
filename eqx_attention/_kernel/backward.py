"""What the kernels of the backward pass share: their operands, and the arithmetic of a
tile. A block of threads has a row of tiles: some keys, and all the queries that see them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .._axes import ceil_div
from .._mechanism.base import Request
from .._mechanism.hidden import may_hide, never_empty
from .bits import packed, where
from .hopper import (
    all_finite,
    along,
    COLUMN,
    LOG2E,
    sync,
    THREADS,
    whole_rows,
)
from .logits import logit_of
from .schedule import place_of, section
from .tables import never_masked, table, table_in_order
from .terms import AtTile, keep_fn, Place, terms_of, visible_fn
from .turns import Turns


# How many heads at least are computed at once, if rows wait for one another.
_SIDE_BY_SIDE = 32


# Those that compute, of a block of threads.
WARPGROUPS = 2
# Of the 16 named barriers of a block, Mosaic GPU uses the first ones.
WRITTEN, DONE, LOOK = 5, 6, 7


class Blocks(NamedTuple):
    """How a backward kernel is cut: queries of a tile, keys of a product, and how many
    tiles of queries and of gradients of outputs are in flight; whether gradients of queries
    are added up in the same order each time."""

    query: int = 64
    key: int = 64
    stages: int = 2
    dout_stages: int = 2
    in_order: bool = False


class Refs(NamedTuple):
    """The arrays of a kernel, in global memory."""

    q: Any
    k: Any
    v: Any
    dout: Any
    lse: Any
    delta: Any
    columns: Any
    full: Any
    some: Any
    inputs: Sequence[Any]
    order: Sequence[Any]
    counter: Any
    dq: Any
    dk: Any
    dv: Any


class Barriers(NamedTuple):
    """When keys and values are there, and when they were read; likewise those of queries,
    and of gradients of outputs, one a stage; when those of a tile of which another warp
    makes zeros were `looked` at, if one does, of as many as either has stages; of gradients
    of queries, if another warp adds them, both; and those of turns."""

    kv_ready: Any
    kv_free: Any
    q_ready: Any
    q_free: Any
    dout_ready: Any
    dout_free: Any
    looked: Sequence[Any]
    dq: Sequence[Any]
    turns: Sequence[Any]


class Work:
    """A request as a backward kernel takes it."""

    def __init__(
        self,
        request: Request,
        lse: jax.Array,
        delta: jax.Array,
        dout: jax.Array,
        blocks: Blocks,
        rows: int,
        stay: bool,
    ):
        """`rows` are the keys of a row of tiles. `stay`: whether blocks of threads do for
        several rows, if there are more than multiprocessors."""
        operands = (request.query, request.key_, request.value, dout)
        self.q, self.k, self.v, self.dout = map(whole_rows, operands)
        self.request, self.blocks, self.rows = request, blocks, rows
        batch, q_len, heads, _ = request.query.shape
        self.kv_heads = request.key_.shape[2]
        self.num_rows = ceil_div(request.lengths[1], rows)
        self.logit = logit = logit_of(request, blocks.query, rows)
        self.scale = logit.scale
        # Whether there may be queries that see nothing, and hold NaN.
        self.may_be_empty = not never_empty(request)
        # Those beyond the end see nothing either, but a score may make NaN of them.
        beyond = logit.term is not None and q_len % blocks.query != 0
        self.ragged = beyond or (self.may_be_empty and may_hide(request))
        self.rate = request.pairs.dropout.rate if request.pairs.dropout else 0.0
        self.may_mask = not never_masked(request, rows)
        # Whether keys may be hidden, by the mask or by a score.
        self.may_hide = self.may_mask or may_hide(request)
        self.terms = terms_of(
            request,
            blocks.query,
            rows,
            {
                "visible": visible_fn(request, rows) if self.may_mask else None,
                "logit": logit.term,
                "keep": keep_fn if self.rate else None,
            },
            by_key=True,
        )

        def padded(x, value):
            x = x.swapaxes(1, 2)
            rest = -q_len % blocks.query
            return jnp.pad(x, ((0, 0), (0, 0), (0, rest)), constant_values=value)

        if self.rate:
            # Weights come out divided by how many are kept.
            lse, delta = lse + math.log1p(-self.rate), delta * (1 - self.rate)
        low = lse * (-1 / logit.scale if logit.added else -LOG2E)
        self.lse, self.delta = padded(low, -jnp.inf), padded(-delta, 0)
        self.order: list[Any] = []
        # Whether there may be rows that begin with tiles that are not FULL.
        self.high = False
        if blocks.in_order:
            self.tiles, order = table_in_order(request, blocks.query, rows)
            unknown = isinstance(order.high, Tracer)
            self.high = unknown or bool(np.asarray(order.high).any())
            # Of each tile of dq, how many were added.
            counts = (batch, heads, ceil_div(q_len, blocks.query))
            self.order = [*order, jax.new_ref(jnp.zeros(counts, jnp.int32))]
        else:
            self.tiles = table(request, blocks.query, rows, by_key=True)
            self.dq = jax.new_ref(jnp.zeros(self.q.shape, jnp.float32))
        # A row waits for those before it: few are to be computed at once.
        side_by_side = section(request, _SIDE_BY_SIDE if blocks.in_order else 1)
        # Whether what dropout keeps is computed before the products, not during them: they
        # leave no registers for it.
        self.early = blocks.query * blocks.key > 64 * 64
        self.place = place_of(batch, self.kv_heads, self.num_rows, side_by_side)
        pieces = batch * self.kv_heads * self.num_rows
        self.turns = Turns.of(pieces) if stay else Turns(pieces, pieces)

    @property
    def stages(self) -> int:
        """As many as there are at most, of queries or of gradients of outputs."""
        return max(self.blocks.stages, self.blocks.dout_stages)

    @property
    def arrays(self) -> list[Any]:
        operands = (self.q, self.k, self.v, self.dout, self.lse, self.delta)
        counts = (*self.order, *self.turns.arrays)
        dq = () if self.order else (self.dq,)
        return [*operands, *self.tiles, *self.terms.arrays, *counts, *dq]

    def barriers(self, kv_parts: int, parts: int) -> Barriers:
        """Keys and values are copied in so many parts in all, queries and gradients of
        outputs in so many each, and lse or delta."""

        def both(stages):
            ready = plgpu.Barrier(num_barriers=stages, num_arrivals=parts + 1)
            return ready, plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS)

        return Barriers(
            plgpu.Barrier(num_arrivals=kv_parts),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            *both(self.blocks.stages),
            *both(self.blocks.dout_stages),
            [plgpu.Barrier(num_barriers=self.stages)] if self.may_be_empty else [],
            [plgpu.Barrier(num_arrivals=n) for n in (WARPGROUPS, 1) if self.order],
            self.turns.scratch(WARPGROUPS + self.may_be_empty + bool(self.order)),
        )

    @property
    def out_type(self) -> tuple[Any, ...]:
        """The gradients: of queries too, if what is first to be added is written."""
        dq = jax.ShapeDtypeStruct(self.q.shape, jnp.float32)
        others = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (self.k, self.v))
        return (*([dq] if self.order else []), *others)

    @property
    def small_type(self) -> Any:
        """Shared memory for small things: where it starts is a multiple of 1024 bytes."""
        stages = self.blocks.stages + self.blocks.dout_stages
        return plgpu.SMEM((stages + 1, self.blocks.query), jnp.float32)

    def small(self, ref: Any) -> tuple[Any, Any, Any]:
        """In the kernel: lse and delta of each stage, and two numbers."""
        stages, dout_stages = self.blocks.stages, self.blocks.dout_stages
        low, delta = (
            ref.at[pl.ds(first, size)]
            for first, size in ((0, stages), (stages, dout_stages))
        )
        return low, delta, ref.at[stages + dout_stages, pl.ds(0, 2)]

    def refs(self, refs: Sequence[Any]) -> tuple[Refs, Sequence[Any]]:
        """In the kernel: its arrays, and its scratch."""
        given, refs = refs[:9], refs[9:]
        inputs, refs = refs[: self.terms.count], refs[self.terms.count :]
        order, refs = refs[: len(self.order)], refs[len(self.order) :]
        counter, *refs = refs if self.turns.taken else (None, *refs)
        return Refs(*given, inputs, order, counter, *refs[:3]), refs[3:]

    def gradients(self, *given: jax.Array) -> tuple[jax.Array, ...]:
        """From what the kernel gives."""
        dq, dk, dv = given if self.order else (self.dq[...], *given)
        q_len, kv_len = self.request.lengths
        return dq[:, :q_len] * self.scale, dk[:, :kv_len], dv[:, :kv_len]

    def at(self, refs: Refs, place: Place, masked: bool) -> dict[str, AtTile]:
        """In the kernel: the terms on one tile."""
        given = self.terms.given(refs.inputs)
        use = [name for name in given if masked or name != "visible"]
        return {
            n: given[n].at(given[n].load(place, given[n].load(place)), place) for n in use
        }

    def begin(
        self,
        at: dict[str, AtTile],
        numbers: tuple[Any, Any],
        ready: Sequence[Any],
        accs: Any,
    ) -> None:
        """Waits for a tile's queries and gradients of outputs; the accumulators of the
        products with them begin with `numbers`, which are lse and delta, and with what is
        added to logits. Both before the first product, for which the compiler would wait in
        between."""
        logits, dweights = accs
        added = at["logit"]() if self.logit.added and "logit" in at else None
        plgpu.barrier_wait(ready[0])
        if self.logit.added:
            low = _columns(numbers[0], logits.shape)
            logits[...] = low if added is None else low + added
        for barrier in ready[1:]:
            plgpu.barrier_wait(barrier)
        dweights[...] = _columns(numbers[1], dweights.shape)

    def weights(self, at: dict[str, AtTile], product: jax.Array, low: Any) -> jax.Array:
        """`low` is where lse is."""
        if self.logit.added:
            weights = jnp.exp2(product * (self.scale * LOG2E))
        else:
            logits = at["logit"](0, product)
            weights = jnp.exp2(logits + _columns(low, product.shape))
        if "visible" in at:
            weights = jnp.where(at["visible"](), weights, 0.0)
        if not self.ragged:
            return weights
        return jnp.where(_columns(low, product.shape) > -jnp.inf, weights, 0.0)

    def sloped(self, at: dict[str, AtTile], weights: jax.Array) -> jax.Array:
        """Weights, as the gradient of the product needs them."""
        if not self.logit.sloped:
            return weights
        out = weights * at["logit"](1)
        # What is not seen may be NaN, of which 0 times is NaN.
        hidden = "visible" in at or self.ragged
        return jnp.where(weights == 0, 0.0, out) if hidden else out

    def kept(self, at: dict[str, AtTile]) -> tuple[jax.Array, ...]:
        """Which pairs dropout keeps; computed while the matrix units compute products."""
        return packed(at["keep"]()) if "keep" in at else ()

    def ds(
        self,
        at: dict[str, AtTile],
        product: jax.Array,
        weights: jax.Array,
        dweights: jax.Array,
        delta: Any,
        kept: tuple[jax.Array, ...],
    ) -> jax.Array:
        """The gradient of the product, but for `scale`, from weights that are `sloped`.
        `delta` is where that is."""
        if kept:
            # All have delta already.
            dweights = where(kept, dweights, _columns(delta, dweights.shape))
        ds = weights * dweights
        if self.logit.pulled:
            ds = at["logit"](1, product, ds)
        if "visible" in at or self.ragged:
            ds = jnp.where(weights == 0, 0.0, ds)
        return ds


def dropped(weights: jax.Array, kept: tuple[jax.Array, ...]) -> jax.Array:
    """Weights after dropout."""
    return where(kept, weights, jnp.zeros_like(weights)) if kept else weights


def _columns(ref: Any, shape: Any) -> jax.Array:
    """One number for each query, on a tile."""
    return along(plgpu.load(ref, layout=COLUMN), shape, 1)


def clean(part: Any, own: Sequence[Any], swizzle: int | None = None) -> None:
    """Keys that are not seen may hold NaN, of which 0 times is NaN. What is seen does not
    need it here: lse and delta are NaN as well. Nor do values: what they make NaN of is
    replaced where it is hidden.

    Of all keys of a row of tiles, each warpgroup that computes looks at `part`, and cleans
    its `own`."""

    @pl.when(~all_finite(part, LOOK, swizzle, WARPGROUPS))
    def _():
        for ref in own:
            x = ref[...]
            finite = jnp.abs(x.astype(jnp.float32)) < jnp.inf
            ref[...] = jnp.where(finite, x, jnp.zeros_like(x))
        plgpu.commit_smem()
        sync(DONE, WARPGROUPS * THREADS)
