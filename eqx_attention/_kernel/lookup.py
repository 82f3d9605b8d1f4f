"""Looking up in a table by what a kernel computes of a pair: `jax.lax.gather` of pairs.

The table belongs to a head, or to all; it is computed outside. In the kernel it stays in
global memory, and so in the first-level cache: each thread reads the entries of its pairs.
A table may be of any length, but neighbouring pairs had better read neighbouring entries.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.lax import GatherScatterMode as Mode
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array

from .hopper import TILE


class NotElementwise(Exception):
    """What a function does to pairs that a kernel cannot."""


class Lookup(NamedTuple):
    """A gather of one entry for each pair: for each of its indices, how many there are and
    how far apart their entries, in a table of one axis; and what is beyond the table (if
    `None`, its last entry on that side)."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    fill: Any

    @staticmethod
    def of(eqn: Any) -> "Lookup":
        """**Raises:** `NotElementwise` if it gathers what a kernel cannot."""
        table, index = (v.aval for v in eqn.invars)
        params = eqn.params
        axes = params["dimension_numbers"].start_index_map
        mode, fill = params["mode"], params["fill_value"]
        if any(n != 1 for n in params["slice_sizes"]) or index.size != len(axes):
            raise NotElementwise("gather of several elements a pair")
        if mode not in (Mode.CLIP, Mode.PROMISE_IN_BOUNDS, Mode.FILL_OR_DROP):
            raise NotElementwise(f"gather of pairs in mode {mode}")
        if stored(table.dtype) is None:
            raise NotElementwise(f"gather of pairs from a table of {table.dtype}")
        if table.size >= 2**31:
            raise NotElementwise(f"gather of pairs from a table of {table.size} entries")
        return Lookup(
            tuple(table.shape[n] for n in axes),
            tuple(math.prod(table.shape[n + 1 :]) for n in axes),
            fill if mode == Mode.FILL_OR_DROP else None,
        )

    def __call__(
        self, ref: Any, indices: list[Array], dtype: Any, layout: Any = TILE
    ) -> Array:
        """**Arguments:**

        - `ref`: the table, of one axis, in the dtype in which it is `stored`.
        - `indices`: each on the whole tile, in `layout`. Whatever they are, nothing but the
            table is read.
        """
        place, there = jnp.zeros_like(indices[0], jnp.int32), True
        for x, size, stride in zip(indices, self.sizes, self.strides, strict=True):
            x = x.astype(jnp.int32) if x.dtype.itemsize < 4 else x
            place = place + jnp.clip(x, 0, size - 1).astype(jnp.int32) * stride
            there = there & ((x >= 0) & (x < size))
        out = read(ref, place, layout)
        out = out != 0 if dtype == jnp.bool_ else out.astype(dtype)
        fill = self.fill
        return out if fill is None else jnp.where(there, out, jnp.full_like(out, fill))


def stored(dtype: Any) -> Any:
    """In what the kernel reads a table: all entries are of 32 bits. `None` if it cannot."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.float32 if jnp.finfo(dtype).bits <= 32 else None
    whole = dtype == jnp.bool_ or (
        jnp.issubdtype(dtype, jnp.integer) and np.can_cast(dtype, jnp.int32)
    )
    return jnp.int32 if whole else None


def read(ref: Any, index: Array, layout: Any = TILE) -> Array:
    """The entries `index` of a table of one axis in global memory, which nothing writes."""
    floating = ref.dtype == jnp.float32

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout),
        return_type=plgpu.ShapeDtypeStruct(index.shape, ref.dtype, layout=layout),
    )
    def gather(_, table, index):
        i64, entry = ir.IntegerType.get_signless(64), ir.MemRefType(table.type).element_type
        start = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(table))
        width = arith.constant(i64, 4)
        code, constraints = "ld.global.nc.b32 $0, [$1];", "=f,l" if floating else "=r,l"

        def one(at):
            at = arith.addi(start, arith.muli(arith.extui(i64, at), width))
            return llvm.inline_asm(entry, [at], code, constraints)

        def each(register):
            (size,) = ir.VectorType(register.type).shape
            entries: list[Any] = [
                one(vector.extract(register, dynamic_position=[], static_position=[n]))
                for n in range(size)
            ]
            return vector.from_elements(ir.VectorType.get((size,), entry), entries)

        return mgpu.FragmentedArray(
            _registers=np.vectorize(each, otypes=[object])(index.registers),
            _layout=index.layout,
            _is_signed=None if floating else True,
        )

    return gather(ref, index)
