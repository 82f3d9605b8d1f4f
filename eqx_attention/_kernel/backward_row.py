"""In a kernel of the backward pass: a row of tiles, how they are loaded, and how what
they add to the gradient of queries is added."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .backward import Refs, WARPGROUPS, Work
from .hopper import await_count, count, counted, fence


class Added(NamedTuple):
    """How a tile of the gradient of queries is added: where each warpgroup has a piece of
    it in shared memory, one after another; for each piece, which queries and channels of
    the tile it is, as a function of the warpgroup; and if another warp adds them in order,
    the barriers that say when they are there, and when the next may be."""

    smem: Any
    pieces: Sequence[Callable[[Any], tuple[Any, Any]]]
    barriers: Sequence[Any]


class Row:
    """In the kernel: one row of tiles, and its block of threads."""

    def __init__(self, work: Work, refs: Refs):
        self.work, self.refs = work, refs
        self.batch, self.kv_head, self.number = work.place(lax.axis_index("block"))
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

    def copy(self, kv: Any, q: Any, dout: Any, dq: Added) -> None:
        """What the last warpgroup does: it loads all tiles, and adds to the gradient of
        queries what is to be added in order, each in one warp. `kv` is `(k_smem, v_smem,
        ready)`, `q` and `dout` are `(smem, numbers, ready, free)`, where the numbers are
        lse or delta."""
        plgpu.set_max_registers(24, action="decrease")
        if not self.work.order:
            self._load(kv, q, dout)
            return

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: self._load(kv, q, dout))
            pl.when(warp == 1)(lambda: self._add_in_order(dq))

    def _load(self, kv: Any, q: Any, dout: Any) -> None:
        work, refs = self.work, self.refs
        keys = (self.batch, pl.ds(self.k_base, work.rows), self.kv_head)
        _copy_parts(refs.k, keys, kv[0], kv[2])
        _copy_parts(refs.v, keys, kv[1], kv[2])

        def load(n, _):
            head, first = self.queries(n)
            rows = pl.ds(first, work.blocks.query)

            def one(ref, numbers_ref, smem, numbers, ready, free):
                slot = lax.rem(n, smem.shape[0])

                @pl.when(n >= smem.shape[0])
                def _():
                    plgpu.barrier_wait(free.at[slot])

                at, to = (self.batch, rows, head), ready.at[slot]
                _copy_parts(ref, at, smem.at[slot], to)
                numbers_at = numbers_ref.at[self.batch, head, rows]
                plgpu.copy_gmem_to_smem(numbers_at, numbers.at[slot], to)

            one(refs.q, refs.lse, *q)
            one(refs.dout, refs.delta, *dout)

        lax.fori_loop(0, self.num_tiles, load, None)

    def add(self, dq: jax.Array, to: Added, piece: int, me: Any, tile: tuple) -> None:
        """Adds a piece of a tile, which this warpgroup has, to the gradient of queries, or
        hands it over to be added. `tile` is its head and its first query."""
        smem = to.smem.at[me]
        if self.work.order:
            ready, free = to.barriers
            plgpu.barrier_wait(free)
            smem[...] = dq
            fence()
            plgpu.barrier_arrive(ready)
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem[...] = dq
            plgpu.commit_smem()
            self._copy_added(to, piece, me, tile)

    def _copy_added(self, to: Added, piece: int, wg: Any, tile: tuple) -> None:
        head, first = tile
        queries, channels = to.pieces[piece](wg)
        queries = pl.ds(first + queries.start, queries.size)
        at = self.refs.dq.at[self.batch, queries, head, channels]
        plgpu.copy_smem_to_gmem(to.smem.at[wg], at, reduction_op="add")

    def _add_in_order(self, to: Added) -> None:
        ready, free = to.barriers
        plgpu.barrier_arrive(free)
        last = len(to.pieces) - 1

        def step(n, turn):
            tile = self.queries(n)
            for piece in range(last + 1):
                plgpu.barrier_wait(ready)
                if piece == 0:
                    self._take_turn(n, turn)
                for wg in range(WARPGROUPS):
                    self._copy_added(to, piece, wg, tile)
                if piece == last:
                    turn = self._turn(jnp.minimum(n + 1, self.num_tiles - 1))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(free)
            plgpu.wait_smem_to_gmem(0)
            count(self._counter(n))
            return turn

        lax.fori_loop(0, self.num_tiles, step, self._turn(0))

    def _turn(self, n: Any) -> Any:
        """How often the gradient of the queries of the `n`-th tile was added to, so far."""
        return counted(self._counter(n))

    def _take_turn(self, n: Any, turn: Any) -> None:
        """Waits until those were added that come first, unless `turn` says so already."""
        _, _, here = self.tile(n)
        before = self.refs.order[1][here]

        @pl.when(turn < before)
        def _():
            await_count(self._counter(n), before)

    def _counter(self, n: Any) -> Any:
        head, column, _ = self.tile(n)
        return self.refs.order[2].at[self.batch, head, column]


def _copy_parts(ref: Any, at: tuple, smem: Any, barrier: Any) -> None:
    """Shared memory has the columns of an array in parts."""
    parts, *_, size = smem.shape
    for c in range(parts):
        here = (*at, pl.ds(c * size, size))
        plgpu.copy_gmem_to_smem(ref.at[here], smem.at[c], barrier)
