"""Rows of a tile that are query heads: those that share a key head, of one query after
another. They are read and written where they are, in arrays `(parts, q_len, q_heads,
channels)`: by the threads themselves, as the copy engine wants 8 rows, one after another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from .._mechanism.base import Request
from .assembly import (
    address,
    element,
    flag,
    i32,
    i64,
    integer,
    less,
    numbers,
    pointer,
    SCALAR,
    several_of,
    store_if,
    THREADS,
    warp_and_lane,
)
from .hopper import ROW, TILE


class HeadRows(NamedTuple):
    """The rows of a key head."""

    q_len: int
    heads: int
    groups: int

    @staticmethod
    def of(request: Request) -> "HeadRows":
        _, q_len, heads, _ = request.query.shape
        return HeadRows(q_len, heads, request.groups)

    @property
    def count(self) -> int:
        return self.q_len * self.groups

    def types(self, channels: int, parts: list[tuple[int, Any]]) -> tuple:
        """Those of outputs and log-sum-exps, of so many parts in such a dtype each."""
        return tuple(
            jax.ShapeDtypeStruct(shape, dtype)
            for count, kind in parts
            for shape, dtype in (
                ((count, self.q_len, self.heads, channels), kind),
                ((count, self.q_len, self.heads), jnp.float32),
            )
        )

    def place(self, part: Any, row: Any, head: Any) -> Any:
        """In such arrays: where a row of a key head is."""
        query = arith.divui(row, i32(self.groups))
        member = arith.remui(row, i32(self.groups))
        at = arith.addi(arith.muli(part, i32(self.q_len)), query)
        own = arith.addi(arith.muli(head, i32(self.groups)), member)
        return arith.addi(arith.muli(at, i32(self.heads)), own)


def pairs_of(refs: Any, count: int) -> tuple[list[Any], Any]:
    """So many (output, log-sum-exp), and the rest."""
    return [refs[2 * n : 2 * n + 2] for n in range(count)], refs[2 * count :]


def fetch_rows(
    to: Any, transforms: tuple, source: Any, at: tuple, rows: HeadRows, pairs: bool = False
) -> None:
    """A warpgroup copies queries into shared memory, of which it has tiles of 8 lines.
    Rows that there are not become 0.

    **Arguments:**

    - `to`: `(rows, channels)`, with these `transforms`.
    - `source`: in global memory, `(batch, q_len, q_heads, channels)`, of 16 bits.
    - `at`: the batch element, the first row, the key head.
    - `pairs`: whether of each 16 channels, those of every second pair come first: see
        `few_rows.py`.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms), plgpu.RefType(), *3 * (SCALAR,))
    )
    def copy(_, to, source, *at):
        part, first, head = (x.registers[()] for x in at)
        groups, blocks, lines, width = ir.MemRefType(to.type).shape
        width *= 2
        line_bytes = blocks * width
        of_row = line_bytes // 32
        total = groups * lines * of_row
        thread = arith.remui(utils.thread_idx(), i32(THREADS))
        shared = address(to)
        for n in range(-(-total // THREADS)):
            unit = arith.addi(thread, i32(n * THREADS))
            row, piece = arith.divui(unit, i32(of_row)), arith.remui(unit, i32(of_row))
            own = arith.addi(first, row)
            there = less(own, i32(rows.count))
            place = arith.muli(rows.place(part, own, head), i32(of_row))
            place = arith.addi(place, piece)
            code = (
                "{ .reg .pred there; setp.ne.s32 there, $9, 0; "
                + "".join(f"mov.b32 ${m}, 0; " for m in range(8))
                + "@there ld.global.v4.b32 {$0, $1, $2, $3}, [$8]; "
                "@there ld.global.v4.b32 {$4, $5, $6, $7}, [$8 + 16]; }"
            )
            operands = [pointer(source, place, 32), flag(there)]
            words = several_of(integer(32), 8, operands, code, "l,r")
            halves = (words[::2], words[1::2]) if pairs else (words[:4], words[4:])
            group, line = arith.divui(row, i32(lines)), arith.remui(row, i32(lines))
            block = arith.divui(piece, i32(width // 32))
            within = arith.muli(arith.remui(piece, i32(width // 32)), i32(2))
            # Where the copy engine puts a group of 16 bytes depends on the line.
            shift = line if width == 128 else arith.divui(line, i32(128 // width))
            target = arith.addi(shared, arith.muli(group, i32(lines * line_bytes)))
            target = arith.addi(target, arith.muli(block, i32(lines * width)))
            target = arith.addi(target, arith.muli(line, i32(width)))
            inside = flag(less(unit, i32(total)))
            for m, half in enumerate(halves):
                to_ = arith.xori(arith.addi(within, i32(m)), shift)
                to_ = arith.addi(target, arith.muli(to_, i32(16)))
                code = (
                    "{ .reg .pred there; setp.ne.s32 there, $1, 0; "
                    "@there st.shared.v4.b32 [$0], {$2, $3, $4, $5}; }"
                )
                void = ir.Type.parse("!llvm.void")
                operands = [to_, inside, *half]
                llvm.inline_asm(void, operands, code, "r,r,r,r,r,r", has_side_effects=True)

    copy(to, source, *numbers(*at))


def write_rows(
    out_ref: Any, lse_ref: Any, out: jax.Array, lse: jax.Array, at: tuple, rows: HeadRows
) -> None:
    """A warpgroup writes what it has of 64 rows, as many of them as there are.

    **Arguments:**

    - `out_ref`, `lse_ref`: in global memory, `(parts, q_len, q_heads, channels)` and
        without `channels`.
    - `out`: in the layout and dtype of the first.
    - `at`: the part, the first row, the key head.
    """
    narrow = out.dtype != jnp.float32

    @plgpu.inline_mgpu(arg_types=(*2 * (plgpu.RefType(),), TILE, ROW, *3 * (SCALAR,)))
    def write(_, out_ref, lse_ref, out, lse, *at):
        part, first, head = (x.registers[()] for x in at)
        channels = ir.MemRefType(out_ref.type).shape[-1]
        warp, lane = warp_and_lane()
        line, four = arith.divui(lane, i32(4)), arith.remui(lane, i32(4))
        registers = out.registers.reshape(channels // 8, 2)
        first = arith.addi(first, arith.addi(arith.muli(warp, i32(16)), line))
        for half, top in enumerate(lse.registers.flat):
            row = arith.addi(first, i32(8 * half))
            there = less(row, i32(rows.count))
            place = rows.place(part, row, head)
            size = 2 if narrow else 4
            pair = arith.addi(arith.muli(place, i32(channels // 2)), four)
            to = pointer(out_ref, pair, 2 * size)
            for n in range(channels // 8):
                here = arith.addi(to, i64(8 * size * n))
                both = registers[n, half]
                if narrow:
                    store_if(here, there, [utils.bitcast(both, integer(32))], "b32")
                else:
                    store_if(here, there, [element(both, m) for m in range(2)], "f32")
            one = arith.andi(there, arith.cmpi(arith.CmpIPredicate.eq, four, i32(0)))
            store_if(pointer(lse_ref, place, 4), one, [element(top, 0)], "f32")

    write(out_ref, lse_ref, out, lse, *numbers(*at))
