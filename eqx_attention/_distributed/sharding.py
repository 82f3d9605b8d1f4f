"""Which mesh axes split the batch, the heads and the tokens of a call."""

import math
from typing import Any

import equinox as eqx
import jax
from beartype import beartype as typechecker
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import Array, jaxtyped

from .._static import pdoc


Axes = str | tuple[str, ...] | list[str] | None


class Sharding(eqx.Module):
    """Which axes of a mesh of devices split the batch, the heads and the tokens of a call.

    ```python
    mesh = jax.make_mesh((2, 4), ("dp", "sp"))
    sharding = eqa.Sharding(batch="dp", sequence="sp")
    out = eqa.attend(query, key_, value, sharding=sharding, mesh=mesh)
    ```

    The call becomes an explicit `jax.shard_map`. Each array of a mask or of a score is
    split as its own axes say; `Dense` and `Bias` by their queries alone, unless the keys
    alone are split. Lengths need not divide.

    Inside of your own `jax.shard_map` over these axes, arrays are what one device holds:
    no other `shard_map` is made, and indices count from where the device's part starts.
    """

    batch: tuple[str, ...] = eqx.field(static=True)
    heads: tuple[str, ...] = eqx.field(static=True)
    query_sequence: tuple[str, ...] = eqx.field(static=True)
    key_sequence: tuple[str, ...] = eqx.field(static=True)

    @jaxtyped(typechecker=typechecker)
    def __init__(
        self,
        batch: Axes = None,
        heads: Axes = None,
        sequence: Axes = None,
        query_sequence: Axes = None,
        key_sequence: Axes = None,
    ):
        """**Arguments:**

        Each is the name of a mesh axis, or several names in order, or `None`, which does
        not split. The default of each is `None`.

        - `batch`: splits the batch axes, of which there must be one. With several, it is
            their product that is split.
        - `heads`: splits the heads. It must divide those of the queries and of the keys.
        - `sequence`: splits the queries and the keys alike. They then attend to each
            other by [`eqx_attention.Ulysses`][], [`eqx_attention.AllGather`][] or another
            mechanism that communicates.
        - `query_sequence`: splits the queries alone: each device has all keys.
        - `key_sequence`: splits the keys alone, as for a cache that is larger than one
            device: each device attends to its part, and the results are merged.

        `query_sequence` and `key_sequence` may be given together: the same for both is
        `sequence`; otherwise they have no axis in common.

        **Raises:** `ValueError` if no axis is named, or one twice, or if `sequence` is
            given together with `query_sequence` or `key_sequence`.
        """
        if sequence is not None and not (query_sequence is None and key_sequence is None):
            raise ValueError(
                "Sharding: expected either sequence, or query_sequence and key_sequence; "
                f"got sequence={sequence!r}, query_sequence={query_sequence!r} and "
                f"key_sequence={key_sequence!r}."
            )
        self.batch = _names(batch)
        self.heads = _names(heads)
        self.query_sequence = _names(query_sequence if sequence is None else sequence)
        self.key_sequence = _names(key_sequence if sequence is None else sequence)
        self.__check_init__()

    def __check_init__(self):
        query, key = self.query_sequence, self.key_sequence
        if not self.axes:
            raise ValueError("Sharding: expected at least one mesh axis, got none.")
        common = () if query == key else key
        names = (*self.batch, *self.heads, *query, *common)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                "Sharding: expected each mesh axis once (but in query_sequence and "
                f"key_sequence, if these are equal); got {', '.join(map(repr, twice))} "
                f"more than once, in batch={self.batch}, heads={self.heads}, "
                f"query_sequence={query} and key_sequence={key}."
            )

    @property
    def axes(self) -> frozenset[str]:
        """All axes that are named."""
        sequence = (*self.query_sequence, *self.key_sequence)
        return frozenset((*self.batch, *self.heads, *sequence))

    @property
    def common(self) -> tuple[str, ...]:
        """The axes that split the queries and the keys alike."""
        return self.key_sequence if self.key_sequence == self.query_sequence else ()

    @property
    def merged(self) -> tuple[str, ...]:
        """The axes that split the keys alone, over which results are merged."""
        return () if self.common else self.key_sequence

    __pdoc__ = pdoc


class Shards(eqx.Module):
    """A sharding on its mesh. `inside` says whether arrays are what one device holds."""

    sharding: Sharding = eqx.field(static=True)
    mesh: Any = eqx.field(static=True)
    inside: bool = eqx.field(static=True)

    def size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in axes)

    def sized(self, axes: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
        """The axes with their sizes, as `Split` has them."""
        return tuple((name, self.mesh.shape[name]) for name in axes)

    def start(self, axes: tuple[str, ...], length: int) -> Array | int:
        """Where this device's part starts, inside of a `jax.shard_map`, if each device has
        so many."""
        return lax.axis_index(axes) * length if self.size(axes) > 1 else 0

    @property
    def explicit(self) -> frozenset[str]:
        """Those axes of the mesh of which the type of an array says how they split it."""
        types = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return frozenset(name for name, kind in types if kind == AxisType.Explicit)


def as_sharding(sharding: Any) -> Sharding | None:
    if sharding is None or isinstance(sharding, Sharding):
        return sharding
    raise TypeError(
        f"sharding: expected an eqx_attention.Sharding or None, got {sharding!r}."
    )


def check_mesh(sharding: Sharding | None, mesh: Any) -> None:
    """That a mesh which is given has the axes of a sharding which is given."""
    if mesh is None:
        return
    if not isinstance(mesh, Mesh | AbstractMesh):
        got = type(mesh).__name__
        raise TypeError(f"mesh: expected a jax.sharding.Mesh or None, got {got}.")
    if sharding is None:
        raise ValueError(
            "mesh: expected None, as there is no sharding to say what its axes split; got "
            f"a mesh of axes {mesh.axis_names}."
        )
    unknown = sorted(sharding.axes - set(mesh.axis_names))
    if unknown:
        raise ValueError(
            f"sharding: expected axes of the mesh, which are {mesh.axis_names}; got "
            f"{', '.join(map(repr, unknown))}."
        )


def shards_of(sharding: Sharding | None, mesh: Any) -> Shards | None:
    """A sharding on the mesh that is given, or else on the ambient one."""
    check_mesh(sharding, mesh)
    if sharding is None:
        return None
    ambient = jax.sharding.get_abstract_mesh()
    manual = sharding.axes & set(ambient.manual_axes)
    if manual:
        if manual != sharding.axes:
            raise ValueError(
                "sharding: inside of a jax.shard_map, expected all of its axes to be axes "
                f"of that, or none; got {sorted(manual)}, which are, and "
                f"{sorted(sharding.axes - manual)}, which are not."
            )
        return Shards(sharding, ambient, True)
    if mesh is None and ambient.empty:
        raise ValueError(
            "mesh: expected a mesh, as there is a sharding: give `mesh=`, or set one by "
            "`jax.set_mesh`; got None."
        )
    if not ambient.empty:
        check_mesh(sharding, ambient)
        if mesh is not None:
            _check_same(sharding, mesh, ambient)
        mesh = ambient  # which lacks those axes that are spoken for, as by `jax.vmap`
    return Shards(sharding, mesh, False)


def _check_same(sharding: Sharding, mesh: Any, ambient: AbstractMesh) -> None:
    sizes = [{name: m.shape[name] for name in sharding.axes} for m in (mesh, ambient)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "mesh: expected the ambient mesh, as set by `jax.set_mesh`, or none; got "
            f"{sizes[0]}, and the ambient one has {sizes[1]}."
        )


def _names(axes: Axes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
