from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .._axes import axes
from .._function import (
    arguments_of,
    check_function,
    example_arguments,
    features,
    own_params,
    trace,
)
from .._static import pdoc
from .._tokens import Bounds, Tile
from .base import AbstractMask, Summary


class Predicate(AbstractMask):
    """Any elementwise function of a pair. FlexAttention's `mask_mod`.

    ??? cite

        [Flex Attention: A Programming Model for Generating Optimized Attention
        Kernels](https://arxiv.org/abs/2412.05496)

        ```bibtex
        @article{dong2024flex,
            title={Flex Attention: A Programming Model for Generating Optimized
                   Attention Kernels},
            author={Dong, Juechu and Feng, Boyuan and Guessous, Driss and Liang, Yanbo
                    and He, Horace},
            journal={arXiv:2412.05496},
            year={2024}
        }
        ```
    """

    q_features: PyTree[Array] = axes("batch query")
    kv_features: PyTree[Array] = axes("batch key")
    params: PyTree = axes("")
    fn: Callable = eqx.field(static=True)
    fn_summary: Callable | None = eqx.field(static=True)

    def __init__(
        self,
        fn: Callable[..., Any],
        q_features: PyTree[Array] = (),
        kv_features: PyTree[Array] = (),
        params: Any = (),
        summary: Callable[..., Any] | None = None,
    ):
        """**Arguments:**

        - `fn`: `fn(q_pos, kv_pos, head, q_feature, kv_feature, params)` returns booleans:
            whether the pair is visible. Written in `jax.numpy`, elementwise: the arguments
            but `params` are arrays that broadcast to the tile that is looked at.
        - `q_features`, `kv_features`: pytrees of arrays `"*#batch q_len"` and
            `"*#batch kv_len"`, by index, whose values of each token reach `fn`.
        - `params`: a pytree that `fn` gets as it is.
        - `summary`: optional, so that tiles are skipped: `summary(q_pos, kv_pos, q_feature,
            kv_feature, params)`, in which each argument but `params` is a pair of the least
            and the greatest in each tile, returns a pair of booleans: whether some pair of
            the tile may be visible, and whether every pair surely is. Without it, each
            tile is evaluated (see also [`eqx_attention.block_mask`][]).

        Compiled code is reused where `fn` is the same object: a function defined anew for
        each call, a lambda for instance, is compiled anew for each call.

        **Raises:** `ValueError` if `fn` captures arrays; `TypeError` if it does not return
            booleans that broadcast to the tile.
        """
        self.fn = fn
        self.q_features = features("Predicate(q_features)", q_features)
        self.kv_features = features("Predicate(kv_features)", kv_features)
        self.params = params
        self.fn_summary = summary
        arguments = example_arguments(self.q_features, self.kv_features, params)
        check_function("Predicate", fn, arguments, jnp.bool_)
        if summary is not None:
            q_pos, kv_pos, _, q_feature, kv_feature, params = arguments
            ranges = tuple((x, x) for x in (q_pos, kv_pos, q_feature, kv_feature))
            out = trace("Predicate(summary)", summary, (*ranges, params))
            if not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(
                    f"Predicate(summary): expected it to return a pair, got {out}."
                )

    def __check_init__(self):
        features("Predicate(q_features)", self.q_features)
        features("Predicate(kv_features)", self.kv_features)

    __pdoc__ = pdoc

    def visible(self, tile: Tile) -> Bool[Array, "#head #query #key"]:
        visible = jnp.asarray(self.fn(*arguments_of(self, tile)))
        return jnp.broadcast_to(visible, jnp.broadcast_shapes(visible.shape, (1, 1, 1)))

    def summary(self, upper: Any, bounds: Bounds) -> Summary:
        if self.fn_summary is None:
            yes = jnp.ones((1, 1, 1), bool)
            return Summary(yes, ~yes)
        low, high = bounds
        some, every = self.fn_summary(
            (low.q_position, high.q_position),
            (low.kv_position, high.kv_position),
            (self.q_features, upper.q_features),
            (self.kv_features, upper.kv_features),
            own_params(self.params),
        )
        return Summary(jnp.asarray(some), jnp.asarray(every))
