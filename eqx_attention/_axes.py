"""Every array that describes (query, key) pairs declares its axes; one slicer serves all.

A field declares its axes in a string, such as `"batch query"`. The *canonical* form of
such an array has the axes `(batch, head, query, key, *rest)`, each of its full size or of
size one. Tiles, mapped batches and shards then are slices of the same form.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ._errors import ShapeError
from ._static import is_array


_T = TypeVar("_T")
_NAMES = ("head", "query", "key")


def axes(spec: str) -> Any:
    """Declares the axes of a module's field.

    **Arguments:**

    - `spec`: names separated by spaces, in the order of the array's axes: `batch`
        (any number of axes, first, broadcastable), `head`, `query`, `key`, and `rest` for
        an axis that belongs to no token. A name after `#` may also be of size one, and
        may be left out together with all names to its left. The empty string says that
        all axes are `rest`. If the field holds a pytree, then this speaks of each array
        in it.
    """
    return eqx.field(metadata={"axes": spec})


class Sizes(NamedTuple):
    """The sizes of one call."""

    batch: tuple[int, ...]
    head: int
    query: int
    key: int


def declared(tree: Any, path: str) -> Iterator[tuple[str, str | None]]:
    """`(path, axes)` of every leaf of a tree of modules, in the order of its leaves."""
    if isinstance(tree, eqx.Module):
        for field in tree.__dataclass_fields__.values():
            if field.metadata.get("static", False):
                continue
            value = getattr(tree, field.name)
            name = field.name.removeprefix("_")
            where = f"{path}.{name}" if path else name
            if "axes" in field.metadata:
                for _ in jax.tree.leaves(value):
                    yield where, field.metadata["axes"]
            else:
                yield from declared(value, where)
    elif isinstance(tree, tuple | list):
        for i, value in enumerate(tree):
            yield from declared(value, f"{path}[{i}]")
    else:
        for _ in jax.tree.leaves(tree):
            yield path, None


def canonical(tree: _T, sizes: Sizes, path: str, all_keys: int | None = None) -> _T:
    """Brings every array of a mask or score to the axes (batch, head, query, key, *rest).
    Those of both queries and keys have `all_keys`, if these are more than the others have.

    **Raises:** a `TypeError` that names the array, if it does not fit the call's sizes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    out = []
    for x, (where, spec) in zip(leaves, declared(tree, path), strict=True):
        if is_array(x):
            if spec is None:
                raise TypeError(
                    f"{where} is an array, but its field declares no axes: declare them "
                    "with `axes(...)`."
                )
            own = sizes
            if all_keys is not None and {"query", "key"} <= _plain(spec):
                own = sizes._replace(key=all_keys)
            x = _canonical(jnp.asarray(x), spec, own, where)
        out.append(x)
    return jax.tree.unflatten(treedef, out)


def own_sizes(tree: Any, path: str) -> tuple[tuple[int, ...], int]:
    """The batch axes and the number of heads that the arrays of a tree speak of."""
    batch: Any = ()
    heads = 1
    for x, (_, spec) in zip(jax.tree.leaves(tree), declared(tree, path), strict=True):
        names = (spec or "").split()
        if not is_array(x) or not names:
            continue
        core = names[1:] if names[0] == "batch" else names
        core = core[max(0, len(core) - x.ndim) :]
        shape = x.shape[x.ndim - len(core) :]
        batch = jnp.broadcast_shapes(batch, x.shape[: x.ndim - len(core)])
        for name, size in zip(core, shape, strict=True):
            heads = max(heads, size) if name.removeprefix("#") == "head" else heads
    return batch, heads


def _plain(spec: str) -> set[str]:
    return {name.removeprefix("#") for name in spec.split()}


def _canonical(x: jax.Array, spec: str, sizes: Sizes, where: str) -> jax.Array:
    names = spec.split()
    if not names:
        return x.reshape((1, 1, 1, 1, *x.shape))
    batched = names[0] == "batch"
    names = names[1:] if batched else names
    while len(names) > x.ndim and names[0].startswith("#"):
        names = names[1:]
    if x.ndim < len(names) or (not batched and x.ndim > len(names)):
        _raise(x, spec, sizes, where)
    batch, shape = x.shape[: x.ndim - len(names)], x.shape[x.ndim - len(names) :]
    for name, size in zip(names, shape, strict=True):
        plain = name.removeprefix("#")
        fits = plain == "rest" or size == getattr(sizes, plain)
        if not (fits or (name != plain and size == 1)):
            _raise(x, spec, sizes, where)
    plain = [name.removeprefix("#") for name in names]
    order = [plain.index(n) for n in _NAMES if n in plain]
    order += [i for i, n in enumerate(plain) if n == "rest"]
    rest = [shape[i] for i, n in enumerate(plain) if n == "rest"]
    core = [shape[plain.index(n)] if n in plain else 1 for n in _NAMES]
    if math.prod(batch) == 1 and len(batch) <= len(sizes.batch):
        batch = (1,)
    else:
        padded = (1,) * (len(sizes.batch) - len(batch)) + batch
        if len(padded) != len(sizes.batch) or any(
            n not in (1, m) for n, m in zip(padded, sizes.batch, strict=True)
        ):
            _raise(x, spec, sizes, where)
        x = jnp.broadcast_to(x.reshape(padded + shape), sizes.batch + shape)
        batch = (math.prod(sizes.batch),)
    x = x.reshape(batch + shape)
    x = x.transpose([0, *(i + 1 for i in order)])
    return x.reshape((*batch, *core, *rest))


def _raise(x: jax.Array, spec: str, sizes: Sizes, where: str):
    expected = spec.replace("batch", "*#batch").replace("head", "q_heads")
    expected = expected.replace("query", "q_len").replace("key", "kv_len")
    expected = expected.replace("rest", "any")
    raise ShapeError(
        f"{where}: expected an array of shape {expected!r}, where batch={sizes.batch}, "
        f"q_heads={sizes.head}, q_len={sizes.query}, kv_len={sizes.key}; got shape "
        f"{x.shape}."
    )


class Block(NamedTuple):
    """A tile's place: for (batch, head, query, key), where it starts and its size."""

    starts: tuple[Any, Any, Any, Any]
    sizes: tuple[int, int, int, int]


def cut(x: jax.Array, block: Block) -> jax.Array:
    """The tile of one canonical array: one of the axes (batch, head, query, key, *rest),
    each of its full size or of size one."""
    starts, sizes = [], []
    for axis, size in enumerate(x.shape):
        whole = axis > 3 or size == 1 or size == block.sizes[axis]
        starts.append(0 if whole else block.starts[axis])
        sizes.append(size if whole else block.sizes[axis])
    if tuple(sizes) == x.shape:
        return x
    return slice_at(x, starts, sizes)


def add(x: jax.Array, block: Block, tile: jax.Array) -> jax.Array:
    """Adds to one tile of a canonical array; the transpose of `cut`."""
    if tile.shape == x.shape:
        return x + tile
    starts = [
        0 if axis > 3 or size == 1 else block.starts[axis]
        for axis, size in enumerate(x.shape)
    ]
    return add_at(x, starts, tile)


def slice_at(x: jax.Array, starts: Sequence[Any], sizes: Sequence[int]) -> jax.Array:
    return lax.dynamic_slice(x, _int32(starts), sizes)


def write_at(x: jax.Array, starts: Sequence[Any], tile: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(x, tile, _int32(starts))


def add_at(x: jax.Array, starts: Sequence[Any], tile: jax.Array) -> jax.Array:
    return write_at(x, starts, slice_at(x, starts, tile.shape) + tile)


def _int32(starts: Sequence[Any]) -> list[jax.Array]:
    return [jnp.asarray(s, jnp.int32) for s in starts]


def blocks(x: jax.Array, axis: int, size: int, reduce: Any) -> jax.Array:
    """Reduces one axis of a canonical array to one number a block.

    The last block ends where the axis ends, and so may overlap the one before it.
    """
    length = x.shape[axis]
    if length == 1:
        return x
    count = -(-length // size)
    whole = lax.slice_in_dim(x, 0, length // size * size, axis=axis)
    shape = (*x.shape[:axis], length // size, size, *x.shape[axis + 1 :])
    parts = [reduce(whole.reshape(shape), axis=axis + 1)]
    if count * size != length:
        last = lax.slice_in_dim(x, length - size, length, axis=axis)
        parts.append(reduce(last, axis=axis, keepdims=True))
    return jnp.concatenate(parts, axis=axis)


def over_batch(fn: Any, tree: Any, *arrays: jax.Array) -> Any:
    """`fn(tree, *arrays)` of canonical arrays, one batch element at a time.

    Inside `fn` the batch axis is gone. Arrays that do not depend on it are not repeated.
    """
    leaves, treedef = jax.tree.flatten((tree, arrays))
    shared = [is_array(x) and x.shape[0] == 1 for x in leaves]
    mapped = [0 if is_array(x) and not s else None for x, s in zip(leaves, shared)]
    leaves = [x[0] if s else x for x, s in zip(leaves, shared)]

    def unbatched(leaves):
        tree, arrays = jax.tree.unflatten(treedef, leaves)
        return fn(tree, *arrays)

    if all(m is None for m in mapped):
        return jax.tree.map(lambda x: x[None], unbatched(leaves))
    static = [None if is_array(x) else x for x in leaves]
    return jax.vmap(
        lambda xs: unbatched([s if x is None else x for x, s in zip(xs, static)]),
        in_axes=(mapped,),
    )([x if is_array(x) else None for x in leaves])


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of `n` that is at most `limit` (and at least one)."""
    return max(d for d in range(1, n + 1) if n % d == 0 and (d <= limit or d == 1))
