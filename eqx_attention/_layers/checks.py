"""What several layers ask: of their fields, when made and when loaded; of their inputs."""

import math
from typing import Any

from jaxtyping import Array

from .._dropout import check_rate
from .._static import is_number


def check_positive(module: Any, *names: str) -> None:
    for name in names:
        x = getattr(module, name)
        if not (is_number(x) and 0 < x < math.inf):
            where = f"{type(module).__name__}: {name}"
            raise ValueError(f"{where} must be positive; got {x}.")


def check_dropout(module: Any) -> None:
    rate = getattr(module.dropout, "p", None)
    check_rate(f"{type(module).__name__}: dropout_p", rate)


def check_rotary(module: Any, size_name: str) -> None:
    head_dim, size = getattr(module.rotary, "head_dim", None), getattr(module, size_name)
    if head_dim != size:
        raise ValueError(
            f"{type(module).__name__}: rotary must have a head_dim of {size_name}={size}; "
            f"got one of {head_dim}."
        )


def check_linear(module: Any, name: str, in_size: int, out_size: int) -> None:
    linear = getattr(module, name)
    got = tuple(getattr(linear, n, None) for n in ("in_features", "out_features"))
    if got != (in_size, out_size):
        raise ValueError(
            f"{type(module).__name__}: {name} must have in_features={in_size} and "
            f"out_features={out_size}; got {got[0]} and {got[1]}."
        )


def check_channels(module: Any, name: str, x: Array, size: int) -> None:
    if x.shape[-1] != size:
        where = f"{type(module).__name__}: {name}"
        raise TypeError(f"{where} must have shape (seq, {size}); got {x.shape}.")
