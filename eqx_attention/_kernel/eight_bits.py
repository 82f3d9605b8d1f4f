"""Keys and values in 8 bits: what a kernel is given of them, and their scales, which are
copied by the threads that compute, as the copy engine cannot: those of one head are not
neighbours."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from .._keys import Paged, Quantized
from .assembly import address, i32, integer, numbers, pointer, SCALAR, warp_and_lane
from .hopper import whole_rows
from .pages import Stored


# Channels of which there must be a multiple, and tokens of a tile of keys.
CHANNELS = TOKENS = 64


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
        return Narrow(pool.values, pool.scale, [x.table.astype(jnp.int32)])


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


def own_key(n: Any) -> Any:
    """Of a tile, the n-th of the 16 keys that a warp has: 8 of each 32."""
    warp, _ = warp_and_lane()
    half, rest = arith.divui(n, i32(8)), arith.remui(n, i32(8))
    start = arith.addi(arith.muli(warp, i32(8)), rest)
    return arith.addi(start, arith.muli(half, i32(TOKENS // 2)))


def find_nan(narrow: Any, transforms: tuple, scales: Any) -> None:
    """Where a token in float8_e4m3fn holds NaN, its scale becomes NaN: then a hidden token
    does no harm. By each warp, of its own keys; all in shared memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.RefType()))
    def find(_, narrow, scales):
        void = ir.Type.parse("!llvm.void")
        _, blocks, lines, width = ir.MemRefType(narrow.type).shape
        _, lane = warp_and_lane()
        key_, half = arith.remui(lane, i32(16)), arith.divui(lane, i32(16))
        key_ = own_key(key_)
        group, line = arith.divui(key_, i32(lines)), arith.remui(key_, i32(lines))
        start = arith.muli(group, i32(blocks * lines * width))
        start = arith.addi(start, arith.muli(line, i32(width)))
        start = arith.addi(address(narrow), start)
        found: Any = i32(0)
        for n in range(blocks * width // 32):
            block, within = divmod(n * 32, width)
            # Another order for each row: then few threads read the same bank.
            place = arith.addi(half, i32(within // 16))
            place = arith.xori(place, arith.remui(line, i32(width // 16)))
            at = arith.addi(start, arith.muli(place, i32(16)))
            code = """{
                .reg .b32 x<4>;
                ld.shared.v4.b32 {x0, x1, x2, x3}, [$1 + OFFSET];
                and.b32 x0, x0, 0x7f7f7f7f;
                and.b32 x1, x1, 0x7f7f7f7f;
                and.b32 x2, x2, 0x7f7f7f7f;
                and.b32 x3, x3, 0x7f7f7f7f;
                add.u32 x0, x0, 0x01010101;
                add.u32 x1, x1, 0x01010101;
                add.u32 x2, x2, 0x01010101;
                add.u32 x3, x3, 0x01010101;
                or.b32 x0, x0, x1;
                or.b32 x2, x2, x3;
                or.b32 x0, x0, x2;
                or.b32 $0, $2, x0;
            }"""
            code = code.replace("OFFSET", str(block * lines * width))
            found = llvm.inline_asm(
                integer(32), [at, found], code, "=r,r,r", has_side_effects=True
            )
        to = arith.addi(address(scales), arith.muli(key_, i32(4)))
        code = """{
            .reg .b32 x;
            .reg .pred bad;
            and.b32 x, $0, 0x80808080;
            setp.ne.b32 bad, x, 0;
            @bad st.shared.b32 [$1], 0x7fc00000;
            bar.warp.sync 0xffffffff;
        }"""
        llvm.inline_asm(void, [found, to], code, "r,r", has_side_effects=True)

    find(narrow, scales)


def fetch_scales(to: Any, key_: tuple, value: tuple, head: Any) -> None:
    """Starts to copy those of a tile's keys and of its values into shared memory: each warp
    those of its own keys, one a thread.

    `key_` and `value` are each the scales of a batch element or of a page, `(tokens,
    heads)`, in global memory, and the first token. Beyond the end, the last one is read.
    """

    @plgpu.inline_mgpu(arg_types=(*3 * (plgpu.RefType(),), *3 * (SCALAR,)))
    def copy(_, to, key_, value, k_first, v_first, head):
        void = ir.Type.parse("!llvm.void")
        _, lane = warp_and_lane()
        which, own = arith.divui(lane, i32(16)), own_key(arith.remui(lane, i32(16)))
        is_key = arith.cmpi(arith.CmpIPredicate.eq, which, i32(0))

        def place_of(ref, first):
            tokens, heads = ir.MemRefType(ref.type).shape
            token = arith.addi(first.registers[()], own)
            token = arith.minsi(token, i32(tokens - 1))
            place = arith.addi(arith.muli(token, i32(heads)), head.registers[()])
            return pointer(ref, place, 4)

        source = arith.select(is_key, place_of(key_, k_first), place_of(value, v_first))
        place = arith.addi(arith.muli(which, i32(TOKENS)), own)
        target = arith.addi(address(to), arith.muli(place, i32(4)))
        code = "cp.async.ca.shared.global [$0], [$1], 4; cp.async.commit_group;"
        llvm.inline_asm(void, [target, source], code, "r,l", has_side_effects=True)

    (k_ref, k_first), (v_ref, v_first) = key_, value
    copy(to, k_ref, v_ref, *numbers(k_first, v_first, head))


def await_scales(later: int) -> None:
    """Waits for what this warp fetched, but for the last few (`later`) times."""

    @plgpu.inline_mgpu()
    def wait(_):
        void = ir.Type.parse("!llvm.void")
        code = f"cp.async.wait_group {later}; bar.warp.sync 0xffffffff;"
        llvm.inline_asm(void, [], code, "", has_side_effects=True)

    wait()


def place_of_scales(scales: Stored, b: Any, first: Any) -> tuple[Any, Any]:
    """In the kernel: the scales of a batch element or of a page, and where the token is."""
    where, start = scales.start(scales.page(b, first), first)
    return scales.ref.at[where], start
