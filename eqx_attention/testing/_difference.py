"""The largest differences between two attention functions."""

from typing import Any

import jax
import jax.numpy as jnp

import eqx_attention as eqa

from ._check import as_function


def value_and_grad_difference(
    fn1: Any,
    fn2: Any,
    seed: int = 42,
    batch: int = 2,
    heads: int = 4,
    q_len: int = 1024,
    kv_len: int = 2048,
    head_dim: int = 64,
    key_mask: bool = True,
) -> tuple[float, tuple[float, float, float]]:
    """By how much do two attention functions, and their gradients, differ?

    Both are called as `fn(query, key_, value, mask=mask)` with float32 arrays of
    independent normal numbers, and differentiated through the sum of their output.

    ```python
    o, (dq, dk, dv) = eqa.value_and_grad_difference("vanilla", "blockwise")
    ```

    **Arguments:**

    - `fn1`, `fn2`: functions with the signature of [`eqx_attention.attend`][], of which
        only `mask` is used; or mechanisms, or their names.
    - `seed`: of the arrays.
    - `batch`, `heads`, `q_len`, `kv_len`, `head_dim`: the query is
        `"batch q_len heads head_dim"`, the keys and the values are
        `"batch kv_len heads head_dim"`.
    - `key_mask`: whether half of the keys, at random, are hidden. If so then `mask` is an
        [`eqx_attention.Keys`][], else an [`eqx_attention.Full`][].

    **Returns:** a tuple `(o, (dq, dk, dv))` of the largest absolute differences between
    the outputs and between the gradients of the query, the keys and the values.

    **Raises:** a `TypeError` if one of them is not callable, and what they raise.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((batch, q_len), (batch, kv_len), (batch, kv_len))
    arrays = tuple(
        jax.random.normal(key, (*shape, heads, head_dim), jnp.float32)
        for key, shape in zip(keys[:3], shapes, strict=True)
    )
    mask = eqa.Full()
    if key_mask:
        mask = eqa.Keys(jax.random.bernoulli(keys[3], shape=(batch, kv_len)))

    def values_and_gradients(fn):
        def loss(arrays):
            out = as_function(fn)[1](*arrays, mask=mask)
            return jnp.sum(out.astype(jnp.float32)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return out, gradients

    def largest(x, y):
        return float(jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))))

    one, two = values_and_gradients(fn1), values_and_gradients(fn2)
    o, (dq, dk, dv) = jax.tree.map(largest, one, two)
    return o, (dq, dk, dv)
