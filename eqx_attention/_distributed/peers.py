"""Where devices can write into each other's memory, a kernel exchanges heads for tokens."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import ad, mlir
from jax.sharding import Mesh
from jaxtyping import Array

from .._device import hopper_unsupported
from .._mechanism import Request
from .._mechanism.varying import like


_DTYPES = ("bfloat16", "float16", "float32")
_MOST_DEVICES = 8  # of a process, of which XLA knows each other's memory


def peers_unsupported(request: Request) -> tuple[str, ...]:
    """Why the devices along the last axis of a request's split use a collective; none if
    they use the kernel, unless `mesh_unsupported`."""
    name, n = request.split.key[-1]
    reasons = [f"it needs several devices along {name!r}"] if n == 1 else []
    reasons += hopper_unsupported(request.platform)
    if (processes := jax.process_count()) > 1:
        reasons.append(f"it needs devices of one process, not of {processes}")
    if request.query.dtype.name not in _DTYPES:
        reasons.append(f"it moves {', '.join(_DTYPES)}, not {request.query.dtype.name}")
    if not reasons:
        from .._kernel.peer_exchange import FEWEST

        if (length := min(request.lengths)) < FEWEST:
            reasons.append(f"it needs {FEWEST} tokens a device, not {length}")
    return tuple(reasons)


def mesh_unsupported(mesh: Any, manual: frozenset[str]) -> tuple[str, ...]:
    """Why the devices of a mesh do not know each other's memory, if they do not.

    **Arguments:**

    - `mesh`: of which all devices take part. If it is abstract, its devices are expected
        to be in order.
    - `manual`: those of its axes over which there is a `jax.shard_map`.
    """
    reasons = []
    auto = [name for name in mesh.axis_names if name not in manual]
    if auto:
        reasons.append(f"it needs a jax.shard_map over {auto} too")
    if mesh.size > _MOST_DEVICES:
        reasons.append(f"it needs at most {_MOST_DEVICES} devices, not {mesh.size}")
    if isinstance(mesh, Mesh):
        found = [device.id for device in mesh.devices.flat]
        if found != list(range(mesh.size)):
            last = mesh.size - 1
            reasons.append(f"it needs the devices from 0 to {last} in order, not {found}")
    return tuple(reasons)


def explained(request: Request) -> str:
    """Which exchange it is, and why."""
    reasons = peers_unsupported(request)
    mesh = jax.sharding.get_abstract_mesh()
    reasons += mesh_unsupported(mesh, frozenset(mesh.manual_axes))
    if reasons:
        because = " and ".join(reasons)
        return f"heads exchanged by a collective, not by our kernel ({because})"
    last = mesh.size - 1
    return f"heads exchanged by our kernel, if the mesh has devices 0 to {last} in order"


def to_heads(arrays: Sequence[Array], axis: str, n: int, kernel: bool) -> list[Array]:
    """Of arrays `"batch len heads channels"`, each with a device's tokens of all heads: all
    tokens of a device's heads.

    If `kernel`, all of them in one, unless it turns out that the mesh is not for it. It is
    linear, and differentiable.
    """
    return _swapped(arrays, axis, n, True) if kernel else _to_heads(arrays, axis, n)


def to_tokens(arrays: Sequence[Array], axis: str, n: int, kernel: bool) -> list[Array]:
    """The inverse of `to_heads`."""
    return _swapped(arrays, axis, n, False) if kernel else _to_tokens(arrays, axis)


def _to_heads(arrays: Sequence[Array], axis: str, n: int) -> list[Array]:
    """Those of equal lengths and channels in one collective."""
    out: list[Any] = [None] * len(arrays)
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        kinds.setdefault((x.dtype, x.shape[1], x.shape[-1]), []).append(i)
    for alike in kinds.values():
        parts = [arrays[i] for i in alike]
        parts = [x.reshape(*x.shape[:2], n, -1, x.shape[-1]) for x in parts]
        sizes = [x.shape[3] for x in parts]
        packed = jnp.concatenate(parts, axis=3)
        packed = lax.all_to_all(packed, axis, 2, 1, tiled=True)[:, :, 0]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        for i, start, size in zip(alike, starts, sizes, strict=True):
            out[i] = packed[:, :, start : start + size]
    return out


def _to_tokens(arrays: Sequence[Array], axis: str) -> list[Array]:
    return [lax.all_to_all(x, axis, 1, 2, tiled=True) for x in arrays]


def _swapped(arrays: Sequence[Array], axis: str, n: int, forth: bool) -> list[Array]:
    return _swapped_p.bind(*arrays, axis=axis, n=n, forth=forth)


def _portable(*arrays, axis, n, forth):
    return _to_heads(arrays, axis, n) if forth else _to_tokens(arrays, axis)


def _kernel(*arrays, axis, n, forth):
    from .._kernel.peer_exchange import exchange

    return exchange(arrays, axis, n, forth)


def _type(*arrays, axis, n, forth):
    def one(x):
        batch, length, heads, channels = x.shape
        length, heads = (length * n, heads // n) if forth else (length // n, heads * n)
        return like(x, (batch, length, heads, channels), x.dtype)

    return [one(x) for x in arrays]


def _transpose(cotangents, *_, axis, n, forth):
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    return _swapped(cotangents, axis, n, not forth)


def _lower(ctx, *arrays, axis, n, forth):
    over = ctx.module_context.axis_context
    able = not mesh_unsupported(over.mesh, over.manual_axes)
    able = able and isinstance(over.mesh, Mesh)
    avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    ctx = ctx.replace(avals_in=avals) if able else ctx
    run = mlir.lower_fun(_kernel if able else _portable, multiple_results=True)
    return run(ctx, *arrays, axis=axis, n=n, forth=forth)


_swapped_p = jax.extend.core.Primitive("eqx_attention_exchange")
_swapped_p.multiple_results = True
_swapped_p.def_impl(_portable)
_swapped_p.def_abstract_eval(_type)
ad.deflinear2(_swapped_p, _transpose)
mlir.register_lowering(_swapped_p, mlir.lower_fun(_portable, multiple_results=True))
mlir.register_lowering(_swapped_p, _lower, platform="cuda")
