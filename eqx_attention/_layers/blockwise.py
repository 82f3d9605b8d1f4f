from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from beartype import beartype
from jaxtyping import Array, jaxtyped, PRNGKeyArray, PyTree, Shaped


# Of any structure; checked when called, free to a type checker.
if TYPE_CHECKING:
    _Tokens = Any
else:
    _Tokens = PyTree[Shaped[Array, "seq ..."]]


def _is_narrow_float(x: Any) -> bool:
    return eqx.is_inexact_array(x) and jnp.finfo(x.dtype).bits < 32


def tokenwise(
    module: Callable[..., Any],
    x: Shaped[Array, "seq ..."],
    indices: Shaped[Array, " seq"],
    key: PRNGKeyArray | None,
) -> PyTree:
    """Applies `module` to every token, each with a PRNG key of its own."""
    if key is None:
        return jax.vmap(module)(x)
    keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(key, indices)
    return jax.vmap(lambda token, key: module(token, key=key))(x, keys)


@jaxtyped(typechecker=beartype)
def blockwise(
    module: Callable[..., Any],
    x: Shaped[Array, "seq ..."],
    block_size: int,
    policy: Callable[..., Any] | None = None,
    *,
    key: PRNGKeyArray | None = None,
) -> _Tokens:
    r"""Applies a module to every token of a sequence, one block of tokens after
    another. What a block computes on the way, such as the hidden layer of a
    feed-forward network, is thrown away when the block is done, and computed again in
    the backward pass. No intermediate value of the whole sequence ever exists, forward
    or backward: memory is that of the input, the output, and one block.

    The result and its gradients are those of `jax.vmap(module)(x)`. Gradients with
    respect to parameters of fewer than 32 bits are summed over the blocks in float32.

    !!! Example

        ```python
        import equinox as eqx
        import eqx_attention as eqa
        import jax.numpy as jnp
        import jax.random as jr

        mlp = eqx.nn.MLP(64, 64, width_size=256, depth=1, key=jr.key(0))
        y = eqa.blockwise(mlp, jnp.ones((1000, 64)), block_size=128)
        ```

    ??? cite

        [Blockwise Parallel Transformer for Large Context
        Models](https://arxiv.org/abs/2305.19370)

        ```bibtex
        @inproceedings{liu2023blockwise,
            author={Liu, Hao and Abbeel, Pieter},
            title={Blockwise Parallel Transformer for Large Context Models},
            booktitle={Advances in Neural Information Processing Systems},
            year={2023},
        }
        ```

    **Arguments:**

    - `module`: A callable that acts on one token, as all of `equinox.nn` does: it maps
        `x[i]` to an array, or to a pytree of arrays. An `equinox.Module` or any
        other pytree of parameters is best; a function may close over its parameters.
    - `x`: The tokens, of shape `(seq, *token)`, with any length of sequence; it need
        not be a multiple of `block_size`, and is not padded.
    - `block_size`: How many tokens are computed at a time.
    - `policy`: What a block may keep for its backward pass, as the `policy` of
        `jax.checkpoint`. Defaults to nothing.
    - `key`: A `jax.random.key`. Token `i` is given `jax.random.fold_in(key, i)` as
        `module(x[i], key=...)`, so that dropout does not depend on `block_size`.
        Defaults to calling `module(x[i])`. (Keyword only argument.)

    **Returns:**

    What `jax.vmap(module)(x)` returns: an array (or a pytree of them) whose first axis
    is `seq`.

    **Raises:**

    A `ValueError` if `block_size` is not positive; a `TypeError` if `x` has no axis.
    """
    if block_size < 1:
        raise ValueError(f"blockwise: block_size must be positive; got {block_size}.")
    length, *token_shape = x.shape
    arrays, static = eqx.partition(module, eqx.is_array)
    # The loop's backward pass sums in the dtype of what goes into it.
    narrow = jax.tree.map(lambda a: a.dtype if _is_narrow_float(a) else None, arrays)
    arrays = jax.tree.map(
        lambda a: a.astype(jnp.float32) if _is_narrow_float(a) else a, arrays
    )

    def block(arrays, x, indices, key):
        # `narrow` has a dtype, or no leaf, for each array.
        arrays = jax.tree.map(
            lambda dtype, a: a if dtype is None else a.astype(dtype),
            narrow,
            arrays,
            is_leaf=lambda dtype: dtype is None,
        )
        return tokenwise(eqx.combine(arrays, static), x, indices, key)

    indices = jnp.arange(length)
    num_blocks, rest = divmod(length, block_size)
    if num_blocks == 0 or (num_blocks == 1 and rest == 0):
        return jax.checkpoint(block, policy=policy)(arrays, x, indices, key)

    whole = num_blocks * block_size
    # A scan's body is not merged with its own recomputation.
    body = jax.checkpoint(block, policy=policy, prevent_cse=False)
    out = jax.lax.map(
        lambda xs: body(arrays, *xs, key),
        (
            x[:whole].reshape(num_blocks, block_size, *token_shape),
            indices[:whole].reshape(num_blocks, block_size),
        ),
    )
    out = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), out)
    if rest != 0:
        last = jax.checkpoint(block, policy=policy)(arrays, x[whole:], indices[whole:], key)
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, last)
    return out
