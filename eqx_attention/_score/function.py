"""Scores that are functions of the logit."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._axes import axes
from .._function import arguments_of, check_function, example_arguments, features
from .._static import AnyArray, is_array, is_number, pdoc, Static, static_or_leaf, unwrap
from .._tokens import Tile
from .base import AbstractScore


class SoftCap(AbstractScore):
    r"""Keeps logits within $\pm\text{cap}$.

    That is, $\text{cap} \cdot \tanh(\text{logit} / \text{cap})$.

    ??? cite

        [Gemma 2: Improving Open Language Models at a Practical
        Size](https://arxiv.org/abs/2408.00118)

        ```bibtex
        @article{gemma2024,
            title={Gemma 2: Improving Open Language Models at a Practical Size},
            author={{Gemma Team}},
            journal={arXiv:2408.00118},
            year={2024}
        }
        ```
    """

    _cap: Static | Float[Array, ""] = axes("")

    def __init__(self, cap: float | int | Float[AnyArray, ""]):
        """**Arguments:**

        - `cap`: the bound, more than 0. A Python number, which is static, or a
            differentiable array of no axis.

        **Raises:** `ValueError` if a Python number is not positive and finite.
        """
        self._cap = static_or_leaf(cap)

    def __check_init__(self):
        _check_cap(self._cap)

    @property
    def cap(self) -> Any:
        return unwrap(self._cap)

    __pdoc__ = pdoc

    def __call__(
        self, logit: Float[Array, "head query key"], tile: Tile
    ) -> Float[Array, "head query key"]:
        cap = self.cap
        if is_array(cap):
            cap = cap.reshape(1, 1, 1).astype(logit.dtype)
        return cap * jnp.tanh(logit / cap)


def _check_cap(cap):
    if isinstance(cap, Static):
        if not is_number(cap.value):
            raise TypeError(f"SoftCap(cap): expected a number, got {cap.value!r}.")
        if not 0 < cap.value < float("inf"):
            raise ValueError(f"SoftCap(cap): expected a number > 0, got {cap.value}.")
    elif not is_array(cap):
        got = type(cap).__name__
        raise TypeError(f"SoftCap(cap): expected a number or an array, got {got}.")
    elif cap.ndim != 0 or not jnp.issubdtype(cap.dtype, jnp.floating):
        raise TypeError(
            f"SoftCap(cap): expected a floating-point array of no axis, got {cap.dtype} "
            f"of shape {cap.shape}."
        )


class ScoreFn(AbstractScore):
    """Any elementwise function of the logit and its pair. FlexAttention's `score_mod`.

    See [`eqx_attention.Predicate`][], which is the same for masks.
    """

    q_features: PyTree[Array] = axes("batch query")
    kv_features: PyTree[Array] = axes("batch key")
    params: PyTree = axes("")
    fn: Callable = eqx.field(static=True)

    def __init__(
        self,
        fn: Callable[..., Any],
        q_features: PyTree[Array] = (),
        kv_features: PyTree[Array] = (),
        params: Any = (),
    ):
        """**Arguments:**

        - `fn`: `fn(logit, q_pos, kv_pos, head, q_feature, kv_feature, params)` returns the
            new logit. Written in `jax.numpy`, elementwise: the arguments but `params` are
            arrays that broadcast to the tile that is looked at.
        - `q_features`, `kv_features`: pytrees of arrays `"*#batch q_len"` and
            `"*#batch kv_len"`, by index, whose values of each token reach `fn`.
        - `params`: a pytree that `fn` gets as it is.

        All floating-point arrays are differentiable. Compiled code is reused where `fn` is
        the same object: a function defined anew for each call is compiled anew.

        **Raises:** `ValueError` if `fn` captures arrays; `TypeError` if it does not return
            floating-point numbers that broadcast to the tile.
        """
        self.fn = fn
        self.q_features = features("ScoreFn(q_features)", q_features)
        self.kv_features = features("ScoreFn(kv_features)", kv_features)
        self.params = params
        logit = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
        arguments = example_arguments(self.q_features, self.kv_features, params)
        check_function("ScoreFn", fn, (logit, *arguments), jnp.floating)

    def __check_init__(self):
        features("ScoreFn(q_features)", self.q_features)
        features("ScoreFn(kv_features)", self.kv_features)

    __pdoc__ = pdoc

    def __call__(
        self, logit: Float[Array, "head query key"], tile: Tile
    ) -> Float[Array, "head query key"]:
        out = self.fn(logit, *arguments_of(self, tile))
        return jnp.broadcast_to(jnp.asarray(out, logit.dtype), logit.shape)
