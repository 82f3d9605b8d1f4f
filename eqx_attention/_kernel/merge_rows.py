"""What several blocks of threads, or warps, have of the same rows is merged, by the block
that is the last to finish: nothing is waited for, and nothing runs after the kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from .assembly import (
    f32,
    i32,
    integer,
    less,
    numbers,
    pointer,
    SCALAR,
    several_of,
    store_if,
)
from .head_rows import HeadRows
from .hopper import LOG2E


# So many parts of a row are on their way at once.
_AT_ONCE = 16


def is_last(counter: Any, of: int, name: Any, threads: int) -> jax.Array:
    """Counts this block of threads, of which so many threads call this, and says whether
    it is the last of so many. What the others wrote before they called is then seen.

    `counter` is a number in global memory, 0 at first; `name` is of a barrier.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )
    def last(_, ref, name):
        code = f"""{{
            .reg .pred first, last;
            .reg .s32 before;
            bar.sync $2, {threads};
            setp.eq.s32 first, $3, 0;
            mov.s32 before, -1;
            @first fence.acq_rel.gpu;
            @first atom.relaxed.gpu.global.add.s32 before, [$1], 1;
            @first fence.acq_rel.gpu;
            setp.eq.s32 last, before, {of - 1};
            bar.red.or.pred last, $2, {threads}, last;
            selp.s32 $0, 1, 0, last;
        }}"""
        operands = [utils.memref_ptr(ref), name.registers[()], utils.thread_idx()]
        found: Any = llvm.inline_asm(
            integer(32), operands, code, "=&r,l,r,r,~{memory}", has_side_effects=True
        )
        return FragmentedArray.splat(found, (), is_signed=True)

    return last(counter, jnp.asarray(name, jnp.int32)) != 0


def merge_rows(
    refs: tuple[Any, Any, Any, Any],
    at: tuple,
    rows: HeadRows,
    count: int,
    block: int,
    threads: int,
) -> None:
    """Merges parts of rows, as `eqx_attention._partial.merge_stacked` does, by the first so
    many threads of a block.

    **Arguments:**

    - `refs`: outputs and log-sum-exps of the parts, in float32; where both are written.
    - `at`: the first part, how many parts later the next one is, the part to write, the
        first row, the key head.
    - `count`: how many parts; `block`: how many rows, as far as they are there.
    """

    @plgpu.inline_mgpu(arg_types=(*4 * (plgpu.RefType(),), *5 * (SCALAR,)))
    def merge(_, outs, lses, out_ref, lse_ref, *at):
        part, step, to, first, head = (x.registers[()] for x in at)
        kind = ir.F32Type.get()
        channels = ir.MemRefType(outs.type).shape[-1]
        result = ir.MemRefType(out_ref.type).element_type
        own = arith.minsi(i32(block), arith.subi(i32(rows.count), first))
        units = arith.muli(own, i32(channels // 4))
        loop = scf.ForOp(utils.thread_idx(), units, i32(threads))
        with ir.InsertionPoint(loop.body):
            unit = loop.induction_variable
            row = arith.addi(first, arith.divui(unit, i32(channels // 4)))
            four = arith.remui(unit, i32(channels // 4))

            def load(n):
                """The log-sum-exp and four numbers of a part."""
                source = arith.addi(part, arith.muli(n, step))
                place = rows.place(source, row, head)
                lse: Any = llvm.inline_asm(
                    kind,
                    [pointer(lses, place, 4)],
                    "ld.global.cg.f32 $0, [$1];",
                    "=f,l",
                    has_side_effects=True,
                )
                place = arith.addi(arith.muli(place, i32(channels // 4)), four)
                code = "ld.global.cg.v4.f32 {$0, $1, $2, $3}, [$4];"
                return lse, several_of(kind, 4, [pointer(outs, place, 16)], code, "l")

            def several(start, size, carry):
                """Adds so many parts; of those that there are not, nothing."""
                top, total, *sums = carry
                parts = []
                for m in range(size):
                    n = arith.addi(start, i32(m))
                    lse, xs = load(arith.minsi(n, i32(count - 1)))
                    lse = arith.select(less(n, i32(count)), lse, f32(-jnp.inf))
                    parts.append((lse, xs))
                new = top
                for lse, _ in parts:
                    new = _asm(kind, "max.NaN.f32 $0, $1, $2;", new, lse)
                base = _unless(_is(new, -jnp.inf), new, 0.0)
                decay = _exp(arith.subf(top, base))
                total = arith.mulf(total, decay)
                sums = [arith.mulf(x, decay) for x in sums]
                for lse, xs in parts:
                    none, weight = _is(lse, -jnp.inf), _exp(arith.subf(lse, base))
                    total = arith.addf(total, weight)
                    seen = [_unless(none, x, 0.0) for x in xs]
                    sums = [
                        arith.addf(x, arith.mulf(weight, y))
                        for x, y in zip(sums, seen, strict=True)
                    ]
                return [new, total, *sums]

            carry = [f32(-jnp.inf), *[f32(0.0)] * 5]
            if count <= _AT_ONCE:
                carry = several(i32(0), count, carry)
            else:
                inner = scf.ForOp(i32(0), i32(count), i32(_AT_ONCE), carry)
                with ir.InsertionPoint(inner.body):
                    new = several(
                        inner.induction_variable, _AT_ONCE, list(inner.inner_iter_args)
                    )
                    scf.YieldOp(new)
                carry = list(inner.results)
            top, total, *sums = carry
            empty = _is(total, 0.0)
            safe = _unless(empty, total, 1.0)
            sums = [arith.divf(x, safe) for x in sums]
            log = _asm(kind, "lg2.approx.ftz.f32 $0, $1;", safe)
            lse = arith.addf(top, arith.mulf(log, f32(1 / LOG2E)))
            lse = _unless(empty, lse, -jnp.inf)
            place, always = rows.place(to, row, head), arith.constant(integer(1), 1)
            one = arith.cmpi(arith.CmpIPredicate.eq, four, i32(0))
            store_if(pointer(lse_ref, place, 4), one, [lse], "f32")
            place = arith.addi(arith.muli(place, i32(channels // 4)), four)
            if result == kind:
                store_if(pointer(out_ref, place, 16), always, sums, "f32")
            else:
                name = {ir.BF16Type.get(): "bf16", ir.F16Type.get(): "f16"}[result]
                code = f"cvt.rn.{name}x2.f32 $0, $2, $1;"
                words = [_asm(integer(32), code, *sums[n : n + 2]) for n in (0, 2)]
                store_if(pointer(out_ref, place, 8), always, words, "b32")
            scf.YieldOp([])

    merge(*refs, *numbers(*at))


def _asm(kind: Any, code: str, *operands: Any) -> Any:
    letter = "=f" if kind == ir.F32Type.get() else "=r"
    constraints = ",".join([letter, *["f"] * len(operands)])
    return llvm.inline_asm(kind, list(operands), code, constraints)


def _exp(x: Any) -> Any:
    return _asm(ir.F32Type.get(), "ex2.approx.ftz.f32 $0, $1;", arith.mulf(x, f32(LOG2E)))


def _is(x: Any, value: float) -> Any:
    return arith.cmpf(arith.CmpFPredicate.OEQ, x, f32(value))


def _unless(flag: Any, x: Any, other: float) -> Any:
    return arith.select(flag, f32(other), x)
