"""In which order the tokens of a sequence lie on the devices of a ring."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype as typechecker
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, jaxtyped, Shaped


LAYOUTS = ("contiguous", "zigzag")
Chunks = tuple[tuple[int, ...], ...]


def chunks_of(layout: str, n: int) -> Chunks:
    """The numbers of the chunks that each of `n` devices holds, in its order."""
    if layout == "zigzag":
        return tuple((r, 2 * n - 1 - r) for r in range(n))
    return tuple((r,) for r in range(n))


@jaxtyped(typechecker=typechecker)
def to_layout(
    x: Shaped[Array, "..."] | Shaped[np.ndarray, "..."],
    n: int,
    layout: Literal["contiguous", "zigzag"] = "zigzag",
    axis: int = -1,
) -> Shaped[Array, "..."]:
    """Permutes tokens so that a causal ring of `n` devices has the same work on each.

    In the zigzag layout a sequence is cut into `2 * n` chunks, and device `r` holds those
    numbered `r` and `2 * n - 1 - r`. Permute tokens, labels, positions and segments once,
    outside of the model; then use [`eqx_attention.Ring`][] with the same layout. What is
    done token by token does not notice.

    **Arguments:**

    - `x`: an array with one axis of tokens.
    - `n`: over how many devices the tokens are split.
    - `layout`: `"zigzag"`, or `"contiguous"`, which is the order that tokens have anyway.
    - `axis`: that of the tokens. Default: the last.

    **Returns:**

    An array of the same shape: split evenly over `n` devices, it is laid out.

    **Raises:** `ValueError` if the length is not a multiple of `2 * n` (of `n`, if
        contiguous): pad it; or for an axis that `x` does not have.

    ??? cite

        [Ring Attention with Blockwise Transformers for Near-Infinite
        Context](https://arxiv.org/abs/2310.01889),
        [Striped Attention: Faster Ring Attention for Causal
        Transformers](https://arxiv.org/abs/2311.09431)

        ```bibtex
        @inproceedings{liu2024ring,
            title={Ring Attention with Blockwise Transformers for Near-Infinite Context},
            author={Liu, Hao and Zaharia, Matei and Abbeel, Pieter},
            booktitle={International Conference on Learning Representations},
            year={2024}
        }
        @article{brandon2023striped,
            title={Striped Attention: Faster Ring Attention for Causal Transformers},
            author={Brandon, William and Nrusimha, Aniruddha and Qian, Kevin and
                    Ankner, Zachary and Jin, Tian and Song, Zhiye and Ragan-Kelley,
                    Jonathan},
            journal={arXiv:2311.09431},
            year={2023}
        }
        ```
    """
    return _permuted("to_layout", x, n, layout, axis, back=False)


@jaxtyped(typechecker=typechecker)
def from_layout(
    x: Shaped[Array, "..."] | Shaped[np.ndarray, "..."],
    n: int,
    layout: Literal["contiguous", "zigzag"] = "zigzag",
    axis: int = -1,
) -> Shaped[Array, "..."]:
    """The inverse of [`eqx_attention.to_layout`][].

    **Arguments:**

    - `x`, `n`, `layout`, `axis`: as there.

    **Returns:**

    An array of the same shape, its tokens in their original order.

    **Raises:** `ValueError`, as there.
    """
    return _permuted("from_layout", x, n, layout, axis, back=True)


def _permuted(name: str, x: Any, n: int, layout: str, axis: int, back: bool) -> Array:
    x = jnp.asarray(x)
    if n < 1:
        raise ValueError(f"{name}(n): expected at least 1 device, got {n}.")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"{name}(axis): expected an axis of an array of shape {x.shape}, got {axis}."
        )
    axis = axis % x.ndim
    order = np.ravel(chunks_of(layout, n))
    length = x.shape[axis]
    if length % order.size:
        raise ValueError(
            f"{name}(x): expected a length that is a multiple of {order.size} for "
            f"n={n} and layout={layout!r}, got {length}. Pad it."
        )
    if layout == "contiguous":
        return x
    order = np.argsort(order) if back else order
    shape = (*x.shape[:axis], order.size, length // order.size, *x.shape[axis + 1 :])

    def permute(x):
        return jnp.take(x.reshape(shape), order, axis=axis).reshape(x.shape)

    sharding = jax.typeof(x).sharding
    if sharding.spec[axis] is None:
        return permute(x)
    # What is split by type is permuted whole, and split again.
    whole = P(*(None if n == axis else s for n, s in enumerate(sharding.spec)))
    x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, whole))
    return jax.sharding.reshard(permute(x), sharding)
