"""Keys and values in 8 bits: a tile of them in shared memory becomes one of bfloat16, and
their scales are copied by the threads that compute, as the copy engine cannot: those of one
head are not neighbours."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from .._keys import Paged, Quantized
from .hopper import THREADS, whole_rows


# Channels of a tile of the matrix units' shared memory, and tokens of a tile of keys.
CHANNELS = TOKENS = 64
# So many groups of 8 numbers does a thread load before it stores the first.
_AHEAD = 8

# Of 8 numbers in two words to 8 in four, of bfloat16. Integers become 128 + n, of which the
# last 7 bits of n are the mantissa, less 128 or (if negative) 256.
_INT8 = """{
    .reg .b32 x<4>, y<4>, z<4>;
    prmt.b32 x0, $0, 0x43, 0x4140;
    prmt.b32 x1, $0, 0x43, 0x4342;
    prmt.b32 x2, $1, 0x43, 0x4140;
    prmt.b32 x3, $1, 0x43, 0x4342;
    and.b32 y0, x0, 0xff7fff7f;
    and.b32 y1, x1, 0xff7fff7f;
    and.b32 y2, x2, 0xff7fff7f;
    and.b32 y3, x3, 0xff7fff7f;
    and.b32 z0, x0, 0xff80ff80;
    and.b32 z1, x1, 0xff80ff80;
    and.b32 z2, x2, 0xff80ff80;
    and.b32 z3, x3, 0xff80ff80;
    sub.bf16x2 x0, y0, z0;
    sub.bf16x2 x1, y1, z1;
    sub.bf16x2 x2, y2, z2;
    sub.bf16x2 x3, y3, z3;
    st.shared.v4.b32 [$2 + OFFSET], {x0, x1, x2, x3};
}"""
# The sign, exponent and mantissa of a float8_e4m3fn move to where they are in bfloat16, of
# which the exponents are larger by 120. What was NaN is then finite: its token's scale
# becomes NaN, so that a hidden token does no harm.
_FLOAT8 = """{
    .reg .b32 x<4>, n<2>;
    .reg .pred bad;
    prmt.b32 x0, $0, 0, 0x9180;
    prmt.b32 x1, $0, 0, 0xb3a2;
    prmt.b32 x2, $1, 0, 0x9180;
    prmt.b32 x3, $1, 0, 0xb3a2;
    shl.b32 x0, x0, 4;
    shl.b32 x1, x1, 4;
    shl.b32 x2, x2, 4;
    shl.b32 x3, x3, 4;
    and.b32 x0, x0, 0x87f087f0;
    and.b32 x1, x1, 0x87f087f0;
    and.b32 x2, x2, 0x87f087f0;
    and.b32 x3, x3, 0x87f087f0;
    mul.bf16x2 x0, x0, $4;
    mul.bf16x2 x1, x1, $4;
    mul.bf16x2 x2, x2, $4;
    mul.bf16x2 x3, x3, $4;
    st.shared.v4.b32 [$2 + OFFSET], {x0, x1, x2, x3};
    and.b32 n0, $0, 0x7f7f7f7f;
    and.b32 n1, $1, 0x7f7f7f7f;
    add.u32 n0, n0, 0x01010101;
    add.u32 n1, n1, 0x01010101;
    or.b32 n0, n0, n1;
    and.b32 n0, n0, 0x80808080;
    setp.ne.b32 bad, n0, 0;
    @bad st.shared.b32 [$3 + TOKEN], 0x7fc00000;
}"""
# What each is given besides: 2 to the power of 120, twice, in bfloat16.
_NUMBERS = {_INT8: (), _FLOAT8: (0x7B807B80,)}


class Narrow(NamedTuple):
    """What is stored of keys, or of values: 8 bits each, a scale for each token and head,
    and the table of pages, if there is one."""

    values: jax.Array
    scale: jax.Array
    pages: list[jax.Array]

    @staticmethod
    def of(x: Any) -> "Narrow":
        if not isinstance(x, Paged):
            return Narrow(whole_rows(x.values), x.scale, [])
        pool: Any = x.pool
        table = jnp.clip(x.table.astype(jnp.int32), 0, pool.shape[0] - 1)
        return Narrow(pool.values, pool.scale, [table])


def in_8_bits(x: Any) -> bool:
    return isinstance(x.pool if isinstance(x, Paged) else x, Quantized)


def unfit(name: str, x: Any) -> tuple[str, ...]:
    """Why the kernel for 8 bits does not read these keys or values, if it does not."""
    if not in_8_bits(x):
        return (f"{name} would have to be in 8 bits too",)
    reasons, pool = [], x.pool if isinstance(x, Paged) else x
    if x.dtype != jnp.bfloat16:
        reasons.append(f"{name} in 8 bits would have to stand for bfloat16, not {x.dtype}")
    if pool.scale.dtype != jnp.float32:
        reasons.append(f"{name} has scales in {pool.scale.dtype}, not float32")
    if x.shape[-1] % CHANNELS:
        reasons.append(f"{name} has {x.shape[-1]} channels, no multiple of {CHANNELS}")
    if isinstance(x, Paged) and x.page_size % TOKENS:
        reasons.append(f"{name} has pages of {x.page_size} tokens, no multiple of {TOKENS}")
    return tuple(reasons)


def _i32(x: int) -> Any:
    return arith.constant(ir.IntegerType.get_signless(32), x)


def _thread() -> Any:
    """The number of a thread in its warpgroup."""
    return arith.remui(utils.thread_idx(), _i32(THREADS))


def _address(ref: Any) -> Any:
    """Of shared memory, in bytes."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def widen(narrow: Any, wide: Any, scales: Any, transforms: tuple) -> None:
    """`(tokens, channels)` of 8 bits as bfloat16, by a warpgroup.

    **Arguments:**

    - `narrow`: in shared memory, row by row.
    - `wide`: in shared memory, as the matrix units read it. `transforms` are its own.
    - `scales`: of these tokens, in shared memory.
    """
    tokens, channels = narrow.shape
    float8 = narrow.dtype == jnp.uint8

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(transforms), plgpu.RefType())
    )
    def convert(_, narrow, wide, scales):
        i32, void = ir.IntegerType.get_signless(32), ir.Type.parse("!llvm.void")
        pair = llvm.StructType.get_literal([i32, i32])
        pitch = ir.MemRefType(wide.type).get_strides_and_offset()[0][0] * 2
        thread = _thread()
        part, row = arith.remui(thread, _i32(8)), arith.divui(thread, _i32(8))
        line = arith.remui(row, _i32(8))

        def sum_of(first, *products):
            for x, factor in products:
                first = arith.addi(first, arith.muli(x, _i32(factor)))
            return first

        source = sum_of(_address(narrow), (row, channels), (part, 8))
        place = arith.xori(part, line)
        eighth = arith.divui(row, _i32(8))
        target = sum_of(_address(wide), (eighth, pitch), (line, 128), (place, 16))
        flags = sum_of(_address(scales), (row, 4))
        # Of two neighbouring rows, one starts with the other 64 channels: then no two
        # threads read the same bank.
        odd = arith.remui(row, _i32(2))
        even = arith.subi(_i32(1), odd)
        blocks = channels // CHANNELS
        both = [
            (sum_of(source, (x, CHANNELS)), sum_of(target, (x, 1024))) for x in (odd, even)
        ]
        groups = []
        for block in range(blocks):
            paired = block // 2 * 2 + 1 < blocks
            start = both[block % 2] if paired else (source, target)
            first = block // 2 * 2 if paired else block
            for n in range(tokens // 16):
                offset = n * 16 * channels + first * CHANNELS
                groups.append((start, offset, 2 * n * pitch + first * 1024, n * 64))

        def load(group):
            (source, _), offset, *_ = group
            code = f"ld.shared.v2.b32 {{$0, $1}}, [$2 + {offset}];"
            return llvm.inline_asm(pair, [source], code, "=r,=r,r", has_side_effects=True)

        def store(group, words):
            (_, target), _, offset, token = group
            words = [llvm.extractvalue(i32, words, [n]) for n in range(2)]
            code = _FLOAT8 if float8 else _INT8
            operands = [*words, target, flags, *map(_i32, _NUMBERS[code])]
            constraints = ",".join("r" * len(operands))
            code = code.replace("OFFSET", str(offset)).replace("TOKEN", str(token))
            llvm.inline_asm(void, operands, code, constraints, has_side_effects=True)

        for n in range(0, len(groups), _AHEAD):
            some = groups[n : n + _AHEAD]
            for group, words in zip(some, [load(group) for group in some], strict=True):
                store(group, words)

    convert(narrow, wide, scales)


def fetch_scales(to: Any, key_: tuple, value: tuple, head: Any) -> None:
    """Starts to copy those of a tile's keys, and then those of its values, into shared
    memory: one a thread of a warpgroup.

    `key_` and `value` are each the scales of a batch element or of a page, `(tokens,
    heads)`, in global memory, and the first token. Beyond the end, the last one is read.
    """

    @plgpu.inline_mgpu(
        arg_types=(*3 * (plgpu.RefType(),), *3 * (plgpu.Layout.WG_SPLAT(()),))
    )
    def copy(_, to, key_, value, k_first, v_first, head):
        i64, void = ir.IntegerType.get_signless(64), ir.Type.parse("!llvm.void")
        thread = _thread()
        is_key = arith.cmpi(arith.CmpIPredicate.ult, thread, _i32(TOKENS))

        def address(ref, first):
            tokens, heads = ir.MemRefType(ref.type).shape
            token = arith.addi(first.registers[()], arith.remui(thread, _i32(TOKENS)))
            token = arith.minsi(token, _i32(tokens - 1))
            place = arith.addi(arith.muli(token, _i32(heads)), head.registers[()])
            start = llvm.ptrtoint(i64, utils.memref_ptr(ref))
            width = arith.constant(i64, 4)
            return arith.addi(start, arith.muli(arith.extui(i64, place), width))

        source = arith.select(is_key, address(key_, k_first), address(value, v_first))
        target = arith.addi(_address(to), arith.muli(thread, _i32(4)))
        code = "cp.async.ca.shared.global [$0], [$1], 4; cp.async.commit_group;"
        llvm.inline_asm(void, [target, source], code, "r,l", has_side_effects=True)

    (k_ref, k_first), (v_ref, v_first) = key_, value
    numbers = (jnp.asarray(x, jnp.int32) for x in (k_first, v_first, head))
    copy(to, k_ref, v_ref, *numbers)


def await_scales(later: int) -> None:
    """Waits for what this thread fetched, but for the last few (`later`) times."""

    @plgpu.inline_mgpu()
    def wait(_):
        void = ir.Type.parse("!llvm.void")
        code = f"cp.async.wait_group {later};"
        llvm.inline_asm(void, [], code, "", has_side_effects=True)

    wait()


def place_of_scales(ref: Any, pages: Sequence[Any], b: Any, first: Any) -> tuple[Any, Any]:
    """In the kernel: the scales of a batch element or of a page, and where the token is."""
    if not pages:
        return ref.at[b], first
    page_size = ref.shape[1]
    return ref.at[pages[0][b, lax.div(first, page_size)]], lax.rem(first, page_size)
