"""What the Hopper kernels share: layouts, shared memory, named barriers, loads."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from .._axes import largest_divisor
from .assembly import integer, SCALAR, THREADS as THREADS


TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)
LAYOUTS = (ROW, COLUMN, TILE)
LOG2E = 1.4426950408889634
_VECTOR = 16  # bytes that a thread reads at once


def smem(shape: tuple[int, ...], dtype: Any, swizzle: int | None = None) -> Any:
    """Shared memory that the matrix units read: in tiles of 8 rows, swizzled. `swizzle` is
    the bytes of a row of a tile."""
    return plgpu.SMEM(shape, dtype, transforms=_tiled(shape, dtype, swizzle))


def _tiled(shape: tuple[int, ...], dtype: Any, swizzle: int | None) -> tuple[Any, Any]:
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = swizzle or (128 if shape[-1] * bits % 1024 == 0 else 64)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)


def _named_barrier(operation: str, name: Any, threads: int) -> None:
    """Of the 16 barriers of a block: cheaper than those in shared memory, and no phases."""

    @plgpu.inline_mgpu(arg_types=(SCALAR,))
    def bar(_, name):
        void = ir.Type.parse("!llvm.void")
        code = f"bar.{operation} $0, {threads};"
        registers = [name.registers[()]]
        llvm.inline_asm(void, registers, code, "r", has_side_effects=True)

    bar(jnp.asarray(name, jnp.int32))


def arrive(name: Any, threads: int) -> None:
    _named_barrier("arrive", name, threads)


def sync(name: Any, threads: int) -> None:
    _named_barrier("sync", name, threads)


def opaque(x: jax.Array) -> jax.Array:
    """The same number, of which the compiler knows nothing: what is computed from it is
    computed here, and takes no registers before."""
    return lax.optimization_barrier(x)


def fence() -> None:
    """Before a barrier: what was written into shared memory is then seen by the matrix
    units and the copy engine."""

    @plgpu.inline_mgpu()
    def of_proxies(_):
        kind, space = nvvm.ProxyKind.async_shared, nvvm.SharedSpace.shared_cta
        nvvm.fence_proxy(kind, space=space)

    of_proxies()


def counted(counter: Any) -> jax.Array:
    """A number in global memory, to which others `count`.

    Neither of these orders other reads and writes, which would be slow. They order what the
    copy engine writes and adds to global memory: all of it happens in the second-level
    cache, and is complete when it has been waited for.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )
    def load(_, ref):
        kind, pointer = integer(32), utils.memref_ptr(ref)
        code = "ld.relaxed.gpu.global.s32 $0, [$1];"
        found: Any = llvm.inline_asm(kind, [pointer], code, "=r,l", has_side_effects=True)
        return FragmentedArray.splat(found, (), is_signed=True)

    return load(counter)


def await_count(counter: Any, value: Any) -> None:
    """Waits until a number in global memory is at least `value`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
    def wait(_, ref, value):
        code = """{
            .reg .pred early;
            .reg .s32 found;
            AGAIN:
            ld.relaxed.gpu.global.s32 found, [$0];
            setp.lt.s32 early, found, $1;
            @early bra AGAIN;
        }"""
        operands = [utils.memref_ptr(ref), value.registers[()]]
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, operands, code, "l,r", has_side_effects=True)

    wait(counter, jnp.asarray(value, jnp.int32))


def count(counter: Any) -> None:
    """Adds one to a number in global memory, if one warp does it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(_, ref):
        semaphore = utils.SemaphoreRef(utils.memref_ptr(ref))
        one = utils.single_thread_predicate(utils.ThreadSubset.WARP)
        semaphore.signal(1, one, relaxed=True, memory_scope="gpu")

    signal(counter)


def read_word(numbers: Any, n: Any) -> jax.Array:
    """One of several numbers of 32 bits in shared memory."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )
    def read(_, numbers, n):
        code = "{ .reg .b32 at; mad.lo.u32 at, $2, 4, $1; ld.shared.u32 $0, [at]; }"
        operands = [utils.memref_ptr(numbers), n.registers[()]]
        found: Any = llvm.inline_asm(
            integer(32), operands, code, "=r,r,r", has_side_effects=True
        )
        return FragmentedArray.splat(found, (), is_signed=True)

    return read(numbers, n)


def write_word(numbers: Any, n: Any, value: Any) -> None:
    """Of those that are read so: by every thread."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def write(_, numbers, n, value):
        code = "{ .reg .b32 to; mad.lo.u32 to, $1, 4, $0; st.shared.u32 [to], $2; }"
        operands = [utils.memref_ptr(numbers), *(x.registers[()] for x in (n, value))]
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, operands, code, "r,r,r", has_side_effects=True)

    write(numbers, n, value)


def all_finite(
    x: Any, name: int | None, swizzle: int | None = None, warpgroups: int = 1
) -> jax.Array:
    """Whether all numbers are finite of an array in shared memory that the matrix units
    read, in 16 bits; or of those of so many warpgroups, of which each asks of its own.
    `name` is that of a barrier, or `None` if one warp asks; `swizzle` is as for `smem`."""
    i32, threads = jnp.int32, 32 if name is None else THREADS
    vectors = x.shape[0] * x.shape[1] * x.dtype.itemsize // (_VECTOR * threads)
    at_once = largest_divisor(vectors, 16)
    number_type = "bf16x2" if x.dtype == jnp.bfloat16 else "f16x2"
    # 0 times what is not finite is NaN, also when added up.
    one = "ld.shared.v4.b32 {{w, x, y, z}}, [at+{}]; " + "".join(
        f"fma.rn.{number_type} {total}, {number}, o, {total}; "
        for number, total in zip("wxyz", "abab", strict=True)
    )
    step = _VECTOR * threads
    any_bad = (
        "vote.sync.any.pred bad, bad, 0xffffffff;"
        if name is None
        else f"bar.red.or.pred bad, {name}, {warpgroups * THREADS}, bad;"
    )

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_tiled(x.shape, x.dtype, swizzle)),),
        return_type=plgpu.ShapeDtypeStruct((), i32, layout=SCALAR),
    )
    def look(_, ref):
        code = (
            "{ .reg .pred bad; .reg .b32 at, end, a, b, o, w, x, y, z; "
            f"mov.u32 at, %tid.x; and.b32 at, at, {threads - 1}; "
            f"mad.lo.u32 at, at, {_VECTOR}, $1; mov.b32 a, 0; mov.b32 b, 0; mov.b32 o, 0; "
            f"add.u32 end, at, {vectors * step}; AGAIN: "
            + "".join(one.format(n * step) for n in range(at_once))
            + f"add.u32 at, at, {at_once * step}; setp.ne.u32 bad, at, end; "
            "@bad bra AGAIN; or.b32 a, a, b; setp.ne.b32 bad, a, 0; "
            f"{any_bad} selp.s32 $0, 0, 1, bad; }}"
        )
        kind, pointer = integer(32), utils.memref_ptr(ref)
        found: Any = llvm.inline_asm(kind, [pointer], code, "=r,r", has_side_effects=True)
        return FragmentedArray.splat(found, (), is_signed=True)

    return look(x) != 0


def zero_hidden(x: Any, numbers: Any, swizzle: int | None = None) -> None:
    """In one warp: makes zeros of the rows of `x`, as of `all_finite`, whose numbers, in
    shared memory too, are -inf."""
    (rows, columns), size = x.shape, swizzle or 128
    tiles = columns * 2 // size

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_tiled(x.shape, x.dtype, size)), plgpu.RefType())
    )
    def write(_, ref, numbers):
        # Swizzling moves 16 bytes at a time within a row of a tile.
        zeros = "".join(
            f"st.shared.v4.b32 [to+{tile * 8 * size + n}], {{z, z, z, z}}; "
            for tile in range(tiles)
            for n in range(0, size, 16)
        )
        each = "".join(
            f"add.u32 row, lane, {first}; mad.lo.u32 at, row, 4, $1; "
            "ld.shared.f32 x, [at]; setp.neu.f32 seen, x, 0fFF800000; "
            f"@seen bra SEEN{first}; and.b32 to, row, 7; shr.u32 row, row, 3; "
            f"mad.lo.u32 to, to, {size}, $0; mad.lo.u32 to, row, {tiles * 8 * size}, to; "
            f"{zeros} SEEN{first}: "
            for first in range(0, rows, 32)
        )
        code = (
            "{ .reg .pred seen; .reg .b32 lane, row, at, to, z; .reg .f32 x; "
            f"mov.u32 lane, %laneid; mov.b32 z, 0; {each} bar.warp.sync 0xffffffff; }}"
        )
        void = ir.Type.parse("!llvm.void")
        pointers = [utils.memref_ptr(x) for x in (ref, numbers)]
        llvm.inline_asm(void, pointers, code, "r,r", has_side_effects=True)

    write(x, numbers)


def fill(source: Any, to: Any, again: Any, ready: Any, free: Any) -> None:
    """Copies into shared memory, of which what it held has to have been read, if it held
    anything (`again`)."""

    @pl.when(again)
    def _():
        plgpu.barrier_wait(free)

    plgpu.copy_gmem_to_smem(source, to, ready)


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """One number a row (`axis` 0) or column (1), on a whole tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def whole_rows(x: jax.Array) -> jax.Array:
    """Pads the tokens of `(batch, len, heads, dim)` to a multiple of 8: what the copy
    engine needs. Beyond that, it reads zeros, and writes nothing."""
    if x.shape[1] % 8 == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))


def launch(kernel: Any, name: str, blocks: int, warpgroups: int, **types: Any) -> Any:
    """The kernel as a function of arrays: so many blocks of threads, in each of which so
    many warpgroups compute and one copies. `types` are those of outputs and of scratch."""
    return plgpu.kernel(
        kernel,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name=f"eqx_attention_{name}",
        **types,
    )
