"""What is measured, compiled: our mechanisms."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from .._attention import Attention
from .._distributed import AllGather, MECHANISMS, Ring, Ulysses
from .._mechanism import AbstractMechanism, Blockwise
from .memory import planned_bytes
from .settings import Case


class Program(NamedTuple):
    """A compiled call.

    - `call`: what is timed, and `wait` waits for what it returns.
    - `results`: the same of another cotangent, if it takes one: the output, and after it
        the gradients of query, keys and values if it computes them.
    - `needs`: bytes of each device, if that is known.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    results: Callable[[], list[np.ndarray]]
    needs: int | None


class Operands(NamedTuple):
    """`query, key_, value, dout`, where they belong, and another cotangent, which is zero
    but for the part of the results that is compared."""

    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    dout_of_part: jax.Array


class Candidate(NamedTuple):
    """`program(which)` compiles a pass, "forward" or "both"; `explain` says in a line how
    it will be computed."""

    name: str
    program: Callable[[str], Program]
    explain: Callable[[], str]


def of_jax(
    attend: Callable[..., Any], operands: Operands, which: str, *more: Any
) -> Program:
    """A program of jax, of `attend(query, key_, value, *more)`."""

    def both(q, k, v, *more_and_dout):
        *more, dout = more_and_dout
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *more), q, k, v)
        return out, *pull(dout)

    q, k, v, dout = operands.arrays
    forward = which == "forward"
    arguments = (q, k, v, *more) if forward else (q, k, v, *more, dout)
    other = (q, k, v, *more) if forward else (q, k, v, *more, operands.dout_of_part)
    compiled = jax.jit(attend if forward else both).lower(*arguments).compile()

    def results() -> list[np.ndarray]:
        found = compiled(*other)
        return [np.asarray(x) for x in ([found] if forward else found)]

    call = ft.partial(compiled, *arguments)
    return Program(call, jax.block_until_ready, results, planned_bytes(compiled))


def mechanism_of(name: str, chunk_size: int | None) -> AbstractMechanism:
    """`chunk_size` is that of `Blockwise`, alone or within a strategy."""
    if chunk_size is None:
        return MECHANISMS[name]()
    blockwise = Blockwise(chunk_size, chunk_size)
    match name:
        case "blockwise":
            return blockwise
        case "ring":
            return Ring(blockwise)
        case "ulysses":
            return Ulysses(blockwise)
        case "all_gather":
            return AllGather(blockwise)
    return MECHANISMS[name]()


def of_mechanism(name: str, case: Case, operands: Operands) -> Candidate:
    attention = Attention(
        mechanism=mechanism_of(name, case.settings.chunk_size),
        mask=case.mask,
        sharding=case.place.sharding,
        mesh=case.place.mesh,
    )

    arrays, static = eqx.partition(attention, eqx.is_array)

    def attend(q, k, v, arrays):
        return eqx.combine(arrays, static)(q, k, v)

    def program(which: str) -> Program:
        return of_jax(attend, operands, which, arrays)

    def explain() -> str:
        found = []

        def look(q, k, v):
            found.append(attention.explain(q, k, v))
            return ()

        jax.eval_shape(look, *operands.arrays[:3])
        return found[0].splitlines()[0]

    return Candidate(name, program, explain)
