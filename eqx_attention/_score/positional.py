"""Scores that go by the positions of tokens."""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._arguments import as_array
from .._axes import axes
from .._static import AnyArray
from .._tokens import Bounds, Tile
from .base import AbstractBoundedScore, AbstractScore


# A table of distances is made up to this one.
_FARTHEST = 2**11


class ALiBi(AbstractBoundedScore):
    r"""Adds $-\text{slope} \cdot |i - j|$ to the logit.

    In long sequences, most pairs are so far apart that their weights round to nothing.
    [`eqx_attention.Blockwise`][] and [`eqx_attention.Flash`][] find tiles of which that is
    sure, and do not compute them, where this is the only score: with the slopes of the
    paper for 16 heads, and 8,192 tokens, that is more than half of all tiles.

    ??? cite

        [Train Short, Test Long: Attention with Linear Biases Enables Input Length
        Extrapolation](https://arxiv.org/abs/2108.12409)

        ```bibtex
        @inproceedings{press2022train,
            title={Train Short, Test Long: Attention with Linear Biases Enables Input
                   Length Extrapolation},
            author={Press, Ofir and Smith, Noah A. and Lewis, Mike},
            booktitle={International Conference on Learning Representations},
            year={2022}
        }
        ```
    """

    slopes: Float[Array, " q_heads"] = axes("head")

    def __init__(self, slopes: Float[AnyArray, " q_heads"]):
        """**Arguments:**

        - `slopes`: one slope a query head. They are differentiable.

        **Raises:** `TypeError` if it is not a floating-point array of one axis.
        """
        self.slopes = _slopes(slopes)

    def __check_init__(self):
        _slopes(self.slopes)

    @staticmethod
    def standard(num_heads: int) -> "ALiBi":
        """The slopes of the paper: for $n$ heads, a geometric sequence that starts at
        $2^{-8/n}$, with that as its ratio. Between powers of two, the sequence of the lower
        one is followed by every other slope of the higher one.

        **Raises:** `TypeError` if `num_heads` is not a Python integer; `ValueError` if it
            is less than one.
        """
        if isinstance(num_heads, bool) or not isinstance(num_heads, int):
            raise TypeError(
                f"ALiBi.standard(num_heads): expected an integer, got {num_heads!r}."
            )
        if num_heads < 1:
            raise ValueError(f"ALiBi.standard(num_heads): expected >= 1, got {num_heads}.")
        lower = 2 ** math.floor(math.log2(num_heads))
        slopes = [2.0 ** (-8 * (i + 1) / lower) for i in range(lower)]
        finer = [2.0 ** (-8 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
        return ALiBi(jnp.asarray((slopes + finer)[:num_heads], jnp.float32))

    def __call__(
        self, logit: Float[Array, "head query key"], tile: Tile
    ) -> Float[Array, "head query key"]:
        distance = jnp.abs(tile.q_position - tile.kv_position)
        return logit - self.slopes.astype(logit.dtype) * distance.astype(logit.dtype)

    def most(
        self, upper: Any, bounds: Bounds
    ) -> Float[Array, "#head #q_blocks #kv_blocks"]:
        # Slopes belong to no token, so `self` and `upper` hold the same.
        low, high = bounds
        nearest = jnp.maximum(
            low.kv_position - high.q_position, low.q_position - high.kv_position
        )
        farthest = jnp.maximum(
            high.kv_position - low.q_position, high.q_position - low.kv_position
        )
        near, far = (
            -self.slopes * x.astype(self.slopes.dtype)
            for x in (jnp.maximum(nearest, 0), farthest)
        )
        return jnp.maximum(near, far)  # the far ones where a slope is negative


class RelativeBias(AbstractScore):
    """Adds a learned bias for each bucket of distances and each head. T5's.

    Half of the buckets hold one distance each; the others grow logarithmically up to
    `max_distance`, beyond which all distances share the last. If bidirectional, the first
    half of all buckets is for keys at or before the query, the second for those after it.

    ??? cite

        [Exploring the Limits of Transfer Learning with a Unified Text-to-Text
        Transformer](https://arxiv.org/abs/1910.10683)

        ```bibtex
        @article{raffel2020exploring,
            title={Exploring the Limits of Transfer Learning with a Unified Text-to-Text
                   Transformer},
            author={Raffel, Colin and Shazeer, Noam and Roberts, Adam and Lee, Katherine
                    and Narang, Sharan and Matena, Michael and Zhou, Yanqi and Li, Wei
                    and Liu, Peter J.},
            journal={Journal of Machine Learning Research},
            volume={21},
            year={2020}
        }
        ```
    """

    table: Float[Array, "buckets q_heads"] = axes("rest head")
    bidirectional: bool = eqx.field(static=True)
    max_distance: int = eqx.field(static=True)

    def __init__(
        self,
        table: Float[AnyArray, "buckets q_heads"],
        bidirectional: bool = True,
        max_distance: int = 128,
    ):
        """**Arguments:**

        - `table`: the bias of each bucket and query head. It is differentiable.
        - `bidirectional`: whether keys after the query have buckets of their own;
            otherwise they share that of distance 0. Default `True`.
        - `max_distance`: the distance from which on all share a bucket. Default 128.

        **Raises:** `TypeError` if `table` is not a floating-point array of two axes;
            `ValueError` if there are too few buckets or `max_distance` is not beyond the
            distances that have a bucket of their own.
        """
        self.table = _table(table)
        self.bidirectional = bidirectional
        self.max_distance = max_distance

    def __check_init__(self):
        num_buckets = _table(self.table).shape[0]
        exact = num_buckets // (4 if self.bidirectional else 2)
        if exact < 1 or (self.bidirectional and num_buckets % 2):
            raise ValueError(
                "RelativeBias(table): expected an even number of at least 4 buckets if "
                f"bidirectional, else at least 2; got {num_buckets}."
            )
        if self.max_distance <= exact:
            raise ValueError(
                f"RelativeBias(max_distance): expected more than {exact}, the number of "
                f"distances with a bucket of their own; got {self.max_distance}."
            )

    def buckets(self, distance: Int[Array, "..."], num_buckets: int) -> Int[Array, "..."]:
        """The bucket of each distance `kv - q`."""
        base = 0
        if self.bidirectional:
            num_buckets //= 2
            base = jnp.where(distance > 0, num_buckets, 0).astype(jnp.int32)
            distance = jnp.abs(distance)
        else:
            distance = jnp.maximum(-distance, 0)
        exact = num_buckets // 2
        # The first distance of each logarithmic bucket, found once, in float64: comparing
        # integers leaves no rounding at the borders between buckets.
        ratio = self.max_distance / exact
        firsts = [
            math.ceil(exact * ratio ** (n / (num_buckets - exact)) - 1e-9)
            for n in range(1, num_buckets - exact)
        ]
        bucket = jnp.minimum(distance, exact)
        for first in firsts:
            bucket = bucket + (distance >= first).astype(jnp.int32)
        return base + bucket

    def __call__(
        self, logit: Float[Array, "head query key"], tile: Tile
    ) -> Float[Array, "head query key"]:
        num_buckets, far = self.table.shape[-1], self.max_distance
        table = self.table.reshape(-1, num_buckets).astype(logit.dtype)
        distance = (tile.kv_position - tile.q_position)[0]
        if far > _FARTHEST:
            return logit + table[:, self.buckets(distance, num_buckets)]
        # Looking up a distance takes a fraction of what finding its bucket does.
        near = jnp.arange(-far, (far if self.bidirectional else 0) + 1, dtype=jnp.int32)
        table = table[:, self.buckets(near, num_buckets)]
        return logit + jnp.take(table, distance + far, axis=1, mode="clip")


def _slopes(x) -> Array:
    return as_array("ALiBi(slopes)", x, "floating-point numbers", "q_heads")


def _table(x) -> Array:
    return as_array("RelativeBias(table)", x, "floating-point numbers", "buckets q_heads")
