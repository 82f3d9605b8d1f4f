"""What is known of the devices at trace time."""

import functools as ft
import os
import pathlib
import platform as platform_
from typing import Any

import jax


# What our kernels need.
_HOPPER, _OLDEST_JAX = (9, 0), (0, 11)


def version_of_jax() -> tuple[int, ...]:
    return tuple(int(x) for x in jax.__version__.split(".")[:3] if x.isdigit())


def compute_capability() -> tuple[int, int]:
    """Of the first GPU, such as `(9, 0)`; `(0, 0)` if there is none of NVIDIA's."""
    try:
        devices = jax.devices("gpu")
    except RuntimeError:  # No GPU, or a jax that knows of none.
        return 0, 0
    major, _, minor = str(getattr(devices[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


@ft.cache
def processor() -> str:
    """The model of this machine's processor, and how many cores this process may use."""
    info, model = pathlib.Path("/proc/cpuinfo"), platform_.processor()
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = os.cpu_count() if affinity is None else len(affinity(0))
    return f"{model or platform_.machine()}, {cores} cores"


def device_name(platform: str) -> str | None:
    """What figures are said to be measured on; None if this machine has no such device."""
    if platform == "cpu":
        return processor()
    try:
        return jax.devices(platform)[0].device_kind
    except RuntimeError:
        return None


def num_multiprocessors() -> int:
    """Of the first GPU; where there is none, and kernels are only lowered, of an H200."""
    try:
        return jax.devices("gpu")[0].core_count
    except RuntimeError:
        return 132


def hopper_unsupported(platform: str) -> list[str]:
    """Why our kernels for Hopper GPUs do not run on such devices, if they do not."""
    reasons = []
    if platform != "gpu":
        reasons.append(f"it runs on Hopper GPUs, not on {platform}")
    elif (found := compute_capability()) != _HOPPER:
        got, wanted = (".".join(map(str, x)) for x in (found, _HOPPER))
        reasons.append(
            f"it runs on Hopper GPUs, not on one of {got} (theirs is the compute "
            f"capability {wanted})"
        )
    if version_of_jax() < _OLDEST_JAX:
        oldest = ".".join(map(str, _OLDEST_JAX))
        reasons.append(f"it needs jax {oldest} or later, not {jax.__version__}")
    return reasons


def wider_than_16_bits(*arrays: Any) -> tuple[str, ...]:
    """Why kernels for the matrix units refuse the dtypes of operands, if they do."""
    dtypes = {x.dtype.name for x in arrays}
    if len(dtypes) == 1 and dtypes <= {"bfloat16", "float16"}:
        return ()
    found = " and ".join(sorted(dtypes))
    return (f"it computes in bfloat16 or float16, not in {found}",)
