"""What is known of the devices at trace time."""

import jax


def version_of_jax() -> tuple[int, ...]:
    return tuple(int(x) for x in jax.__version__.split(".")[:3] if x.isdigit())


def compute_capability() -> str:
    """Of the first GPU, such as `"9.0"`; empty if there is none."""
    try:
        devices = jax.devices("gpu")
    except RuntimeError:  # No GPU, or a jax that knows of none.
        return ""
    return str(getattr(devices[0], "compute_capability", ""))
