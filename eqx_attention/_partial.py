"""Attention is a monoid over key blocks: partials merge."""

from collections.abc import Sequence

import jax.numpy as jnp
from beartype import beartype as typechecker
from jax import lax
from jaxtyping import Array, Float, jaxtyped

from ._dtype import accumulation_dtype
from ._errors import ShapeError


@jaxtyped(typechecker=typechecker)
def merge(
    partials: Sequence[
        tuple[
            Float[Array, "*batch q_len heads value_dim"], Float[Array, "*batch q_len heads"]
        ]
    ],
) -> tuple[
    Float[Array, "*batch q_len heads value_dim"], Float[Array, "*batch q_len heads"]
]:
    r"""Merges attention over several disjoint sets of keys into attention over their union.

    With $\ell = \log \sum_n \exp \ell_n$, the merged output is
    $\sum_n \exp(\ell_n - \ell)\, o_n$. The merge is associative and commutative; it is
    stable for logits of any size; a partial over no key, $(0, -\infty)$, is neutral.
    Gradients flow through all outputs and all log-sum-exps.

    **Arguments:**

    - `partials`: a non-empty sequence of `(out, lse)`, as given by
        [`eqx_attention.attend`][] with `return_lse=True`, of the same shapes.

    **Returns:**

    `(out, lse)`, in the dtype of the first `out` and in at least float32.

    ??? cite

        [Flash-Decoding for long-context inference](https://pytorch.org/blog/flash-decoding)

        ```bibtex
        @misc{dao2023flashdecoding,
            title={Flash-Decoding for long-context inference},
            author={Dao, Tri and Haziza, Daniel and Massa, Francisco and Sizov, Grigory},
            year={2023},
            url={https://pytorch.org/blog/flash-decoding}
        }
        ```

    **Raises:** `ValueError` if there are no partials.
    """
    if not partials:
        raise ValueError("merge(partials): expected at least one partial, got none.")
    shapes = {(out.shape, lse.shape) for out, lse in partials}
    if len(shapes) > 1:
        raise ShapeError(
            f"merge(partials): expected partials of one shape, got {sorted(shapes)}."
        )
    dtype = accumulation_dtype(partials[0][1].dtype)
    lses = jnp.stack([lse.astype(dtype) for _, lse in partials])
    weights, lse = _weights(lses)
    out = jnp.zeros((), dtype)
    for n, (x, _) in enumerate(partials):
        x = jnp.where(jnp.isneginf(lses[n])[..., None], 0, x.astype(dtype))
        out = out + weights[n][..., None] * x
    return out.astype(partials[0][0].dtype), lse


def merge_stacked(
    outs: Float[Array, "partials ... value_dim"], lses: Float[Array, "partials ..."]
) -> tuple[Float[Array, "... value_dim"], Float[Array, "..."]]:
    """`merge` of partials that are stacked along the first axis."""
    weights, lse = _weights(lses)
    outs = jnp.where(jnp.isneginf(lses)[..., None], 0, outs)
    return (weights[..., None] * outs).sum(axis=0), lse


def _weights(
    lses: Float[Array, "partials ..."],
) -> tuple[Float[Array, "partials ..."], Float[Array, "..."]]:
    """How much each partial counts, and the log-sum-exp of all."""
    top = lax.stop_gradient(lses.max(axis=0))
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(lses - top[None])
    total = weights.sum(axis=0)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    return weights / safe[None], jnp.where(empty, -jnp.inf, top + jnp.log(safe))
