"""The options of a call: what they must be, checked once for all entry points."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh

from ._distributed import as_sharding, check_mesh, check_name, MECHANISMS, Shards
from ._dropout import check_rate
from ._errors import ShapeError
from ._mask import AbstractMask, Dense, Full
from ._mechanism import AbstractMechanism
from ._score import AbstractScore
from ._static import is_array, is_number, Static, static_or_leaf


def check_options(options: Any) -> None:
    """What holds of each `AttentionConfig` and each `Attention`."""
    as_sharding(options.sharding)
    check_mesh(options.sharding, getattr(options, "mesh", None))
    as_mechanism(options.mechanism)
    as_mask(options.mask)
    as_scores(options.score)
    as_scale(options.scale)
    as_dropout(options.dropout)
    as_precision(options.precision)
    as_dtype(options.dtype)


def as_mechanism(mechanism: Any) -> AbstractMechanism:
    if isinstance(mechanism, AbstractMechanism):
        return mechanism
    if not isinstance(mechanism, str):
        names, got = ", ".join(map(repr, MECHANISMS)), type(mechanism).__name__
        raise TypeError(f"mechanism: expected one of {names}, or a module; got {got}.")
    check_name("mechanism", mechanism)
    return MECHANISMS[mechanism]()


def as_mask(mask: Any) -> AbstractMask:
    if isinstance(mask, AbstractMask):
        return mask
    if is_array(mask):
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"mask: expected a mask or a boolean array, got an array of {mask.dtype}. "
                "To add numbers to the logits, use `score=Bias(array)`."
            )
        return Dense(mask)
    got = type(mask).__name__
    raise TypeError(f"mask: expected a mask or a boolean array, got {got}.")


def both_masks(first: AbstractMask, second: AbstractMask) -> AbstractMask:
    if isinstance(first, Full):
        return second
    return first if isinstance(second, Full) else first & second


def as_scores(score: Any) -> tuple[AbstractScore, ...]:
    scores = (score,) if isinstance(score, AbstractScore) else score
    if not isinstance(scores, tuple | list):
        got = type(score).__name__
        raise TypeError(f"score: expected a score or a tuple of scores, got {got}.")
    for s in scores:
        if not isinstance(s, AbstractScore):
            raise TypeError(f"score: expected scores, got {type(s).__name__}.")
    return tuple(scores)


def as_scale(scale: Any) -> Any:
    """`None`, a `Static` number or an array of no axis or of one."""
    scale = static_or_leaf(scale)
    if isinstance(scale, Static):
        if scale.value is None:
            return None
        if not is_number(scale.value):
            raise TypeError(f"scale: expected a number or array, got {scale.value!r}.")
        if not (scale.value > 0 and math.isfinite(scale.value)):
            raise ValueError(f"scale: expected a finite number > 0, got {scale.value}.")
        return Static(float(scale.value))
    if not is_array(scale) or not jnp.issubdtype(scale.dtype, jnp.floating):
        got = getattr(scale, "dtype", type(scale).__name__)
        raise TypeError(f"scale: expected a number or a floating array, got {got}.")
    if scale.ndim > 1:
        raise TypeError(
            "scale: expected a number, or an array of shape () or (q_heads,), got shape "
            f"{scale.shape}."
        )
    return scale


def as_dropout(rate: Any) -> float:
    if not is_number(rate):
        raise TypeError(f"dropout: expected a number, got {type(rate).__name__}.")
    rate = float(rate)
    check_rate("dropout", rate)
    return rate


def as_precision(precision: Any) -> str | None:
    """The name that `jax.lax` gives to a precision."""
    if precision is None:
        return None
    try:
        return str(lax.Precision(precision)).lower()
    except (TypeError, ValueError):
        names = ", ".join(repr(str(p).lower()) for p in lax.Precision)
        raise ValueError(
            f"precision: expected None or one of {names}, got {precision!r}."
        ) from None


def as_dtype(dtype: Any):
    if dtype is None:
        return None
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype!r}.") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}.")
    return dtype


def check_operands(query, key_, value) -> None:
    """What a signature's shapes cannot say."""
    dtypes = {x.dtype for x in (query, key_, value)}
    if len(dtypes) != 1:
        raise ShapeError(
            "query, key_, value: expected one dtype, got "
            f"{query.dtype}, {key_.dtype}, {value.dtype}."
        )
    q_heads, kv_heads = query.shape[-2], key_.shape[-2]
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(
            "query, key_: expected q_heads to be a multiple of kv_heads, got "
            f"q_heads={q_heads} and kv_heads={kv_heads}."
        )


def check_positions(positions: Any, name: str, words: tuple) -> None:
    if isinstance(positions, str) or positions is None:
        if positions not in words:
            raise ValueError(
                f"{name}: expected {' or '.join(map(repr, words))} or an integer array, "
                f"got {positions!r}."
            )
        return
    if not is_array(positions) or not jnp.issubdtype(positions.dtype, jnp.integer):
        got = getattr(positions, "dtype", type(positions).__name__)
        raise TypeError(f"{name}: expected an integer array, got {got}.")
    if positions.ndim == 0:
        raise ShapeError(
            f"{name}: expected one position for each token, got shape {positions.shape}."
        )


def platform_of(shards: Shards | None, *arrays: Any) -> str:
    """Where the mesh is, or arrays are, or where JAX will put what is traced."""
    if shards is not None and isinstance(shards.mesh, Mesh):
        return shards.mesh.devices.flat[0].platform
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, Tracer):
            return next(iter(x.devices())).platform
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(device, str):
        return device
    return jax.default_backend() if device is None else device.platform
