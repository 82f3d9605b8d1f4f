"""The masks, scores and shapes that cases are made of, each by a name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import eqx_attention as eqa


class Shape(NamedTuple):
    """The sizes of one call."""

    batch: tuple[int, ...]
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


SHAPES = {
    "one": Shape((), 1, 1, 1, 1, 1, 1),
    "one_query": Shape((2,), 1, 37, 4, 2, 8, 8),
    "one_key": Shape((2,), 5, 1, 2, 2, 4, 4),
    "square": Shape((2,), 16, 16, 4, 4, 8, 8),
    "primes": Shape((), 13, 29, 4, 2, 8, 5),
    "more_queries": Shape((1,), 31, 7, 6, 3, 4, 12),
    "one_kv_head": Shape((2,), 19, 23, 4, 1, 8, 8),
    "two_batch_axes": Shape((2, 3), 11, 17, 2, 1, 4, 6),
    "long": Shape((), 300, 300, 2, 1, 16, 16),
    "long_keys": Shape((2,), 67, 311, 2, 2, 8, 8),
    "blocks": Shape((1,), 128, 256, 2, 2, 16, 8),
}


#
# Masks
#


def _int(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, max(high, low) + 1))


def _ints(rng, low, high, shape):
    integers = np.asarray(rng.integers(low, max(high, low) + 1, shape))
    return jnp.asarray(integers.astype(np.int32))


def _bools(rng, share, shape):
    return jnp.asarray(rng.random(shape) < share)


def _sorted(x):
    return jnp.asarray(np.sort(np.asarray(x)))


def _segments(rng, s):
    if s.q_len == s.kv_len:
        return eqa.Segments(_sorted(_ints(rng, 0, 3, (*s.batch, s.q_len))))
    return eqa.Segments(
        _ints(rng, 0, 2, (*s.batch, s.q_len)),
        _sorted(_ints(rng, 0, 3, (*s.batch, s.kv_len))),
    )


def _left_padding(rng, s):
    first = rng.integers(0, s.kv_len, (*s.batch, 1))
    return eqa.Keys(jnp.asarray((np.arange(s.kv_len) >= first).astype(np.int32)))


def _parity(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return (q_pos + kv_pos + head) % 3 != 0


def _tagged(q_pos, kv_pos, head, q_feature, kv_feature, params):
    near = jnp.abs(q_pos - kv_pos) <= params["reach"]
    return near | (q_feature == kv_feature["tag"])


def _predicate_features(rng, s):
    return eqa.Predicate(
        _tagged,
        q_features=_ints(rng, 0, 3, (*s.batch, s.q_len)),
        kv_features={"tag": _ints(rng, 0, 3, (*s.batch, s.kv_len))},
        params={"reach": _ints(rng, 0, s.kv_len // 4, ())},
    )


MASKS: dict[str, Callable[[np.random.Generator, Shape], Any]] = {
    "full": lambda rng, s: eqa.Full(),
    "nothing": lambda rng, s: ~eqa.Full(),
    "causal": lambda rng, s: eqa.Causal(),
    "causal_offset": lambda rng, s: eqa.Causal(_int(rng, -4, 4)),
    "causal_array": lambda rng, s: eqa.Causal(_ints(rng, -4, 4, s.batch)),
    "window": lambda rng, s: eqa.SlidingWindow(
        _int(rng, 0, s.kv_len // 3), _int(rng, 0, s.kv_len // 4)
    ),
    "window_left": lambda rng, s: eqa.SlidingWindow(_int(rng, 0, s.kv_len // 3)),
    "window_right": lambda rng, s: eqa.SlidingWindow(None, _int(rng, 0, 5)),
    "window_unbounded": lambda rng, s: eqa.SlidingWindow(_int(rng, 0, 5), None),
    "window_arrays": lambda rng, s: eqa.SlidingWindow(
        _ints(rng, 0, s.kv_len // 3, s.batch), _ints(rng, 0, s.kv_len // 4, ())
    ),
    "prefix": lambda rng, s: eqa.Prefix(_int(rng, 0, s.kv_len)),
    "prefix_array": lambda rng, s: eqa.Prefix(_ints(rng, 0, s.kv_len, ())),
    "prefix_lm": lambda rng, s: eqa.PrefixLM(_int(rng, 0, s.kv_len // 2)),
    "chunked": lambda rng, s: eqa.Chunked(_int(rng, 1, s.kv_len // 2)),
    "chunked_array": lambda rng, s: eqa.Chunked(_ints(rng, 1, s.kv_len // 2, ())),
    "segments": _segments,
    "padding": lambda rng, s: eqa.Padding(_ints(rng, 0, s.kv_len, s.batch)),
    "padding_both": lambda rng, s: eqa.Padding(
        _ints(rng, 0, s.kv_len, s.batch), _ints(rng, 0, s.q_len, s.batch)
    ),
    "keys": lambda rng, s: eqa.Keys(_bools(rng, 0.6, (*s.batch, s.kv_len))),
    "keys_left": _left_padding,
    "keys_both": lambda rng, s: eqa.Keys(
        _bools(rng, 0.6, (s.kv_len,)), _bools(rng, 0.7, (*s.batch, s.q_len))
    ),
    "dense": lambda rng, s: eqa.Dense(
        _bools(rng, 0.6, (*s.batch, s.q_heads, s.q_len, s.kv_len))
    ),
    "dense_heads": lambda rng, s: eqa.Dense(
        _bools(rng, 0.6, (s.q_heads, s.q_len, s.kv_len))
    ),
    "dense_sparse": lambda rng, s: eqa.Dense(
        _bools(rng, 1 / s.kv_len, (*s.batch, 1, s.q_len, s.kv_len))
    ),
    "dense_keys": lambda rng, s: _bools(rng, 0.6, (*s.batch, 1, 1, s.kv_len)),
    "predicate": lambda rng, s: eqa.Predicate(_parity),
    "predicate_features": _predicate_features,
}
"""Each mask, by a name, as a function of a generator of NumPy and a shape."""


#
# Scores
#


def _reals(rng, shape, dtype, low=-1.0, high=1.0):
    return jnp.asarray(np.asarray(rng.uniform(low, high, shape)).astype(dtype))


def _distance(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return 1.25 * logit - 0.05 * jnp.abs(q_pos - kv_pos).astype(logit.dtype)


def _near(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return jnp.where(jnp.abs(q_pos - kv_pos) <= 9, logit, -jnp.inf)


def _learned(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    gate = (q_feature * kv_feature["gate"]).astype(logit.dtype)
    offset = jnp.take(params["offset"], head).astype(logit.dtype)
    weight = params["weight"].astype(logit.dtype)
    return weight * logit + jnp.sin(gate) + offset * gate


def _score_fn_features(rng, s, dtype):
    return eqa.ScoreFn(
        _learned,
        q_features=_reals(rng, (*s.batch, s.q_len), dtype),
        kv_features={"gate": _reals(rng, (s.kv_len,), dtype)},
        params={
            "weight": _reals(rng, (), dtype, 0.5, 1.5),
            "offset": _reals(rng, (s.q_heads,), dtype),
        },
    )


def _bias_with_holes(rng, s, dtype):
    shape = (*s.batch, 1, s.q_len, s.kv_len)
    values = rng.uniform(-1, 1, shape)
    values[rng.random(shape) < 0.4] = -np.inf
    return eqa.Bias(jnp.asarray(values.astype(dtype)))


SCORES: dict[str, Callable[[np.random.Generator, Shape, Any], Any]] = {
    "alibi": lambda rng, s, dtype: eqa.ALiBi(_reals(rng, (s.q_heads,), dtype, 0, 0.3)),
    "soft_cap": lambda rng, s, dtype: eqa.SoftCap(1.5),
    "soft_cap_array": lambda rng, s, dtype: eqa.SoftCap(_reals(rng, (), dtype, 1, 2)),
    "relative_bias": lambda rng, s, dtype: eqa.RelativeBias(
        _reals(rng, (16, s.q_heads), dtype), bidirectional=True, max_distance=64
    ),
    "relative_bias_causal": lambda rng, s, dtype: eqa.RelativeBias(
        _reals(rng, (11, s.q_heads), dtype), bidirectional=False, max_distance=20
    ),
    "bias": lambda rng, s, dtype: eqa.Bias(
        _reals(rng, (*s.batch, s.q_heads, s.q_len, s.kv_len), dtype)
    ),
    "bias_heads": lambda rng, s, dtype: eqa.Bias(
        _reals(rng, (s.q_heads, s.q_len, s.kv_len), dtype)
    ),
    "bias_keys": lambda rng, s, dtype: eqa.Bias(
        _reals(rng, (*s.batch, 1, 1, s.kv_len), dtype)
    ),
    "bias_queries": lambda rng, s, dtype: eqa.Bias(
        _reals(rng, (s.q_heads, s.q_len, 1), dtype)
    ),
    "score_fn": lambda rng, s, dtype: eqa.ScoreFn(_distance),
    "score_fn_features": _score_fn_features,
    "bias_with_holes": _bias_with_holes,
    "score_fn_with_holes": lambda rng, s, dtype: eqa.ScoreFn(_near),
}
"""Each score, by a name, as a function of a generator, a shape and a dtype.

Those that emit minus infinity are last, and are to be last in a tuple.
"""
