"""Modules as JSON-able data and back. Nothing that a file names is imported or run."""

import dataclasses
import functools as ft
import json
import math
import types
import typing
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from beartype import beartype, BeartypeConf
from beartype.door import is_bearable
from jax.lax import Precision
from jaxtyping import jaxtyped

from ._errors import SerialisationError
from ._known import classes, constants, dtypes, functions
from ._static import Static


CONFIG_VERSION = 1
_CONFIG = "AttentionConfig"
_NOT_JSON = "are not JSON; use eqx_attention.save"
_MESH = jax.sharding.Mesh | jax.sharding.AbstractMesh


class Placeholder:
    """Stands for a function, mesh or array while the structure of a file is checked."""


@dataclasses.dataclass
class Parts:
    """What JSON does not hold: a file keeps, or its reader provides, these.

    - `leaves`: the arrays, to which the structure refers by number.
    - `functions`: the functions, to which it refers by name.
    - `mesh`: the mesh, of which it keeps the names of the axes.
    - `used`, `missing`: filled by `rebuild`: the numbers of the leaves it met, and the
        functions (and whether a mesh) that the structure names and that are not here.
    """

    leaves: list = dataclasses.field(default_factory=list)
    functions: dict[str, Callable] = dataclasses.field(default_factory=dict)
    mesh: Any = None
    used: list[int] = dataclasses.field(default_factory=list)
    missing: set[str] = dataclasses.field(default_factory=set)


@ft.cache
def _fields(cls: type) -> dict[str, tuple[dataclasses.Field, Any, tuple[type, ...]]]:
    """By name in JSON: each field, its annotation, and what is in a Static there."""
    hints = typing.get_type_hints(cls)
    out = {}
    for field in dataclasses.fields(cls):
        hint = hints.get(field.name, Any)
        options = [hint, *typing.get_args(hint)]
        wrapped = [t for t in (bool, int, float, type(None)) if t not in options]
        wrapped = tuple(wrapped) if Static in options else ()
        out[field.name.removeprefix("_")] = (field, hint, wrapped)
    return out


def _fail(path: str, message: str) -> typing.NoReturn:
    raise SerialisationError(f"{path or 'the top level'}: {message}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def describe(value: Any, parts: Parts | None = None, path: str = "") -> Any:
    """Turns a pytree of modules into data for `json.dumps`.

    **Arguments:**

    - `value`: any nesting of the package's and `equinox.nn`'s modules, tuples, lists,
        dictionaries, plain Python values, dtypes and precisions.
    - `parts`: takes the arrays, functions and mesh. If `None`, these are refused.
    - `path`: where in the whole the value is, for error messages.

    **Raises:** `SerialisationError`, with the path of what cannot be described.
    """
    go = ft.partial(describe, parts=parts)
    cls = type(value)
    if value is None or cls in (bool, int, str):
        return value
    if cls is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if cls is tuple:
        return [go(v, path=f"{path}[{i}]") for i, v in enumerate(value)]
    if cls is list:
        return {"list": [go(v, path=f"{path}[{i}]") for i, v in enumerate(value)]}
    if cls is dict:
        where = f"{path} key"
        pairs = ((k, v, f"{path}[{k!r}]") for k, v in value.items())
        return {"dict": [[go(k, path=where), go(v, path=p)] for k, v, p in pairs]}
    if cls is Precision:
        return {"precision": value.name}
    if cls is Static:
        return {"static": go(value.value, path=path)}
    if (kind := _dtype_kind(value)) is not None:
        return {kind: np.dtype(value).name}
    for name, known in classes().items():
        if cls is known:
            return {"type": name} | _describe_fields(value, parts, path)
    return _describe_part(value, parts, path)


def _dtype_kind(value: Any) -> str | None:
    """A dtype is given as itself, as JAX's scalar type or as NumPy's."""
    scalar_type = isinstance(value, type) and issubclass(value, np.generic)
    if not scalar_type and not isinstance(value, np.dtype | type(jnp.int8)):
        return None
    if dtypes().get(np.dtype(value).name) != np.dtype(value):
        return None  # of a foreign byte order, for example
    if isinstance(value, np.dtype):
        return "dtype"
    return "numpy" if scalar_type else "jax.numpy"


def _describe_fields(module: Any, parts: Parts | None, path: str) -> dict[str, Any]:
    out = {}
    for json_name, (field, _, wrapped) in _fields(type(module)).items():
        value, where = getattr(module, field.name), _join(path, json_name)
        if type(value) is Static and type(value.value) in wrapped:
            value = value.value
        elif type(value) in wrapped:
            _fail(where, f"expected an array or a static number, got {value!r}.")
        out[json_name] = describe(value, parts, where)
    return out


def _describe_part(value: Any, parts: Parts | None, path: str) -> dict[str, Any]:
    cls = type(value)
    if isinstance(value, _MESH):
        if parts is None:
            _fail(path, f"meshes {_NOT_JSON}.")
        if parts.mesh is not None and parts.mesh != value:
            _fail(path, "a second mesh; a file can refer to one only.")
        parts.mesh = value
        return {"mesh": list(value.axis_names)}
    if isinstance(value, jax.core.Tracer):
        _fail(path, "a traced array; save outside of jit, grad and vmap.")
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if parts is None:
            _fail(path, f"arrays {_NOT_JSON}.")
        parts.leaves.append(value)
        return {"leaf": len(parts.leaves) - 1}
    if callable(value) and not isinstance(value, type | eqx.Module):
        if parts is None:
            _fail(path, f"functions {_NOT_JSON}.")
        return {"function": _function_name(value, parts, path)}
    known = "known are the modules that eqx_attention exports and those of equinox.nn"
    _fail(path, f"{cls.__module__}.{cls.__qualname__} is not a known type; {known}.")


def _function_name(fn: Callable, parts: Parts, path: str) -> str:
    for name, known in functions().items():
        if known is fn:
            return name
    base = getattr(fn, "__name__", None)
    if not isinstance(base, str):
        _fail(path, f"{fn!r} has no name by which to refer to it; write it with def.")
    name, count = base, 1
    while parts.functions.get(name, fn) is not fn:
        count += 1
        name = f"{base}#{count}"
    parts.functions[name] = fn
    return name


def rebuild(
    data: Any, parts: Parts | None = None, path: str = "", check: bool = True
) -> Any:
    """The inverse of [`describe`][], from untrusted data.

    **Arguments:**

    - `data`: as from `json.loads`.
    - `parts`: provides the arrays, functions and mesh. If `None`, these are refused.
    - `path`: where in the whole the value is, for error messages.
    - `check`: whether to run the modules' `__check_init__`.

    **Raises:** `SerialisationError`, with the path of what is wrong.
    """
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is list:
        rebuilt = (rebuild(v, parts, f"{path}[{i}]", check) for i, v in enumerate(data))
        return tuple(rebuilt)
    if type(data) is not dict:
        _fail(path, f"expected JSON, got {type(data).__name__}.")
    if "type" in data:
        return _rebuild_module(data, parts, path, check)
    if len(data) != 1:
        _fail(path, f"an object has a 'type' or a single entry; got {sorted(data)}.")
    ((kind, content),) = data.items()
    if kind in ("leaf", "function", "mesh"):
        return _rebuild_part(kind, content, parts, path)
    if kind == "static" and _is_plain(content):
        return Static(content)
    if kind == "list" and type(content) is list:
        return list(rebuild(content, parts, path, check))
    if kind == "dict" and type(content) is list:
        pairs = rebuild(content, parts, path, check)
        if all(type(p) is tuple and len(p) == 2 and _is_plain(p[0]) for p in pairs):
            return dict(pairs)
    elif kind in (known := constants()) and type(content) is str:
        if content in known[kind]:
            return known[kind][content]
    _fail(path, f"not a known value: {kind!r} of {str(content)[:50]!r}.")


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def _rebuild_part(kind: str, content: Any, parts: Parts | None, path: str) -> Any:
    if parts is None:
        _fail(path, f"a {kind} is not JSON; use eqx_attention.save and load.")
    if kind == "leaf" and type(content) is int and 0 <= content < len(parts.leaves):
        parts.used.append(content)
        return parts.leaves[content]
    if kind == "function" and type(content) is str:
        if content not in (known := functions() | parts.functions):
            parts.missing.add(repr(content))
        return known.get(content, Placeholder())
    if kind == "mesh" and type(content) is list:
        if parts.mesh is None:
            parts.missing.add("mesh")
            return Placeholder()
        if list(parts.mesh.axis_names) != content:
            given = list(parts.mesh.axis_names)
            _fail(path, f"expected a mesh of axes {content}, got one of axes {given}.")
        return parts.mesh
    _fail(path, f"not a known {kind}: {str(content)[:50]!r}.")


def _rebuild_module(data: dict, parts: Parts | None, path: str, check: bool) -> Any:
    name = data["type"]
    cls = classes().get(name) if type(name) is str else None
    if cls is None:
        _fail(path, f"{str(name)[:80]!r} is not the name of a known type.")
    fields = _fields(cls)
    for field in data:
        if field not in fields and field != "type":
            expected = ", ".join(map(repr, fields)) or "none"
            _fail(path, f"{name} has no field {field!r}; its fields are: {expected}.")
    for field in fields:
        if field not in data:
            _fail(path, f"the field {field!r} of {name} is missing.")
    module = object.__new__(cls)
    for json_name, (field, hint, wrapped) in fields.items():
        raw, where = data[json_name], _join(path, json_name)
        value = rebuild(raw, parts, where, check)
        if type(value) in wrapped:
            value = Static(value)
        if not _fits(value, hint):
            wanted = f"expected {_show(hint)} for {json_name} of {name}"
            _fail(where, f"{wanted}, got {type(value).__name__} {repr(value)[:80]}.")
        # Equinox does not print a field that *is* its default.
        if type(value) is type(field.default) and repr(value) == repr(field.default):
            value = field.default
        object.__setattr__(module, field.name, value)
    if check:
        _check_init(module, path)
    return module


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated kind. Arrays fit: layers may be stacked."""
    if isinstance(value, jax.Array | np.ndarray | np.generic | Placeholder):
        return True
    if type(value) is tuple and typing.get_origin(hint) is tuple:
        each = typing.get_args(hint)
        if len(each) == 2 and each[1] is Ellipsis:
            return all(_fits(v, each[0]) for v in value)
    return is_bearable(value, hint, conf=BeartypeConf(is_pep484_tower=True))


def _show(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_show(h) for h in typing.get_args(hint))
    names = {Static: "a number", type(None): "None"}
    plain = str(hint) if origin else getattr(hint, "__name__", str(hint))
    return names.get(hint, plain)


def _check_init(module: eqx.Module, path: str) -> None:
    for cls in type(module).__mro__:
        if "__check_init__" in vars(cls):
            try:
                vars(cls)["__check_init__"](module)
            except (TypeError, ValueError, NotImplementedError) as error:
                _fail(path, str(error))


def parse(text: str | bytes) -> Any:
    """`json.loads`, strictly: finite numbers, no name twice, no absurd depth."""

    def constant(name: str):
        raise ValueError(f"{name} is not JSON")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else constant(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twice!r} is there twice")
        return dict(pairs)

    try:
        return json.loads(
            text, parse_constant=constant, parse_float=number, object_pairs_hook=unique
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def config_to_json(config: Any) -> str:
    """The text of [`eqx_attention.AttentionConfig.to_json`][]."""
    try:
        data = describe(config)
        if type(data) is not dict or data.get("type") != _CONFIG:
            _fail("", f"expected an {_CONFIG}, got {type(config).__name__}.")
        return json.dumps({"version": CONFIG_VERSION} | data, indent=2, allow_nan=False)
    except RecursionError as error:
        raise SerialisationError("the config is nested too deeply.") from error


@jaxtyped(typechecker=beartype)
def config_from_json(text: str) -> Any:
    """The config of [`eqx_attention.AttentionConfig.from_json`][]."""
    try:
        data = parse(text)
    except ValueError as error:
        raise SerialisationError(f"not the JSON of an {_CONFIG}: {error}.") from error
    if type(data) is not dict or data.get("type") != _CONFIG:
        _fail("", f"not the JSON of an {_CONFIG}: its 'type' must be {_CONFIG!r}.")
    if "version" not in data:
        _fail("", "the field 'version' is missing.")
    version = data.pop("version")
    if type(version) is not int or version != CONFIG_VERSION:
        _fail("version", f"expected {CONFIG_VERSION}, got {version!r}.")
    try:
        return rebuild(data)
    except RecursionError as error:
        raise SerialisationError("the config is nested too deeply.") from error
