"""Where something runs: on one device, or on a mesh of several."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

from .._distributed import check_mesh, Sharding


AXIS_NAMES = ("dp", "fsdp", "tp", "sp")
# What each axis splits, by its name.
_ROLES = {"dp": "batch", "fsdp": "batch", "tp": "heads", "sp": "sequence"}
STRATEGIES = ("ring", "ulysses", "all_gather")


class Place(NamedTuple):
    """`name` is that of its rows: the axes of more than one device; none for no mesh."""

    name: str
    devices: tuple[Any, ...]
    mesh: Mesh | None = None
    sharding: Sharding | None = None

    @property
    def splits_tokens(self) -> bool:
        """Whether a mechanism has to communicate."""
        if self.mesh is None or self.sharding is None:
            return False
        return math.prod(self.mesh.shape[x] for x in self.sharding.key_sequence) > 1

    @property
    def least_batch(self) -> int:
        """The least batch size that its devices can split."""
        return 1 if self.sharding is None else self._size(self.sharding.batch)

    @property
    def units(self) -> int:
        """Of how many devices operations are counted: those of a CPU share its cores."""
        return 1 if self.devices[0].platform == "cpu" else len(self.devices)

    def put(self, x: Any) -> jax.Array:
        """An array `"batch length heads head_dim"`, where its parts belong: an axis that
        its devices do not divide is not split."""
        if self.mesh is None or self.sharding is None:
            return jax.device_put(x, SingleDeviceSharding(self.devices[0]))
        given = (self.sharding.batch, self.sharding.query_sequence, self.sharding.heads)
        spec = [
            names if names and size % self._size(names) == 0 else None
            for names, size in zip(given, x.shape[:3], strict=True)
        ]
        return jax.device_put(x, NamedSharding(self.mesh, P(*spec)))

    def _size(self, names: tuple[str, ...]) -> int:
        assert self.mesh is not None
        return math.prod(self.mesh.shape[name] for name in names)


def places(
    axis_dims: Sequence[int] | Sequence[Sequence[int]] | None,
    axis_names: Sequence[str],
    mesh: Any,
    sharding: Sharding | None,
) -> tuple[Place, ...]:
    """Each mesh that is asked for; one device, if none is."""
    if axis_dims is not None and mesh is not None:
        raise ValueError("mesh: expected None, as axis_dims are given; got both.")
    if mesh is not None:
        several = isinstance(mesh, list | tuple)
        made = [_mesh_of(x) for x in (mesh if several else [mesh])]
    elif axis_dims is not None:
        several = bool(axis_dims) and not isinstance(axis_dims[0], int)
        each = axis_dims if several else [axis_dims]
        made = [_mesh(tuple(dims), tuple(axis_names)) for dims in each]  # pyright: ignore
    else:
        if sharding is not None:
            raise ValueError(
                "sharding: expected None, as there is no mesh (`axis_dims` or `mesh`); got "
                f"{sharding}."
            )
        return (Place("", (jax.devices()[0],)),)
    if not made:
        raise ValueError("axis_dims or mesh: expected at least one mesh, got none.")
    found = tuple(_place(x, sharding) for x in made)
    names = [place.name for place in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"axis_dims or mesh: expected each mesh once, got {', '.join(twice)} again "
            "(axes of one device do not count)."
        )
    return found


def parse_mesh(text: str) -> dict[str, int]:
    """`"dp=2,sp=4"`."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (x.strip() for x in part.partition("="))
        digits = size.removeprefix("-")
        if not name or not digits.isdecimal() or name in found:
            raise ValueError(f"mesh: expected 'dp=2,sp=4' or the like, got {text!r}.")
        found[name] = int(size)
    return found


def _mesh_of(mesh: Any) -> Mesh:
    if isinstance(mesh, Mesh):
        return mesh
    sizes = parse_mesh(mesh) if isinstance(mesh, str) else mesh
    if not isinstance(sizes, Mapping) or not sizes:
        raise TypeError(
            "mesh: expected 'dp=2,sp=4', a dictionary of sizes, a jax.sharding.Mesh, or a "
            f"list of these; got {mesh!r}."
        )
    return _mesh(tuple(sizes.values()), tuple(sizes))


def _mesh(dims: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    """One size may be -1: it is as large as the devices allow."""
    devices = jax.devices()
    if len(dims) != len(names):
        raise ValueError(
            "axis_dims: expected as many sizes as there are axis_names, which are "
            f"{names}; got {dims}."
        )
    if any(x < 1 and x != -1 for x in dims) or dims.count(-1) > 1:
        raise ValueError(
            f"axis_dims: expected positive sizes, of which one may be -1; got {dims}."
        )
    given = math.prod(x for x in dims if x != -1)
    if -1 in dims and len(devices) % given == 0:
        dims = tuple(len(devices) // given if x == -1 else x for x in dims)
    count = math.prod(dims)
    if -1 in dims or count > len(devices):
        more = ""
        if devices[0].platform == "cpu":
            more = (
                " A CPU is several where the environment variable XLA_FLAGS has "
                f"--xla_force_host_platform_device_count={abs(count)}."
            )
        relation = "divides" if -1 in dims else "is at most"
        raise ValueError(
            f"axis_dims: expected sizes whose product {relation} the number of devices, "
            f"which is {len(devices)}; got {dict(zip(names, dims, strict=True))}.{more}"
        )
    return Mesh(np.asarray(devices[:count]).reshape(dims), names)


def _place(mesh: Mesh, sharding: Sharding | None) -> Place:
    if sharding is None:
        sharding = _sharding(mesh.axis_names)
    check_mesh(sharding, mesh)
    parts = [f"{name}={size}" for name, size in mesh.shape.items() if size > 1]
    name = ",".join(parts) or f"{mesh.axis_names[0]}=1"
    return Place(name, tuple(mesh.devices.flat), mesh, sharding)


def _sharding(names: tuple[str, ...]) -> Sharding:
    unknown = [name for name in names if name not in _ROLES]
    if unknown:
        raise ValueError(
            f"axis_names: expected some of {', '.join(_ROLES)}, which split the batch, the "
            "batch, the heads and the sequence; or a sharding that says what others split; "
            f"got {', '.join(map(repr, unknown))}."
        )
    roles: dict[str, list[str]] = {}
    for name in names:
        roles.setdefault(_ROLES[name], []).append(name)
    return Sharding(**roles)  # pyright: ignore[reportArgumentType]
