"""Devices exchange heads for tokens by a kernel that writes into each other's memory.

Each device cuts its arrays into parts, one for each device. A part goes to its place in
that device's array in tiles: the copy engine reads a tile into shared memory and writes it
to where it belongs, so that nothing is packed or transposed before or after. Each block of
threads has several tiles on their way, to all devices in turn. Nobody goes on before all
parts have arrived.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from .._axes import ceil_div
from .._device import num_multiprocessors


FEWEST = 8  # The fewest tokens of a device: so many rows of 16 bytes are aligned as needed.
_TILE = 16 * 1024
_STAGES = 8
_ROOM = 192 * 1024
_SIDE = 256  # the longest side of a tile
_ALIGNED = 16  # the bytes to which the copy engine rounds


class Tiles(NamedTuple):
    """How arrays that are alike are cut into tiles.

    Parts are of `batch` times `length` rows, a row of `lines` times `inner` elements. A
    tile has `rows` rows of `part` lines. The last tile of rows begins where it has as many
    as the others, and so may repeat some.
    """

    arrays: int
    batch: int
    length: int
    lines: int
    inner: int
    rows: int
    part: int

    @staticmethod
    def of(arrays: int, batch: int, length: int, channels: int, itemsize: int) -> "Tiles":
        """`channels` times `itemsize` is a multiple of 16, `length` at least `FEWEST`."""
        step = _ALIGNED // itemsize
        inner = step * _divisor(channels // step, _SIDE // step)
        lines = channels // inner
        part = _divisor(lines, min(_SIDE, max(1, _TILE // (FEWEST * inner * itemsize))))
        rows = min(_TILE // (part * inner * itemsize), _SIDE, length) // FEWEST * FEWEST
        return Tiles(arrays, batch, length, lines, inner, max(FEWEST, rows), part)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Arrays, elements of the batch, tiles of rows, tiles of lines."""
        rows = ceil_div(self.length, self.rows)
        return self.arrays, self.batch, rows, self.lines // self.part

    @property
    def places(self) -> int:
        return math.prod(self.counts)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.part, self.inner


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


class Share(NamedTuple):
    """Which tiles a block of threads moves, of arrays that are alike: of each `blocks`th
    place, those of all `n` parts, in turn. `start` is how many places others had before,
    so that blocks have equally many of all."""

    tiles: Tiles
    n: int
    block: Any
    blocks: int
    start: int

    @property
    def first(self) -> Any:
        ahead = self.blocks - self.start % self.blocks
        return lax.rem(self.block + jnp.int32(ahead), jnp.int32(self.blocks))

    @property
    def count(self) -> Any:
        return _div(self.tiles.places + self.blocks - 1 - self.first, self.blocks) * self.n

    def at(self, i: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Of its `i`th tile: the array, how many devices on it goes, the element of the
        batch, and the first row and line."""
        tiles = self.tiles
        place = self.first + _div(i, self.n) * self.blocks
        found = []
        for count in reversed(tiles.counts):
            found.append(_rem(place, count))
            place = _div(place, count)
        line, row, batch, array = found
        row = lax.min(row * tiles.rows, jnp.int32(tiles.length - tiles.rows))
        # Blocks begin with different devices, so that all are written to at once.
        return array, _rem(i + self.block, self.n), batch, row, line * tiles.part


def _div(x: Any, y: int) -> Any:
    return lax.div(x, jnp.int32(y))


def _rem(x: Any, y: int) -> Any:
    return lax.rem(x, jnp.int32(y))


def exchange(
    arrays: Sequence[Array], axis: str, n: int, to_heads: bool, blocks: int | None = None
) -> list[Array]:
    """Inside of a `jax.shard_map` over all axes of a mesh of devices of one process.

    **Arguments:**

    - `arrays`: each of `"batch len heads channels"`: a device's tokens of all heads, or all
        tokens of a device's heads.
    - `axis`, `n`: the mesh axis and its size.
    - `to_heads`: whether to give tokens for heads: `"batch n*len heads/n channels"`. If
        not, heads for tokens: `"batch len/n n*heads channels"`.
    - `blocks`: how many blocks of threads move tiles. Default as many as there are
        multiprocessors.
    """
    blocks = blocks or num_multiprocessors()
    views = [_cut(_parts(x, n, to_heads), to_heads) for x in arrays]
    kinds: dict[Any, list[int]] = {}
    for i, (x, _) in enumerate(views):
        kinds.setdefault((x.dtype, x.shape), []).append(i)
    order = [i for same in kinds.values() for i in same]
    tiles = [views[same[0]][1]._replace(arrays=len(same)) for same in kinds.values()]
    outs = _launch([views[i][0] for i in order], tiles, axis, n, to_heads, blocks)
    found: list[Any] = [None] * len(arrays)
    for i, out in zip(order, outs, strict=True):
        found[i] = _whole(out, arrays[i], n, to_heads)
    return found


def _parts(x: Array, n: int, to_heads: bool) -> Array:
    """`"batch len n channels"`, or `"batch n len channels"`; with channels of zeros where
    the copy engine would else have to round."""
    batch, length, heads, channels = x.shape
    if to_heads:
        x = x.reshape(batch, length, n, heads // n * channels)
    else:
        x = x.reshape(batch, n, length // n, heads * channels)
    return jnp.pad(x, (*3 * [(0, 0)], (0, -x.shape[3] % (_ALIGNED // x.dtype.itemsize))))


def _cut(x: Array, to_heads: bool) -> tuple[Array, Tiles]:
    """Rows in lines that are no longer than a tile's side."""
    batch, channels = x.shape[0], x.shape[3]
    tiles = Tiles.of(1, batch, x.shape[1 if to_heads else 2], channels, x.dtype.itemsize)
    return x.reshape(*x.shape[:3], tiles.lines, tiles.inner), tiles


def _whole(out: Array, x: Array, n: int, to_heads: bool) -> Array:
    batch, length, heads, channels = x.shape
    heads = heads // n if to_heads else heads
    out = out.reshape(*out.shape[:3], -1)[..., : heads * channels]
    if to_heads:
        return out.reshape(batch, n * length, heads, channels)
    return out.reshape(batch, length // n, n * heads, channels)


def _launch(
    arrays: list[Array],
    kinds: list[Tiles],
    axis: str,
    n: int,
    to_heads: bool,
    blocks: int,
) -> list[Array]:
    """Swaps the axes 1 and 2 of arrays, of which one is that of devices; those of each of
    `kinds` follow one another."""
    # So many tiles of each kind are on their way: for as many there is room.
    stages = max(2, min(_STAGES, _ROOM // (len(kinds) * _TILE)))

    def kernel(*refs):
        ins, refs = refs[: len(arrays)], refs[len(arrays) :]
        outs, scratch = refs[: len(arrays)], refs[len(arrays) :]
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)
        block, me = lax.axis_index("block"), lax.axis_index(axis)
        start = done = 0
        for tiles, smem, ready in zip(kinds, scratch[::2], scratch[1::2], strict=True):
            mine = slice(done, done + tiles.arrays)
            share = Share(tiles, n, block, blocks, start)
            _move(share, ins[mine], outs[mine], smem, ready, axis, to_heads)
            start, done = start + tiles.places, done + tiles.arrays
        # All that this block has written has arrived, and it says so to all others.
        plgpu.wait_smem_to_gmem(0)
        for shift in range(1, n):
            pl.semaphore_signal(arrived, device_id={axis: _rem(me + shift, n)})

        @pl.when(block == 0)
        def _():
            pl.semaphore_wait(arrived, (n - 1) * blocks, decrement=False)

    def swapped(x):
        shape = list(x.shape)
        shape[1:3] = reversed(shape[1:3])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    scratch = []
    for tiles, x in zip(kinds, _firsts(arrays, kinds), strict=True):
        scratch += [plgpu.SMEM((stages, *tiles.shape), x.dtype)]
        scratch += [plgpu.Barrier(num_barriers=stages)]
    return plgpu.kernel(
        kernel,
        out_type=[swapped(x) for x in arrays],
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="eqx_attention_peer_exchange",
    )(*arrays)


def _move(share: Share, ins, outs, smem, ready, axis: str, to_heads: bool) -> None:
    """Tiles of arrays that are alike: half of them on their way here, half on their way
    out."""
    tiles, n, me = share.tiles, share.n, lax.axis_index(axis)
    stages = smem.shape[0]
    leaving = stages // 2

    def tile(ref, at, device, tokens_first):
        _, _, batch, row, line = at
        rows, lines = pl.ds(row, tiles.rows), pl.ds(line, tiles.part)
        first = (rows, device) if tokens_first else (device, rows)
        return ref.at[(batch, *first, lines)]

    def load(i):
        at, slot = share.at(i), _rem(i, stages)
        for number, ref in enumerate(ins):

            @pl.when(at[0] == number)
            def _():
                source = tile(ref, at, _rem(me + at[1], n), to_heads)
                plgpu.copy_gmem_to_smem(source, smem.at[slot], ready.at[slot])

    def store(i):
        at, slot = share.at(i), _rem(i, stages)
        for number, ref in enumerate(outs):
            # What the copy engine knows of an array it knows for each device: which one it
            # is must follow from this device's number alone.
            for shift in range(n):

                @pl.when((at[0] == number) & (at[1] == shift))
                def _():
                    device: Any = {axis: _rem(me + shift, n)}
                    there = plgpu.remote_ref(ref, device) if shift else ref
                    target = tile(there, at, me, not to_heads)
                    plgpu.copy_smem_to_gmem(smem.at[slot], target)

    count = share.count

    @pl.loop(0, stages - leaving)
    def _(i):
        pl.when(i < count)(lambda: load(i))

    @pl.loop(0, count)
    def _(i):
        plgpu.barrier_wait(ready.at[_rem(i, stages)])
        store(i)
        plgpu.wait_smem_to_gmem(leaving, wait_read_only=True)
        more = i + (stages - leaving)
        pl.when(more < count)(lambda: load(more))


def _firsts(arrays: list[Array], kinds: list[Tiles]) -> list[Array]:
    """One array of each kind."""
    starts = [sum(x.arrays for x in kinds[:k]) for k in range(len(kinds))]
    return [arrays[start] for start in starts]
