"""Products with keys and values in 8 bits, of a tile that has few rows: each warp has some
of its keys, and a softmax of its own. What is stored goes from shared memory to registers,
and becomes bfloat16 there: in the order in which the matrix units of a warp take it, as
neither the order of channels nor that of keys matters to a sum.

A tile has 8 or 16 rows and `TOKENS` keys. Of each 32 keys, a warp has 8. Arrays in `ROWS`
differ from warp to warp.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.mosaic.gpu.fragmented_array import Replicated, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from .assembly import (
    address,
    element,
    f32,
    i32,
    i64,
    integer,
    less,
    numbers,
    pointer,
    SCALAR,
    store_if,
    warp_and_lane,
)
from .eight_bits import TOKENS
from .head_rows import HeadRows


# Of 8 rows and 32 columns: a warp has 8 columns, a thread 2 of one row.
TILE = plgpu.Layout.TILED(
    Tiling(((8, 32), (8, 8), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
ROWS, COLUMNS = TILE.reduce(1), TILE.reduce(0)
LAYOUTS = (ROWS, COLUMNS, TILE)
# Each warp has its own output, of 16 rows.
OUT = plgpu.Layout.TILED(
    Tiling(((8, 8), (2,))),
    warp_dims=(Replicated(4),),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
OUT_ROWS = 16

# Of two of the bytes of a word (of which SELECT tells) to two numbers in bfloat16. Integers
# become 128 + n, of which the last 7 bits of n are the mantissa, less 128 or (if negative)
# 256.
_INT8 = """{
    .reg .b32 x, y, z;
    prmt.b32 x, $1, $2, SELECT;
    and.b32 y, x, 0xff7fff7f;
    and.b32 z, x, 0xff80ff80;
    sub.bf16x2 $0, y, z;
}"""
# The sign, exponent and mantissa of a float8_e4m3fn move to where they are in bfloat16, of
# which the exponents are larger by 120. What was NaN is then finite: see `find_nan`.
_FLOAT8 = """{
    .reg .b32 x;
    prmt.b32 x, $1, 0, SELECT;
    shl.b32 x, x, 4;
    and.b32 x, x, 0x87f087f0;
    mul.bf16x2 $0, x, $2;
}"""
# 2 to the power of 120, twice, in bfloat16.
_LARGE = 0x7B807B80


class _Widen:
    """From a word of four numbers in 8 bits to two of them in bfloat16."""

    def __init__(self, dtype: Any):
        self.other: Any
        self.float8 = dtype == jnp.uint8
        self.code = _FLOAT8 if self.float8 else _INT8
        if self.float8:
            self.other = i32(_LARGE)
        else:  # 0x43, and the compiler does not know it: then it stays in a register.
            code = "{ .reg .b32 z; mov.b32 z, %ctaid.z; or.b32 $0, z, 0x43; }"
            self.other = llvm.inline_asm(integer(32), [], code, "=r")

    def __call__(self, word: Any, first: int, second: int) -> Any:
        top = (8 + first, 8 + second) if self.float8 else (4, 4)
        select = hex(first | top[0] << 4 | second << 8 | top[1] << 12)
        code = self.code.replace("SELECT", select)
        return llvm.inline_asm(integer(32), [word, self.other], code, "=r,r,r")


def _struct(element: Any, count: int) -> Any:
    return llvm.StructType.get_literal([element] * count)


def _parts(struct: Any, element: Any, count: int) -> list[Any]:
    return [llvm.extractvalue(element, struct, [n]) for n in range(count)]


def _multiply(acc: list[Any], a: list[Any], b: list[Any]) -> list[Any]:
    """`acc + a @ b` of a warp: 16 rows, 16 in the sum, 8 columns."""
    kind = ir.F32Type.get()
    code = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, "
        "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    out = llvm.inline_asm(_struct(kind, 4), [*a, *b, *acc], code, constraints)
    return _parts(out, kind, 4)


def _row_and_place(x: Any) -> list[Any]:
    """Of a thread: which of the 8 rows of a matrix it has, and its place there."""
    return [arith.divui(x, i32(4)), arith.remui(x, i32(4))]


class _Matrices:
    """Shared memory in tiles of 8 lines, as a warp's threads read it: four matrices at
    once, of 8 lines and 16 bytes each."""

    def __init__(self, ref: Any, groups: tuple[Any, Any], transposed: bool):
        """`groups` are which 8 lines to read, and which 8 besides."""
        i8 = integer(8)
        kind = ir.MemRefType(ref.type)
        size = 1 if kind.element_type == i8 else 2
        _, blocks, lines, width = kind.shape
        self.width, self.transposed = width * size, transposed
        assert lines == 8 and self.width in (64, 128)
        self.bytes = blocks * self.width  # of a line
        _, lane = warp_and_lane()
        line, matrix = arith.remui(lane, i32(8)), arith.divui(lane, i32(8))
        first = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(matrix, i32(2)), i32(0))
        group = arith.muli(arith.select(first, *groups), i32(8 * self.bytes))
        # Where the copy engine puts a group of 16 bytes depends on the line.
        shift = line if self.width == 128 else arith.divui(line, i32(2))
        shift = arith.remui(shift, i32(self.width // 16))
        place = arith.xori(arith.divui(matrix, i32(2)), shift)
        start = arith.addi(address(ref), group)
        start = arith.addi(start, arith.muli(line, i32(self.width)))
        self.start = arith.addi(start, arith.muli(place, i32(16)))

    def read(self, n: int) -> list[Any]:
        """The n-th 32 bytes of each line: the first 16 of both groups, then the next."""
        block, within = divmod(n * 32, self.width)
        at = arith.xori(self.start, i32(within)) if within else self.start
        code = (
            f"ldmatrix.sync.aligned.m8n8.x4{'.trans' * self.transposed}.shared.b16 "
            f"{{$0, $1, $2, $3}}, [$4 + {block * 8 * self.width}];"
        )
        out = llvm.inline_asm(
            _struct(integer(32), 4), [at], code, "=r,=r,=r,=r,r", has_side_effects=True
        )
        return _parts(out, integer(32), 4)


def _own(ref: Any, transposed: bool) -> _Matrices:
    """A warp's keys of a tile, or their values: of each 32, it has 8."""
    warp, _ = warp_and_lane()
    return _Matrices(ref, (warp, arith.addi(warp, i32(4))), transposed)


def products(
    q: Any, q_transforms: tuple, rows: int, k: Any, k_transforms: tuple
) -> jax.Array:
    """Of 16 queries, of which the first so many rows count, and keys `(tokens, channels)`,
    both in shared memory. The queries' channels are in the order in which a word of four
    channels of a key becomes two of two: see `fetch_rows`."""
    channels, dtype = k.shape[1], k.dtype
    types = plgpu.RefType(q_transforms), plgpu.RefType(k_transforms)

    @plgpu.inline_mgpu(
        arg_types=types,
        return_type=plgpu.ShapeDtypeStruct((rows, TOKENS), jnp.float32, layout=TILE),
    )
    def compute(_, q, k):
        queries = _Matrices(q, (i32(0), i32(1)), False)
        words, widen, zero = _own(k, False), _Widen(dtype), f32(0.0)
        # Of each 8 keys two sums, of even and of odd steps, as one waits for the last.
        sums = [[[zero] * 4 for _ in range(2)] for _ in range(2)]
        for pair in range(channels // 32):
            read = words.read(pair)
            for parity in range(2):
                a = queries.read(2 * pair + parity)
                for n in range(2):
                    word = read[2 * parity + n]
                    b = [widen(word, x, x + 1) for x in (0, 2)]
                    sums[n][parity] = _multiply(sums[n][parity], a, b)
        whole = [[arith.addf(x, y) for x, y in zip(*both, strict=True)] for both in sums]
        pairs = ir.VectorType.get((2,), ir.F32Type.get())
        registers = np.empty((rows // 8, 2), object)
        for group in range(rows // 8):
            for n in range(2):
                part = whole[n][2 * group : 2 * group + 2]
                registers[group, n] = vector.from_elements(pairs, part)
        layout = TILE.to_mgpu()
        shape = layout.registers_shape((rows, TOKENS))
        return FragmentedArray(
            _registers=registers.reshape(shape), _layout=layout, _is_signed=None
        )

    return compute(q, k)


def add_values(
    out: jax.Array, decay: jax.Array, weights: jax.Array, v: Any, transforms: tuple
) -> jax.Array:
    """`out * decay + weights @ v`, of each warp for itself; `weights` in bfloat16. The
    channels of `out` are in an order that `write` knows."""
    (rows, _), dtype = weights.shape, v.dtype

    @plgpu.inline_mgpu(
        arg_types=(OUT, ROWS, TILE, plgpu.RefType(transforms)),
        return_type=plgpu.ShapeDtypeStruct(out.shape, jnp.float32, layout=OUT),
    )
    def compute(_, out, decay, weights, v):
        words, widen, none = _own(v, True), _Widen(dtype), i32(0)
        by = [element(x, 0) for x in decay.registers.flat]
        part = weights.registers.reshape(rows // 8, 2)
        part = [[utils.bitcast(x, integer(32)) for x in xs] for xs in part]
        low, high = part if rows == 16 else (part[0], [none] * 2)
        a = [low[0], high[0], low[1], high[1]]
        registers = out.registers.reshape(2, -1).copy()
        pairs = ir.VectorType.get((2,), ir.F32Type.get())

        def step(column, b):
            acc = []
            for group in range(2):
                both = [element(registers[group, column], n) for n in range(2)]
                acc += (
                    [arith.mulf(x, by[group]) for x in both] if group < rows // 8 else both
                )
            acc = _multiply(acc, a, b)
            for group in range(2):
                both = acc[2 * group : 2 * group + 2]
                registers[group, column] = vector.from_elements(pairs, both)

        for pair in range(words.bytes // 32):
            read = words.read(pair)
            for half in range(2):
                for odd in range(2):
                    column = 4 * pair + 2 * half + odd
                    both = read[2 * half : 2 * half + 2]
                    step(column, [widen(x, odd, odd + 2) for x in both])
        return FragmentedArray(
            _registers=registers.reshape(out.registers.shape),
            _layout=out.layout,
            _is_signed=None,
        )

    return compute(out, decay, weights, v)


def _folded(x: jax.Array, fold: Any) -> jax.Array:
    """One number a row, of a tile or of rows."""
    rows, whole = x.shape[0], x.ndim == 2

    @plgpu.inline_mgpu(
        arg_types=(TILE if whole else ROWS,),
        return_type=plgpu.ShapeDtypeStruct((rows,), jnp.float32, layout=ROWS),
    )
    def compute(_, x):
        single = ir.VectorType.get((1,), ir.F32Type.get())
        registers = []
        for group in x.registers.reshape(rows // 8, -1):
            (size,) = ir.VectorType(group[0].type).shape
            elements = [element(y, n) for y in group for n in range(size)]
            registers.append(vector.from_elements(single, [fold(elements)]))
        layout = ROWS.to_mgpu()
        shape = layout.registers_shape((rows,))
        array = np.array(registers, object).reshape(shape)
        return FragmentedArray(_registers=array, _layout=layout, _is_signed=None)

    return compute(x)


def _across(x: Any, combine: Any) -> Any:
    """Over the four threads that have a row."""
    kind = ir.F32Type.get()
    for distance in (1, 2):
        code = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
        other = llvm.inline_asm(kind, [x], code, "=f,f", has_side_effects=True)
        x = combine(x, other)
    return x


def _larger(x: Any, y: Any) -> Any:
    return llvm.inline_asm(ir.F32Type.get(), [x, y], "max.NaN.f32 $0, $1, $2;", "=f,f,f")


def _fold(combine: Any, elements: list[Any]) -> Any:
    while len(elements) > 1:
        pairs = zip(elements[::2], elements[1::2], strict=True)
        elements = [combine(x, y) for x, y in pairs]
    return elements[0]


def largest(tile: jax.Array) -> jax.Array:
    """Of each row of a tile, over a warp's keys."""
    return _folded(tile, lambda xs: _across(_fold(_larger, xs), _larger))


def own_sum(tile: jax.Array) -> jax.Array:
    """Of each row of a tile, over a thread's keys."""
    return _folded(tile, lambda xs: _fold(arith.addf, xs))


def whole_sum(rows: jax.Array) -> jax.Array:
    """Of what each thread has of a row, over a warp's."""
    return _folded(rows, lambda xs: _across(xs[0], arith.addf))


def write(
    out_ref: Any,
    lse_ref: Any,
    out: jax.Array,
    lse: jax.Array,
    factor: jax.Array,
    at: tuple,
    rows: HeadRows,
) -> None:
    """`out * factor` and `lse` of each warp.

    **Arguments:**

    - `out_ref`: in global memory, `(parts, q_len, q_heads, channels)`; `lse_ref`: the same
        without `channels`.
    - `at`: the first warp's part, how many parts later the next warp's is, the first row,
        and the key head.
    """

    @plgpu.inline_mgpu(
        arg_types=(
            *2 * (plgpu.RefType(),),
            OUT,
            *2 * (ROWS,),
            *4 * (SCALAR,),
        )
    )
    def store(_, out_ref, lse_ref, out, lse, factor, *at):
        part, step, first, head = (x.registers[()] for x in at)
        channels = ir.MemRefType(out_ref.type).shape[-1]
        warp, lane = warp_and_lane()
        own, four = _row_and_place(lane)
        part = arith.addi(part, arith.muli(warp, step))
        registers = out.registers.reshape(2, -1)
        for group, (inverse, one) in enumerate(
            zip(factor.registers.flat, lse.registers.flat, strict=True)
        ):
            row = arith.addi(first, arith.addi(own, i32(8 * group)))
            there, place = less(row, i32(rows.count)), rows.place(part, row, head)
            to = arith.addi(arith.muli(place, i32(channels // 4)), four)
            to = pointer(out_ref, to, 16)
            for n in range(channels // 16):
                both = registers[group, 2 * n], registers[group, 2 * n + 1]
                four_of = [element(x, e) for e in range(2) for x in both]
                values = [arith.mulf(x, element(inverse, 0)) for x in four_of]
                here = arith.addi(to, i64(64 * n))
                store_if(here, there, values, "f32")
            first_of = arith.cmpi(arith.CmpIPredicate.eq, four, i32(0))
            there = arith.andi(there, first_of)
            store_if(pointer(lse_ref, place, 4), there, [element(one, 0)], "f32")

    store(out_ref, lse_ref, out, lse, factor, *numbers(*at))
