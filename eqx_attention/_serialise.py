"""Modules in files: a line of JSON, then the arrays' bytes. Never pickle."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import jaxtyped

from ._describe import describe, parse, Parts, Placeholder, rebuild
from ._errors import SerialisationError
from ._known import dtypes


VERSION = 1
_START = b'{"format": "eqx_attention", "version": '
_UNKNOWN = "0" * 64
_MAX_HEADER = 2**24  # JSON may take 25 times its length in memory
_TOO_LONG = "its header, which names every part, is longer than 16 MiB"
_KEYS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
_WIDE = ("int64", "uint64", "float64", "complex128")
_WEAK = ("int32", "float32", "complex64", "int64", "float64", "complex128")
_HEADER = {
    "format": str,
    "version": int,
    "header_sha256": str,
    "package_version": str,
    "payload_bytes": int,
    "payload_sha256": str,
    "check": bool,
    "leaves": list,
    "structure": object,
}


@jaxtyped(typechecker=beartype)
def save(path: str | os.PathLike[str], module: Any) -> None:
    """Saves a module to a file, whole: what it is made of as well as its arrays.

    !!! example

        ```python
        eqa.save("attention.eqx", attention)
        attention = eqa.load("attention.eqx")
        ```

    The file is written beside `path` and moved there when it is complete and on the
    disk, so that `path` is at every moment the old file or the new one. Files hold no
    code: a function (of a [`eqx_attention.Predicate`][], say) is stored as its name only.

    **Arguments:**

    - `path`: where to. An existing file is replaced.
    - `module`: any module of this package or of `equinox.nn`, or tuples, lists and
        dictionaries of them.

    **Raises:** [`eqx_attention.SerialisationError`][], with the path of a value inside
        the module that has no place in a file; `OSError` as from `open`. An old file
        then is as it was.
    """
    parts = Parts()
    try:
        structure = describe(module, parts)
        check = _fulfils_checks(structure, parts)
    except RecursionError as error:
        raise SerialisationError("the module is nested too deeply.") from error
    header = {
        "format": "eqx_attention",
        "version": VERSION,
        "header_sha256": _UNKNOWN,
        "package_version": getattr(sys.modules["eqx_attention"], "__version__", "unknown"),
        "payload_bytes": 0,
        "payload_sha256": _UNKNOWN,
        "check": check,
        "leaves": [_entry(leaf) for leaf in parts.leaves],
        "structure": structure,
    }
    header["payload_bytes"] = sum(_num_bytes(entry) for entry in header["leaves"])
    if len(_line(header)) > _MAX_HEADER:
        raise SerialisationError(f"the module has too many parts: {_TOO_LONG}.")
    _write(os.path.realpath(path), header, parts.leaves)


def _fulfils_checks(structure: Any, parts: Parts) -> bool:
    """Whether the module passes its own checks. (One of a stack of layers does not.)

    Also makes sure that what is saved will load.
    """
    rebuild(structure, parts, check=False)
    try:
        rebuild(structure, parts)
    except SerialisationError:
        return False
    return True


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _entry(leaf: Any) -> dict[str, Any]:
    """The line of the table of leaves: enough to know the bytes and to rebuild it."""
    kind = "jax"
    if _is_key(leaf):
        kind, leaf = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
        if kind not in _KEYS:
            raise SerialisationError(f"PRNG keys of kind {kind!r} cannot be saved.")
    elif not isinstance(leaf, jax.Array):
        kind = "numpy" if isinstance(leaf, np.ndarray) else "scalar"
    elif leaf.weak_type and leaf.dtype.name in _WEAK:
        kind = "weak"
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise SerialisationError(
            "an array is spread over several processes: gather it before saving."
        )
    if leaf.dtype.name not in dtypes():
        raise SerialisationError(f"arrays of dtype {leaf.dtype} cannot be saved.")
    return {"kind": kind, "dtype": leaf.dtype.name, "shape": list(leaf.shape)}


def _num_bytes(entry: dict[str, Any]) -> int:
    return math.prod(entry["shape"]) * np.dtype(dtypes()[entry["dtype"]]).itemsize


def _write(path: str, header: dict[str, Any], leaves: list[Any]) -> None:
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "xb") as file:
            file.write(_line(header))
            digest = hashlib.sha256()
            for leaf in leaves:
                payload = _to_bytes(leaf)
                digest.update(payload)
                file.write(payload)
            header["payload_sha256"] = digest.hexdigest()
            header["header_sha256"] = hashlib.sha256(_line(header)).hexdigest()
            file.seek(0)
            file.write(_line(header))  # of the same length
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
    with contextlib.suppress(OSError):  # Not every system can open folders.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _line(header: dict[str, Any]) -> bytes:
    return json.dumps(header, allow_nan=False).encode() + b"\n"


def _to_bytes(leaf: Any) -> bytes:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    array = array.astype(dtypes()[array.dtype.name], copy=False)  # native byte order
    return (array if sys.byteorder == "little" else array.byteswap()).tobytes()


@jaxtyped(typechecker=beartype)
def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | AbstractMesh | None = None,
    functions: Mapping[str, Callable[..., Any]] = {},
) -> Any:
    """Loads what [`eqx_attention.save`][] saved.

    Everything about the file is checked before any array is made: whose it is, its
    version, its length, its checksums, and the types, fields, dtypes and shapes it
    names. Nothing that a file names is imported or run.

    **Arguments:**

    - `path`: the file.
    - `mesh`: needed only if the module that was saved holds a mesh, whose place it
        takes. It has axes of the same names.
    - `functions`: needed only if the module that was saved holds functions: by the name
        each was defined by, what takes its place. The activations of `jax.nn` need not
        be given.

    **Returns:**

    The module, its arrays on the default device.

    **Raises:** [`eqx_attention.SerialisationError`][] (a `ValueError`) that says whether
        the file is not one of ours, truncated, corrupted or written by a newer version,
        or what else it needs; `OSError`, such as `FileNotFoundError`, as from `open`.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise SerialisationError(f"{path}: not an eqx_attention file, nor any file.")
    with open(path, "rb") as file:
        try:
            return _read(file, Parts(functions=dict(functions), mesh=mesh))
        except RecursionError as error:
            raise SerialisationError(f"{path}: nested too deeply.") from error
        except SerialisationError as error:
            raise SerialisationError(f"{path}: {error}") from error


def _read(file: BinaryIO, parts: Parts) -> Any:
    header, size = _read_header(file)
    entries, payload_bytes = header["leaves"], header["payload_bytes"]
    if sum(_checked_bytes(entry) for entry in entries) != payload_bytes:
        _corrupted("the shapes do not add up to the length")
    length = os.fstat(file.fileno()).st_size
    if length < size + payload_bytes:
        _truncated(f"{length} of {size + payload_bytes} bytes")
    if length > size + payload_bytes:
        _corrupted(f"{length - size - payload_bytes} bytes after the end")
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    if digest.hexdigest() != header["payload_sha256"]:
        _corrupted("checksum")

    parts.leaves = [Placeholder()] * len(entries)
    rebuild(header["structure"], parts, check=False)
    if sorted(parts.used) != list(range(len(entries))):
        _corrupted("its structure does not have each array once")
    _check_provided(parts)

    file.seek(size)
    parts.leaves = [_read_leaf(file, entry) for entry in entries]
    return rebuild(header["structure"], parts, check=header["check"])


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, checked but for its structure, and its length in bytes."""
    start = file.read(len(_START))
    if start != _START:
        if start and _START.startswith(start):
            _truncated("within the header")
        raise SerialisationError("not an eqx_attention file.")
    line = start + file.readline(_MAX_HEADER - len(start))
    if len(line) == _MAX_HEADER and not line.endswith(b"\n"):
        _corrupted(_TOO_LONG)
    try:
        header = parse(line)
    except ValueError as error:
        if not line.endswith(b"\n"):
            _truncated("within the header")
        raise SerialisationError(f"corrupted (header): {error}.") from error
    version = header.get("version")
    if type(version) is int and version > VERSION:
        raise SerialisationError(
            f"written by a newer version {version}; this is {VERSION}."
        )
    digest = header.get("header_sha256")
    if version != VERSION or type(digest) is not str or len(digest) != 64:
        _corrupted("header")
    before, _, after = line.partition(digest.encode())
    if hashlib.sha256(before + _UNKNOWN.encode() + after).hexdigest() != digest:
        _corrupted("checksum of the header")
    if header.keys() != _HEADER.keys():
        _corrupted(f"header: expected the fields {list(_HEADER)}, got {list(header)}")
    for name, kind in _HEADER.items():
        if not isinstance(header[name], kind):
            _corrupted(f"header: {name} is {header[name]!r}")
    return header, len(line)


def _checked_bytes(entry: Any) -> int:
    """How many bytes a leaf claims, after checks of all else it claims."""
    if not isinstance(entry, dict) or entry.keys() != {"kind", "dtype", "shape"}:
        _corrupted(f"header: {entry!r} does not describe an array")
    kind, dtype, shape = entry["kind"], entry["dtype"], entry["shape"]
    good = kind in ["jax", "weak", "numpy", "scalar", *_KEYS] and dtype in [*dtypes()]
    good = good and (kind != "weak" or dtype in _WEAK)
    good = good and isinstance(shape, list) and len(shape) <= 32
    good = good and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    good = good and not (kind == "scalar" and shape)
    if good and kind in _KEYS:
        good = dtype == "uint32" and shape[-1:] == [_KEYS[kind]]
    if not good:
        _corrupted(f"header: {entry!r} does not describe an array")
    if kind in ("jax", "weak") and dtype in _WIDE and not jax.config.read("jax_enable_x64"):
        raise SerialisationError(
            f"it has arrays of dtype {dtype}, which JAX would round: enable them "
            "first, with `jax.config.update('jax_enable_x64', True)`."
        )
    return _num_bytes(entry)


def _check_provided(parts: Parts) -> None:
    functions = sorted(parts.missing - {"mesh"})
    if functions:
        names = ", ".join(functions)
        raise SerialisationError(
            f"it names functions, which are not in the file: {names}. Pass them as "
            f"`load(..., functions={{{functions[0]}: ...}})`."
        )
    if parts.missing:
        raise SerialisationError("it refers to a mesh: pass `load(..., mesh=mesh)`.")


def _read_leaf(file: BinaryIO, entry: dict[str, Any]) -> Any:
    payload = file.read(_num_bytes(entry))
    if len(payload) != _num_bytes(entry):
        _truncated("while it was read")
    array = np.frombuffer(payload, dtypes()[entry["dtype"]]).reshape(entry["shape"])
    if array.dtype == np.bool_ and (array.view(np.uint8) > 1).any():
        _corrupted("a boolean is neither 0 nor 1")
    array = array if sys.byteorder == "little" else array.byteswap()
    kind = entry["kind"]
    if kind == "numpy":
        return array.copy()
    if kind == "scalar":
        return array[()]
    if kind == "jax":
        return jnp.array(array)
    if kind == "weak":
        # Python numbers make weakly typed arrays, and updates leave them so.
        weak = jnp.full(array.shape, array.dtype.type(0).item())
        same = weak.dtype == array.dtype
        return weak.at[...].set(jnp.array(array)) if same else jnp.array(array)
    return jax.random.wrap_key_data(jnp.array(array), impl=kind)


def _corrupted(how: str) -> NoReturn:
    raise SerialisationError(f"corrupted ({how}).")


def _truncated(how: str) -> NoReturn:
    raise SerialisationError(f"truncated ({how}).")
