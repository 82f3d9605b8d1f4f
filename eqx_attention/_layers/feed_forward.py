import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped, PRNGKeyArray

from .blockwise import blockwise, tokenwise
from .checks import check_channels, check_dropout, check_linear, check_positive


_activations: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "relu": (jax.nn.relu, False),
    "gelu": (jax.nn.gelu, False),
    "gelu_exact": (ft.partial(jax.nn.gelu, approximate=False), False),
    "silu": (jax.nn.silu, False),
    "glu": (jax.nn.sigmoid, True),
    "reglu": (jax.nn.relu, True),
    "geglu": (jax.nn.gelu, True),
    "swiglu": (jax.nn.silu, True),
}


class FeedForward(eqx.Module):
    r"""The feed-forward half of a transformer layer, applied to every token alike.

    $$\text{FeedForward}(x) = W_\text{down}\, \phi(W_\text{up} x), \qquad\text{or, gated,}
      \qquad W_\text{down} \left(\phi(W_\text{gate} x) \odot W_\text{up} x\right)$$

    With a `block_size` the hidden layer exists for one block of tokens at a time,
    forward and backward, by [`eqx_attention.blockwise`][]: it is then recomputed in the
    backward pass, and memory for it does not grow with the length of the sequence. The
    numbers, dropout included, do not depend on `block_size`.

    !!! Example

        ```python
        import eqx_attention as eqa
        import jax.numpy as jnp
        import jax.random as jr

        ff = eqa.FeedForward(64, activation="swiglu", block_size=128, key=jr.key(0))
        y = ff(jnp.ones((1000, 64)))
        ```

    ??? cite

        [Blockwise Parallel Transformer for Large Context
        Models](https://arxiv.org/abs/2305.19370), and for the gated activations [GLU
        Variants Improve Transformer](https://arxiv.org/abs/2002.05202)

        ```bibtex
        @article{shazeer2020glu,
            author={Shazeer, Noam},
            title={{GLU} Variants Improve Transformer},
            journal={arXiv:2002.05202},
            year={2020},
        }
        ```
    """

    up_proj: eqx.nn.Linear
    gate_proj: eqx.nn.Linear | None
    down_proj: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)
    block_size: int | None = eqx.field(static=True)

    @jaxtyped(typechecker=beartype)
    def __init__(
        self,
        size: int,
        hidden_size: int | None = None,
        activation: str = "gelu",
        use_bias: bool = False,
        dropout_p: float | int = 0.0,
        block_size: int | None = None,
        dtype: Any = None,
        inference: bool = False,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `size`: The number of channels of a token, in and out.
        - `hidden_size`: The number of channels of the hidden layer. Defaults to
            `4 * size`.
        - `activation`: `"relu"`, `"gelu"` (by tanh), `"gelu_exact"` (by erf) or
            `"silu"`; or one of the gated `"glu"`, `"reglu"`, `"geglu"` and `"swiglu"`,
            which have a third matrix.
        - `use_bias`: Whether the linear maps have biases.
        - `dropout_p`: Dropout probability on the hidden layer.
        - `block_size`: How many tokens are computed at a time. Defaults to all.
        - `dtype`: The dtype of the parameters. Defaults to float32, or to float64 if
            JAX is in 64-bit mode.
        - `inference`: Whether to leave dropout out. May be toggled by
            `equinox.nn.inference_mode`.
        - `key`: A `jax.random.key` to initialise the parameters. (Keyword only
            argument.)

        **Raises:**

        A `ValueError` if a size is not positive, `dropout_p` is not in [0, 1), or
        `activation` is unknown.
        """
        self.size = size
        self.hidden_size = 4 * size if hidden_size is None else hidden_size
        self.activation = activation
        self.use_bias = use_bias
        self.block_size = block_size
        self.dropout = eqx.nn.Dropout(float(dropout_p), inference=inference)
        self._check_options()

        _, gated = _activations[activation]
        up_key, gate_key, down_key = jr.split(key, 3)
        linear = ft.partial(eqx.nn.Linear, use_bias=use_bias, dtype=dtype)
        self.up_proj = linear(size, self.hidden_size, key=up_key)
        self.gate_proj = linear(size, self.hidden_size, key=gate_key) if gated else None
        self.down_proj = linear(self.hidden_size, size, key=down_key)

    def __check_init__(self):
        self._check_options()
        _, gated = _activations[self.activation]
        check_linear(self, "up_proj", self.size, self.hidden_size)
        check_linear(self, "down_proj", self.hidden_size, self.size)
        if gated:
            check_linear(self, "gate_proj", self.size, self.hidden_size)
        elif self.gate_proj is not None:
            raise ValueError(
                f"FeedForward: activation {self.activation!r} has no gate, but gate_proj "
                "is given."
            )

    def _check_options(self):
        """What must hold before there are parameters."""
        check_positive(self, "size", "hidden_size")
        if self.block_size is not None:
            check_positive(self, "block_size")
        if self.activation not in _activations:
            known = ", ".join(repr(name) for name in _activations)
            raise ValueError(
                f"FeedForward: activation must be one of {known}; got {self.activation!r}."
            )
        check_dropout(self)

    @jax.named_scope("eqa.FeedForward")
    @jaxtyped(typechecker=beartype)
    def __call__(
        self,
        x: Float[Array, "seq size"],
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> Float[Array, "seq size"]:
        """**Arguments:**

        - `x`: The tokens, of shape `(seq, size)`. Use `jax.vmap` for batches.
        - `key`: A `jax.random.key` for dropout, of which each token gets its own.
            Unused if there is no dropout. (Keyword only argument.)
        - `inference`: Whether to leave dropout out. Defaults to what the module was
            made with, or set to by `equinox.nn.inference_mode`. (Keyword only
            argument.)

        **Returns:**

        An array of shape `(seq, size)`.

        **Raises:**

        A `TypeError` if `x` has a wrong rank, axis or dtype; a `ValueError` if there is
        dropout and `key` is missing.
        """
        check_channels(self, "x", x, self.size)
        inference = self.dropout.inference if inference is None else inference
        if inference or (isinstance(self.dropout.p, float) and self.dropout.p == 0):
            key = None
        elif key is None:
            raise ValueError(
                f"FeedForward: key is needed for dropout of {self.dropout.p}; pass "
                "key=..., or inference=True."
            )
        token = jax.tree_util.Partial(_token, self)
        if self.block_size is None:
            return tokenwise(token, x, jnp.arange(x.shape[0]), key)
        return blockwise(token, x, self.block_size, key=key)


def _token(ff: FeedForward, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
    activation, _ = _activations[ff.activation]
    hidden = ff.up_proj(x)
    if ff.gate_proj is None:
        hidden = activation(hidden)
    else:
        hidden = activation(ff.gate_proj(x)) * hidden
    hidden = ff.dropout(hidden, key=key, inference=key is None)
    return ff.down_proj(hidden)
