"""In a kernel of the backward pass: rows of tiles, how they are loaded, and how what they
add to the gradient of queries is added."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .backward import Barriers, Refs, WARPGROUPS, Work
from .hopper import await_count, count, counted, fence, zero_hidden


class Added(NamedTuple):
    """How a tile of the gradient of queries is added: where each warpgroup has a piece of
    it in shared memory, one after another; and for each piece, which queries and channels
    of the tile it is, as a function of the warpgroup."""

    smem: Any
    pieces: Sequence[Callable[[Any], tuple[Any, Any]]]


class Rows:
    """In the kernel: the rows of tiles of a block of threads, one after another."""

    def __init__(self, work: Work, refs: Refs, numbers: Any, barriers: Barriers):
        """`numbers` are two in shared memory."""
        self.work, self.refs, self.barriers = work, refs, barriers
        self.turns = (refs.counter, *barriers.turns), numbers

    def each(self, body: Callable[["Row", Any, Any], None], takes: bool = False) -> None:
        """`body(row, n, done)` for the n-th row, before which there were `done` tiles.
        One warp `takes` rows, and others are told of them."""
        turns = self.work.turns
        if not turns.taken:
            body(Row(self, lax.axis_index("block")), 0, 0)
            return
        following = ft.partial(turns.take if takes else turns.told, *self.turns)

        def one(state):
            n, piece, done = state
            row = Row(self, piece)
            body(row, n, done)
            return n + 1, following(n + 1, piece), done + row.num_tiles

        zero = jnp.int32(0)
        piece = following(zero, turns.before_first())
        lax.while_loop(lambda state: turns.left(state[1]), one, (zero, piece, zero))

    def copy(
        self, kv: Any, q: Any, dout: Any, dq: Added, swizzle: int | None = None
    ) -> None:
        """What the last warpgroup does, each in one warp: it loads all tiles, makes zeros
        of queries that see nothing, and adds to the gradient of queries what is to be added
        in order. `kv` is `(k_smem, v_smem)`, `q` and `dout` are `(smem, numbers)`, where
        the numbers are lse or delta; `swizzle` is that of tiles in shared memory."""
        plgpu.set_max_registers(24, action="decrease")

        def load(row, n, done):
            row.load(n, done, kv, q, dout)

        def look(row, n, done):
            row.zero_hidden(done, q, dout, swizzle)

        def add(row, n, done):
            row.add_in_order(dq)

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: self.each(load, takes=True))
            if self.work.may_be_empty:
                pl.when(warp == 2)(lambda: self.each(look))
            if self.work.order:

                @pl.when(warp == 1)
                def _():
                    plgpu.barrier_arrive(self.barriers.dq[1])
                    self.each(add)


class Row:
    """In the kernel: one row of tiles."""

    def __init__(self, rows: Rows, piece: Any):
        self.work, self.refs, self.barriers = rows.work, rows.refs, rows.barriers
        work, refs = self.work, self.refs
        self.batch, self.kv_head, self.number = work.place(piece)
        self.at = work.tiles.at(self.batch, self.kv_head, self.number)
        self.whole, self.some = refs.full[self.at], refs.some[self.at]
        self.high = refs.order[0][self.at] if work.high else 0
        self.k_base = self.number * work.rows

    @property
    def num_tiles(self) -> Any:
        return self.work.request.groups * self.some

    def tile(self, n: Any) -> tuple[Any, Any, tuple]:
        """Of the `n`-th tile: its head, its column, and where the row's lists have it."""
        groups = self.work.request.groups
        group, t = (lax.div(n, self.some), lax.rem(n, self.some)) if groups > 1 else (0, n)
        here = (*self.at, t)
        return self.kv_head * groups + group, self.refs.columns[here], here

    def for_tiles(self, step: Callable[[bool, Any], None]) -> None:
        """`step(masked, n)` for each tile."""
        groups, low = self.work.request.groups, self.high + self.whole

        def of_group(g, _):
            def one(masked, t, _):
                step(masked, g * self.some + t)

            if self.work.high:
                lax.fori_loop(0, self.high, ft.partial(one, True), None)
            lax.fori_loop(self.high, low, ft.partial(one, False), None)
            if self.work.may_mask:
                lax.fori_loop(low, self.some, ft.partial(one, True), None)

        if groups == 1:
            of_group(0, None)
        else:
            lax.fori_loop(0, groups, of_group, None)

    def queries(self, n: Any) -> tuple[Any, Any]:
        """The head of the `n`-th tile, and its first query."""
        head, column, _ = self.tile(n)
        return head, column * self.work.blocks.query

    def load(self, n: Any, done: Any, kv: Any, q: Any, dout: Any) -> None:
        """The first tile's queries are loaded while the row before is computed, and so
        before the keys and values."""
        work, refs, barriers = self.work, self.refs, self.barriers

        def load_keys():
            @pl.when(n > 0)
            def _():
                plgpu.barrier_wait(barriers.kv_free)

            keys = (self.batch, pl.ds(self.k_base, work.rows), self.kv_head)
            _copy_parts(refs.k, keys, kv[0], barriers.kv_ready)
            _copy_parts(refs.v, keys, kv[1], barriers.kv_ready)

        def load_queries(t, _):
            head, first = self.queries(t)
            rows = pl.ds(first, work.blocks.query)

            def one(ref, numbers_ref, smem, numbers, ready, free):
                slot = lax.rem(done + t, smem.shape[0])

                @pl.when(done + t >= smem.shape[0])
                def _():
                    plgpu.barrier_wait(free.at[slot])

                at, to = (self.batch, rows, head), ready.at[slot]
                _copy_parts(ref, at, smem.at[slot], to)
                numbers_at = numbers_ref.at[self.batch, head, rows]
                plgpu.copy_gmem_to_smem(numbers_at, numbers.at[slot], to)

            one(refs.q, refs.lse, *q, barriers.q_ready, barriers.q_free)
            one(refs.dout, refs.delta, *dout, barriers.dout_ready, barriers.dout_free)
            pl.when(t == 0)(load_keys)

        lax.fori_loop(0, self.num_tiles, load_queries, None)

    def ready(self, n: Any) -> list[Any]:
        """What is to be waited for before the products of the `n`-th tile, of all rows."""
        stages = (
            (self.barriers.q_ready, self.work.blocks.stages),
            (self.barriers.dout_ready, self.work.blocks.dout_stages),
            *((barrier, self.work.stages) for barrier in self.barriers.looked),
        )
        return [barrier.at[lax.rem(n, size)] for barrier, size in stages]

    def zero_hidden(self, done: Any, q: Any, dout: Any, swizzle: int | None) -> None:
        """Queries that see nothing, and gradients of their outputs, may hold NaN."""

        def step(n, _):
            *ready, looked = self.ready(done + n)
            for (smem, _), barrier in zip((q, dout), ready, strict=True):
                plgpu.barrier_wait(barrier)
                slot = lax.rem(done + n, smem.shape[0])
                low = q[1].at[lax.rem(done + n, q[0].shape[0])]
                for c in range(smem.shape[1]):
                    zero_hidden(smem.at[slot, c], low, swizzle)
            fence()
            plgpu.barrier_arrive(looked)

        lax.fori_loop(0, self.num_tiles, step, None)

    def add(self, dq: jax.Array, to: Added, piece: int, me: Any, tile: tuple) -> None:
        """Adds a piece of a tile, which this warpgroup has, to the gradient of queries, or
        hands it over to be added. `tile` is its head and its first query."""
        smem = to.smem.at[me]
        if self.work.order:
            ready, free = self.barriers.dq
            plgpu.barrier_wait(free)
            smem[...] = dq
            fence()
            plgpu.barrier_arrive(ready)
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem[...] = dq
            plgpu.commit_smem()
            self._copy_added(to, piece, me, tile, "add")

    def _copy_added(
        self, to: Added, piece: int, wg: Any, tile: tuple, operation: Any
    ) -> None:
        head, first = tile
        queries, channels = to.pieces[piece](wg)
        queries = pl.ds(first + queries.start, queries.size)
        at = self.refs.dq.at[self.batch, queries, head, channels]
        plgpu.copy_smem_to_gmem(to.smem.at[wg], at, reduction_op=operation)

    def add_in_order(self, to: Added) -> None:
        ready, free = self.barriers.dq
        last = len(to.pieces) - 1

        def step(n, turn):
            tile, before = self.queries(n), self._before(n)
            for piece in range(last + 1):
                plgpu.barrier_wait(ready)
                if piece == 0:

                    @pl.when(turn < before)
                    def _():
                        await_count(self._counter(n), before)

                for operation, here in ((None, before == 0), ("add", before > 0)):

                    @pl.when(here)
                    def _():
                        for wg in range(WARPGROUPS):
                            self._copy_added(to, piece, wg, tile, operation)

                if piece == last:
                    turn = self._turn(jnp.minimum(n + 1, self.num_tiles - 1))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(free)
            plgpu.wait_smem_to_gmem(0)
            count(self._counter(n))
            return turn

        lax.fori_loop(0, self.num_tiles, step, self._turn(0))

    def _turn(self, n: Any) -> Any:
        """How many wrote to the gradient of the queries of the `n`-th tile, so far."""
        return counted(self._counter(n))

    def _before(self, n: Any) -> Any:
        """How many write to it before this row: the first does not add, as there is
        nothing there."""
        _, _, here = self.tile(n)
        return self.refs.order[1][here]

    def _counter(self, n: Any) -> Any:
        head, column, _ = self.tile(n)
        return self.refs.order[2].at[self.batch, head, column]


def _copy_parts(ref: Any, at: tuple, smem: Any, barrier: Any) -> None:
    """Shared memory has the columns of an array in parts."""
    parts, *_, size = smem.shape
    for c in range(parts):
        here = (*at, pl.ds(c * size, size))
        plgpu.copy_gmem_to_smem(ref.at[here], smem.at[c], barrier)
