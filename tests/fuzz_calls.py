"""Calls of public functions with arguments of any shape, dtype and kind.

They are traced, not compiled: what is wrong with an argument is said before anything is
computed.
"""

import traceback
from typing import Any

import eqx_attention as eqa
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import TypeCheckError


# What the docstrings say: `TypeError` for a wrong rank, axis or dtype (a part of it is a
# `ValueError` too), `ValueError` for a wrong value, and `UnsupportedError` for what a
# mechanism does not do.
DOCUMENTED = (TypeError, ValueError, eqa.UnsupportedError)

_KEY = jr.key(0)
_DTYPES = ("float32", "float32", "float32", "bfloat16", "float16", "int32", "uint8", "bool")


@st.composite
def _array(draw, *shapes: tuple[int, ...], dtypes=_DTYPES) -> Any:
    """Mostly of one of these shapes, sometimes with a change in an axis or the rank."""
    shape = list(draw(st.sampled_from(shapes)))
    match draw(st.integers(0, 9)):
        case 0 if shape:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 4))
        case 1 if shape:
            shape.pop(draw(st.integers(0, len(shape) - 1)))
        case 2:
            shape.insert(0, draw(st.integers(0, 3)))
    make = draw(st.sampled_from([jnp.ones, jnp.ones, jnp.ones, jnp.zeros, np.ones]))
    return make(tuple(shape), draw(st.sampled_from(dtypes)))


# What no argument of an attention function is meant to be, or only few are.
_odd = st.sampled_from(
    [None, True, -1, 0, 3, 2.5, float("nan"), -(2**40), "auto", "end", "x", (), (1, 2)]
    + [[], {}, object(), _KEY, jr.split(_KEY), eqa.Causal(), eqa.SoftCap(2.0), jnp.int8]
    + [jnp.ones(3), np.ones((2, 2), bool), eqa.Sharding(sequence="sp"), 1j]
)


def _or_odd(strategy: Any) -> Any:
    return st.integers(0, 12).flatmap(lambda n: strategy if n else _odd)


_query = _array((5, 4, 8), (5, 4, 8), (2, 5, 4, 8), dtypes=_DTYPES[:6])
_keys = _array((7, 2, 8), (7, 4, 8), (2, 7, 2, 8), dtypes=_DTYPES[:6])
_ids = _array((7,), (5,), (2, 7), dtypes=("int32", "int32", "uint8", "bool", "float32"))
_numbers = _array((), (4,), (2,), dtypes=("float32", "float32", "bfloat16", "int32"))
_pairs = _array((5, 7), (4, 5, 7), (2, 1, 5, 7), dtypes=("bool", "bool", "float32"))
_integer = st.one_of(st.integers(-3, 9), _array((), (2,), dtypes=("int32", "float32")))


def _of(fn: Any, *required: Any, **optional: Any) -> Any:
    """`(fn, arguments, named arguments)`, of which each may be odd or left out."""
    named = st.fixed_dictionaries(
        {}, optional={name: _or_odd(x) for name, x in optional.items()}
    )
    return st.tuples(st.just(fn), st.tuples(*map(_or_odd, required)), named)


class _Built:
    """A value whose making is a part of the call."""

    def __init__(self, fn: Any, arguments: tuple, named: dict[str, Any]):
        self.parts = (fn, arguments, named)

    def __repr__(self) -> str:
        fn, arguments, named = self.parts
        return f"{getattr(fn, '__name__', fn)}(*{arguments}, **{named})"


def call(fn: Any, arguments: tuple, named: dict[str, Any]) -> Any:
    """Makes what is to be made, and calls."""

    def made(x: Any) -> Any:
        return call(*x.parts) if isinstance(x, _Built) else x

    return fn(*map(made, arguments), **{name: made(x) for name, x in named.items()})


_masks = st.one_of(
    _of(eqa.Causal, _integer),
    _of(eqa.SlidingWindow, _integer, _integer),
    _of(eqa.Prefix, _integer),
    _of(eqa.PrefixLM, _integer),
    _of(eqa.Chunked, _integer),
    _of(eqa.Segments, _ids, _ids),
    _of(eqa.Padding, _integer, q_lengths=_integer),
    _of(eqa.Keys, _ids, q_valid=_ids),
    _of(eqa.Dense, _pairs),
    _of(eqa.Segments.from_lengths, st.lists(st.integers(-1, 4), max_size=4)),
)
_scores = st.one_of(
    _of(eqa.ALiBi, _numbers),
    _of(eqa.ALiBi.standard, _integer),
    _of(eqa.SoftCap, st.one_of(st.floats(-2, 9), _numbers)),
    _of(eqa.RelativeBias, _array((8, 4), dtypes=_DTYPES), bidirectional=st.booleans()),
    _of(eqa.Bias, _pairs),
)
_mask = _masks.map(lambda x: _Built(*x)) | _pairs
_score = _scores.map(lambda x: _Built(*x))
_positions = st.sampled_from(["start", "end", "middle"]) | _ids
_mechanism = st.sampled_from(
    ["auto", "vanilla", "blockwise", "decode", "flash", "cudnn", "ring", "ulysses"]
    + ["flash_attn2", "", eqa.Blockwise(2, 3), eqa.Vanilla, eqa.Ring()]
)
_rate = st.sampled_from([0.0, 0.5, 1.0, -0.1, 0, 1, float("inf")])
_options = dict(
    mask=_mask,
    score=_score,
    sinks=_numbers,
    scale=st.floats(0, 2) | _numbers,
    q_positions=_positions,
    kv_positions=_ids,
    precision=st.sampled_from([None, "highest", "x", jax.lax.Precision.HIGH]),
)
_dropped = dict(dropout=_rate, key=st.just(_KEY), inference=st.booleans())
_layer = eqa.MultiheadAttention(4, 8, num_kv_heads=2, key=_KEY)
_latent = eqa.MultiheadLatentAttention(2, 8, kv_rank=6, q_rank=4, key=_KEY)
_tokens = _array((5, 8), (5, 8), (7, 8), dtypes=_DTYPES[:6])
_cache = eqa.StaticCache.init(9, 2, 8, dtype=jnp.float32)
_rolling = eqa.RollingCache.init(4, 2, 8)
_size = st.integers(-1, 9)

calls = st.one_of(
    _of(eqa.attend, _query, _keys, _keys, **_options, **_dropped, mechanism=_mechanism),
    _of(eqa.attend, _query, _keys, _keys, mask=_mask, score=_score),
    _of(eqa.attention_weights, _query, _keys, **_options),
    _of(eqa.Attention(mask=eqa.Causal()), _query, _keys, _keys, mask=_mask, sinks=_numbers),
    _of(eqa.Attention, _mechanism, mask=_mask, score=_score, dropout=_rate),
    _of(eqa.AttentionConfig, _mechanism, mask=_mask, score=_score, dropout=_rate),
    _masks,
    _scores,
    _of(eqa.block_mask, _mask, _size, _size, block_q=_size, block_k=_size),
    _of(eqa.dropout_mask, st.just(_KEY), _rate, st.just((2,)), _size, _size, _size),
    _of(eqa.merge, st.lists(st.tuples(_query, _array((5, 4), (2, 5, 4))), max_size=3)),
    _of(eqa.MultiheadAttention, _size, _size, num_kv_heads=_size, key=st.just(_KEY)),
    _of(_layer, _tokens, _tokens, _tokens, mask=_mask, score=_score, sinks=_numbers),
    _of(_latent, _tokens, mask=_mask, q_positions=_positions),
    _of(eqa.FeedForward(8, block_size=2, key=_KEY), _tokens, key=st.just(_KEY)),
    _of(eqa.RotaryEmbedding, _size, theta=st.floats(-1, 9), fraction=st.floats(0, 2)),
    _of(eqa.RotaryEmbedding(8), _query, _ids),
    _of(eqa.StaticCache.init, _size, _size, _size, batch=st.just((2,))),
    _of(_cache.append, _keys, _keys, lengths=_integer),
    _of(_cache.attend, _query, mask=_mask, score=_score, sinks=_numbers),
    _of(_rolling.append, _keys, _keys, lengths=_integer),
    _of(eqa.to_layout, _query, _size, st.sampled_from(["zigzag", "x"]), axis=_size),
    _of(eqa.Blockwise, _size, block_k=_size),
    _of(eqa.Sharding, st.sampled_from(["a", ("a", "b")]), sequence=st.just("a")),
    _of(eqa.AttentionConfig.from_json, st.text(max_size=8)),
)


def outcome(fn: Any, arguments: tuple, named: dict[str, Any]) -> str:
    """What came of the call: `"returned"`, or the name of a documented error.

    **Raises:** `AssertionError` if the error says nothing, or was found by other than this
    package and its checks of types; and every error that is not documented.
    """
    try:
        jax.eval_shape(lambda: (call(fn, arguments, named), None)[1])
    except DOCUMENTED as error:
        assert str(error).strip(), "an error that says nothing"
        if not isinstance(error, TypeCheckError):
            frames = traceback.extract_tb(error.__traceback__)
            # The last two: Python itself, of a missing argument.
            ours = ("/eqx_attention/", "/equinox/_module/", "/fuzz_calls.py", "/inspect.py")
            found_by = frames[-1].filename
            shown = "".join(traceback.format_exception(error))
            assert any(name in found_by for name in ours), shown
        return type(error).__name__
    return "returned"
