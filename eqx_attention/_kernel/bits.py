"""Booleans of a tile as bits: a thread keeps those of its pairs in one or two registers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from .._axes import ceil_div
from .assembly import i32, SCALAR, THREADS
from .hopper import TILE


_BITS = 32


def packed(flags: jax.Array) -> tuple[jax.Array, ...]:
    """The booleans of a tile, as words that are each thread's own. They are computed here,
    and not where they are used."""
    words = ceil_div(flags.size, THREADS * _BITS)
    word = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(word,) * words)
    def pack(_, flags):
        out: list[Any] = [i32(0)] * words
        n = 0
        for register in flags.registers.flat:
            (size,) = ir.VectorType(register.type).shape
            for m in range(size):
                flag = vector.extract(register, dynamic_position=[], static_position=[m])
                bit = arith.select(flag, i32(1 << n % _BITS), i32(0))
                out[n // _BITS] = arith.ori(out[n // _BITS], bit)
                n += 1
        here: list[Any] = [
            llvm.inline_asm(x.type, [x], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
            for x in out
        ]
        return tuple(FragmentedArray.splat(x, (), is_signed=True) for x in here)

    return pack(flags)


def where(words: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> jax.Array:
    """`x` where a tile's booleans are true, else `y`."""

    @plgpu.inline_mgpu(
        arg_types=((SCALAR,) * len(words), TILE, TILE),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=TILE),
    )
    def choose(_, words, x, y):
        def bit(n):
            mask = i32(1 << n % _BITS)
            found = arith.andi(words[n // _BITS].registers[()], mask)
            return arith.cmpi(arith.CmpIPredicate.ne, found, i32(0))

        n, out = 0, np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            kind = ir.VectorType(register.type)
            chosen: list[Any] = []
            for m in range(kind.shape[0]):
                one, other = (
                    vector.extract(z, dynamic_position=[], static_position=[m])
                    for z in (register, y.registers[at])
                )
                chosen.append(arith.select(bit(n), one, other))
                n += 1
            out[at] = vector.from_elements(kind, chosen)
        return FragmentedArray(_registers=out, _layout=x.layout, _is_signed=None)

    return choose(words, x, plgpu.layout_cast(y, TILE))
