"""What is written in the compiler's own words, where Pallas has none: numbers, addresses,
and what a thread loads and stores by itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector


SCALAR = plgpu.Layout.WG_SPLAT(())
THREADS = 128  # of a warpgroup


def integer(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def i32(x: int) -> Any:
    """32 bits, of which the highest may be set."""
    return arith.constant(integer(32), (x + 2**31) % 2**32 - 2**31)


def i64(x: int) -> Any:
    return arith.constant(integer(64), x)


def f32(x: float) -> Any:
    kind = ir.F32Type.get()
    return arith.constant(kind, ir.FloatAttr.get(kind, x))


def numbers(*xs: Any) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.int32) for x in xs]


def element(register: Any, place: int) -> Any:
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, dynamic_position=[], static_position=[place])


def warp_and_lane() -> tuple[Any, Any]:
    """The number of a warp in its warpgroup, and of a thread in its warp."""
    thread = arith.remui(utils.thread_idx(), i32(THREADS))
    return arith.divui(thread, i32(32)), arith.remui(thread, i32(32))


def address(ref: Any) -> Any:
    """Of shared memory, in bytes."""
    return llvm.ptrtoint(integer(32), utils.memref_ptr(ref))


def pointer(ref: Any, place: Any, size: int) -> Any:
    """In global memory: what is at a place, of things of so many bytes."""
    start = llvm.ptrtoint(integer(64), utils.memref_ptr(ref))
    return arith.addi(start, arith.muli(arith.extui(integer(64), place), i64(size)))


def flag(x: Any) -> Any:
    return arith.extui(integer(32), x)


def less(x: Any, y: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.slt, x, y)


def store_if(to: Any, there: Any, values: list[Any], kind: str) -> None:
    """Of a vector, where a flag says so."""
    names = ", ".join(f"${n + 2}" for n in range(len(values)))
    form, names = (f".v{len(values)}", f"{{{names}}}") if len(values) > 1 else ("", names)
    code = (
        "{ .reg .pred there; setp.ne.s32 there, $1, 0; "
        f"@there st.global{form}.{kind} [$0], {names}; }}"
    )
    constraints = ",".join(["l", "r", *["r" if kind == "b32" else "f"] * len(values)])
    void = ir.Type.parse("!llvm.void")
    operands = [to, flag(there), *values]
    llvm.inline_asm(void, operands, code, constraints, has_side_effects=True)


def several_of(
    kind: Any, count: int, operands: list[Any], code: str, inputs: str
) -> list[Any]:
    """Assembly that gives several numbers."""
    struct = llvm.StructType.get_literal([kind] * count)
    letter = "=&f" if kind == ir.F32Type.get() else "=&r"
    constraints = ",".join([*[letter] * count, inputs])
    out: Any = llvm.inline_asm(struct, operands, code, constraints, has_side_effects=True)
    return [llvm.extractvalue(kind, out, [n]) for n in range(count)]
