from typing import Any

import jax.numpy as jnp


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype of statistics and sums: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
