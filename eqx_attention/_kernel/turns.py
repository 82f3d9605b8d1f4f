"""Which pieces of work each block of threads of a kernel does, one after another."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from .._device import num_multiprocessors
from .assembly import SCALAR
from .hopper import read_word


class Turns(NamedTuple):
    """So many `pieces` for so many `programs` (blocks of threads).

    Either each of these takes the next piece when it is free to, from a number in global
    memory: what takes longer than was thought, or begins later, as another kernel has the
    multiprocessor, then does less. Or there is one piece for each.

    The warp that copies takes pieces, and tells the others. They are taken in the order of
    their numbers, or in the `order` that there is.
    """

    pieces: int
    programs: int
    taken: bool = False
    order: jax.Array | None = None

    @staticmethod
    def of(pieces: int, order: Callable[[], jax.Array | None] = lambda: None) -> "Turns":
        """One block of threads a multiprocessor."""
        programs = num_multiprocessors()
        if pieces <= programs:
            return Turns(pieces, pieces)
        return Turns(pieces, programs, True, order())

    @property
    def arrays(self) -> list[Any]:
        """What a kernel is given: how many pieces were taken, and their order."""
        if not self.taken:
            return []
        order = [] if self.order is None else [self.order]
        return [jax.new_ref(jnp.zeros(1, jnp.int32)), *order]

    def scratch(self, readers: int) -> list[Any]:
        """Of a kernel in which so many warpgroups or warps are told: when the numbers of
        two pieces are there, and when they have been read."""
        if not self.taken:
            return []
        return [
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2, num_arrivals=readers),
        ]

    def take(self, refs: Sequence[Any], numbers: Any, n: Any, before: Any) -> jax.Array:
        """In the warp that copies: its n-th piece, of `pieces` or more if there is none.
        `refs` are those of `arrays` and of `scratch`, `before` is the one before it, and
        `numbers` are two of 32 bits in shared memory."""
        if not self.taken:
            return before + self.programs
        *arrays, ready, free = refs
        slot = lax.rem(n, 2)

        @pl.when(n >= 2)
        def _():
            plgpu.barrier_wait(free.at[slot])

        _take(arrays, numbers, slot, self.pieces)
        plgpu.barrier_arrive(ready.at[slot])
        return read_word(numbers, slot)

    def told(self, refs: Sequence[Any], numbers: Any, n: Any, before: Any) -> jax.Array:
        """In others: the n-th piece."""
        if not self.taken:
            return before + self.programs
        *_, ready, free = refs
        slot = lax.rem(n, 2)
        plgpu.barrier_wait(ready.at[slot])
        piece = read_word(numbers, slot)
        plgpu.barrier_arrive(free.at[slot])
        return piece

    def before_first(self) -> jax.Array:
        return lax.axis_index("block") - self.programs

    def left(self, piece: jax.Array) -> jax.Array:
        return piece < self.pieces


def _take(arrays: Sequence[Any], numbers: Any, slot: Any, pieces: int) -> None:
    """Adds one to a number in global memory, the first of `arrays`, and writes what it was
    to shared memory; or, if there is another array, what that one has there."""
    counter, *order = arrays
    look_up = f"""
            setp.lt.and.u32 there, n, {pieces}, $3;
            mad.wide.u32 from, n, 4, $4;
            @there ld.global.nc.u32 n, [from];"""

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            plgpu.RefType(),
            SCALAR,
            *[plgpu.RefType()] * len(order),
        )
    )
    def take(_, counter, numbers, slot, *order):
        one = utils.single_thread_predicate(utils.ThreadSubset.WARP)
        code = f"""{{
            .reg .b32 n, to;
            .reg .b64 from;
            .reg .pred there;
            @$3 atom.relaxed.gpu.global.add.u32 n, [$0], 1;{look_up if order else ""}
            mad.lo.u32 to, $2, 4, $1;
            @$3 st.shared.u32 [to], n;
            bar.warp.sync 0xffffffff;
        }}"""
        counter, numbers, *order = map(utils.memref_ptr, (counter, numbers, *order))
        operands = [counter, numbers, slot.registers[()], one, *order]
        kinds = ",".join(["l,r,r,b", *("l" for _ in order)])
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, operands, code, kinds, has_side_effects=True)

    take(counter, numbers, slot, *order)
