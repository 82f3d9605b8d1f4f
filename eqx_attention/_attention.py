"""The verb, and the module that holds its options."""

from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from beartype import beartype as typechecker
from jaxtyping import Array, Bool, Float, Int, jaxtyped, PRNGKeyArray

from ._config import AttentionConfig
from ._keys import Keys
from ._mask import AbstractMask, Full
from ._mechanism import AbstractMechanism, attention, Vanilla
from ._options import (
    as_dropout,
    as_dtype,
    as_mask,
    as_mechanism,
    as_precision,
    as_scale,
    as_scores,
    both_masks,
    check_operands,
    check_options,
    check_positions,
    check_unsharded,
    MECHANISMS,
    platform_of,
)
from ._request import Call, check_supported, request_of, with_sinks
from ._score import AbstractScore
from ._static import pdoc, Static, unwrap


_Query = Float[Array, "*batch q_len q_heads head_dim"]
_Key = Float[Keys, "*batch kv_len kv_heads head_dim"]
_Value = Float[Keys, "*batch kv_len kv_heads value_dim"]
_Mask = AbstractMask | Bool[Array, "..."] | Bool[np.ndarray, "..."]
_Score = AbstractScore | tuple[AbstractScore, ...] | list[AbstractScore]
_Sinks = Float[Array, " q_heads"] | None
_Scale = None | float | int | np.generic | Float[Array, "..."]
_QPositions = str | Int[Array, "..."] | Int[np.ndarray, "..."]
_KVPositions = None | Int[Array, "..."] | Int[np.ndarray, "..."]
_Out = Float[Array, "*batch q_len q_heads value_dim"]
_Lse = Float[Array, "*batch q_len q_heads"]
# Which of the two is a matter of `return_lse`; checked when called, free to a type checker.
if TYPE_CHECKING:
    _Result = Any
else:
    _Result = _Out | tuple[_Out, _Lse]


@jaxtyped(typechecker=typechecker)
def attend(
    query: _Query,
    key_: _Key,
    value: _Value,
    *,
    mask: _Mask = Full(),
    score: _Score = (),
    sinks: _Sinks = None,
    scale: _Scale = None,
    dropout: float | int = 0.0,
    key: PRNGKeyArray | None = None,
    inference: bool = False,
    q_positions: _QPositions = "start",
    kv_positions: _KVPositions = None,
    precision: Any = None,
    mechanism: str | AbstractMechanism = "auto",
    sharding: Any = None,
    mesh: Any = None,
    return_lse: bool = False,
) -> _Result:
    r"""Scaled dot-product attention.

    In order: $s = \text{scale} \cdot q k^\intercal$; the scores; the mask; softmax over
    keys and sinks; dropout; the weighted sum of values. Statistics and sums are taken in at
    least float32.

    A row that sees no key gives 0, a log-sum-exp of $-\infty$ (with sinks: the sink's
    logit), and no gradient. Keys that are not visible may hold NaN.

    **Arguments:**

    - `query`: `"*batch q_len q_heads head_dim"`. Any number of batch axes, or none.
    - `key_`: `"*batch kv_len kv_heads head_dim"`, an array or
        [`eqx_attention.AbstractKeys`][]. Query head `h` reads key head
        `h // (q_heads // kv_heads)`.
    - `value`: `"*batch kv_len kv_heads value_dim"`. As keys, arrays or as they are stored.
    - `mask`: which pairs are visible: an [`eqx_attention.AbstractMask`][], or a boolean
        array that broadcasts against `"*batch q_heads q_len kv_len"`. Default: all.
    - `score`: an [`eqx_attention.AbstractScore`][] or a tuple, which applies in order.
    - `sinks`: one logit a query head, which joins the softmax and has no value.
    - `scale`: a number, or an array of shape `()` or `(q_heads,)`. Default
        `head_dim ** -0.5`.
    - `dropout`: the probability, in [0, 1), of a weight to be dropped. Kept ones are scaled
        by `1 / (1 - dropout)`.
    - `key`: a PRNG key for dropout. Batch element `b` uses `fold_in(key, b)`, once for each
        batch axis; see [`eqx_attention.dropout_mask`][].
    - `inference`: if `True`, there is no dropout.
    - `q_positions`: `"start"` counts queries from 0, `"end"` lines the last query up with
        the last key, and an integer array `"*#batch q_len"` is taken as it is.
    - `kv_positions`: an integer array `"*#batch kv_len"`. Default: 0, 1, 2, …
    - `precision`: a `jax.lax.Precision` or its name, for both matrix products. Default:
        that of JAX.
    - `mechanism`: an [`eqx_attention.AbstractMechanism`][], or its name in lower case.
    - `sharding`, `mesh`: must be `None` in this version.
    - `return_lse`: whether to return the log-sum-exp too.

    **Returns:**

    `out`, of shape `"*batch q_len q_heads value_dim"` in the dtype of the query; or
    `(out, lse)`, with `lse` of shape `"*batch q_len q_heads"` in float32 (float64 for
    float64 inputs), differentiable too.

    **Raises:** `TypeError` for a wrong rank, axis or dtype; `ValueError` for a wrong value;
    [`eqx_attention.UnsupportedError`][] for what the mechanism does not do.
    """
    check_unsharded(sharding, mesh)
    call = _call(
        query,
        key_,
        value,
        mask=mask,
        score=score,
        sinks=sinks,
        scale=scale,
        dropout=dropout,
        key=key,
        inference=inference,
        q_positions=q_positions,
        kv_positions=kv_positions,
        precision=precision,
    )
    out, lse = _run(as_mechanism(mechanism), call)
    return (out, lse) if return_lse else out


@jaxtyped(typechecker=typechecker)
def attention_weights(
    query: _Query,
    key_: Float[Array, "*batch kv_len kv_heads head_dim"],
    value: Float[Array, "*batch kv_len kv_heads value_dim"] | None = None,
    *,
    mask: _Mask = Full(),
    score: _Score = (),
    sinks: _Sinks = None,
    scale: _Scale = None,
    q_positions: _QPositions = "start",
    kv_positions: _KVPositions = None,
    precision: Any = None,
) -> Float[Array, "*batch q_heads q_len kv_len"]:
    """The weights of attention, materialised, for looking at.

    **Arguments:** as [`eqx_attention.attend`][]. `value` is not used.

    **Returns:**

    Weights of shape `"*batch q_heads q_len kv_len"`, in at least float32. Each row sums to
    one; with sinks, to less; a row that sees no key is 0.
    """
    call = _call(
        query,
        key_,
        key_ if value is None else value,
        mask=mask,
        score=score,
        sinks=sinks,
        scale=scale,
        q_positions=q_positions,
        kv_positions=kv_positions,
        precision=precision,
    )
    return _weights(call)


class Attention(eqx.Module):
    """Attention with its options, as a module: [`eqx_attention.attend`][] with a memory.

    Options that are configured and options that are passed combine: masks by `&`, and
    scores in order, those configured first.
    """

    mask: AbstractMask
    score: tuple[AbstractScore, ...]
    _scale: Static | Float[Array, "..."] | None
    inference: bool
    mechanism: AbstractMechanism = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    precision: str | None = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    sharding: Any = eqx.field(static=True)

    __pdoc__ = pdoc

    @jaxtyped(typechecker=typechecker)
    def __init__(
        self,
        mechanism: str | AbstractMechanism = "auto",
        mask: _Mask = Full(),
        score: _Score = (),
        scale: _Scale = None,
        dropout: float | int = 0.0,
        precision: Any = None,
        dtype: Any = None,
        sharding: Any = None,
        inference: bool = False,
    ):
        """**Arguments:** as [`eqx_attention.attend`][], and:

        - `dtype`: the floating-point dtype to which queries, keys and values are cast. The
            output is in the dtype of the query as it was given. Default: no cast.
        - `inference`: if `True`, there is no dropout. May be toggled with
            `equinox.nn.inference_mode`, or overridden in the call.
        """
        self.mechanism = as_mechanism(mechanism)
        self.mask = as_mask(mask)
        self.score = as_scores(score)
        self._scale = as_scale(scale)
        self.dropout = as_dropout(dropout)
        self.precision = as_precision(precision)
        self.dtype = as_dtype(dtype)
        self.sharding = sharding
        self.inference = inference

    def __check_init__(self):
        check_options(self)

    @staticmethod
    @jaxtyped(typechecker=typechecker)
    def from_config(config: AttentionConfig, mesh: Any = None) -> "Attention":
        """The one way from an [`eqx_attention.AttentionConfig`][] to a module."""
        check_unsharded(config.sharding, mesh)
        return Attention(
            mechanism=config.mechanism,
            mask=config.mask,
            score=config.score,
            scale=config.scale,
            dropout=config.dropout,
            precision=config.precision,
            dtype=config.dtype,
        )

    @property
    def scale(self) -> Any:
        return unwrap(self._scale)

    @jaxtyped(typechecker=typechecker)
    def __call__(
        self,
        query: _Query,
        key_: _Key,
        value: _Value,
        *,
        mask: _Mask = Full(),
        score: _Score = (),
        sinks: _Sinks = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
        q_positions: _QPositions = "start",
        kv_positions: _KVPositions = None,
        return_lse: bool = False,
    ) -> _Result:
        """As [`eqx_attention.attend`][]. `inference=None` defers to the field."""
        positions = (q_positions, kv_positions)
        call = self._call(query, key_, value, mask, score, sinks, key, inference, positions)
        out, lse = _run(self.mechanism, call)
        return (out, lse) if return_lse else out

    @jaxtyped(typechecker=typechecker)
    def explain(
        self,
        query: _Query,
        key_: _Key,
        value: _Value,
        *,
        mask: _Mask = Full(),
        score: _Score = (),
        sinks: _Sinks = None,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
        q_positions: _QPositions = "start",
        kv_positions: _KVPositions = None,
    ) -> str:
        """Says how a call would be computed, without computing it: the mechanism chosen and
        why, and for each other mechanism whether it could, or why not."""
        positions = (q_positions, kv_positions)
        call = self._call(query, key_, value, mask, score, sinks, key, inference, positions)
        request = eqx.filter_eval_shape(request_of, call)
        lines = ["empty"] if _is_empty(call) else [self.mechanism.explain(request)]
        for reason in self.mechanism.unsupported(request):
            lines.append(f"  refused: {reason}")
        lines.append("mechanisms:")
        for name, mechanism in MECHANISMS.items():
            reasons = mechanism().unsupported(request)
            lines.append(f"  {name}: {'; '.join(reasons) or 'supported'}")
        return "\n".join(lines)

    def _call(
        self, query, key_, value, mask, score, sinks, key, inference, positions
    ) -> Call:
        return _call(
            query,
            key_,
            value,
            mask=both_masks(self.mask, as_mask(mask)),
            score=self.score + as_scores(score),
            sinks=sinks,
            scale=self._scale,
            dropout=self.dropout,
            key=key,
            inference=self.inference if inference is None else inference,
            q_positions=positions[0],
            kv_positions=positions[1],
            precision=self.precision,
            dtype=self.dtype,
        )


def _call(
    query,
    key_,
    value,
    *,
    mask,
    score,
    sinks,
    scale,
    q_positions,
    kv_positions,
    precision,
    dropout=0.0,
    key=None,
    inference=False,
    dtype=None,
) -> Call:
    check_operands(query, key_, value)
    check_positions(q_positions, "q_positions", ("start", "end"))
    check_positions(kv_positions, "kv_positions", (None,))
    dropout = as_dropout(dropout)
    dropped = dropout > 0 and not inference
    if dropped and key is None:
        raise ValueError(
            f"key: expected a PRNG key, as dropout={dropout} and inference is False; got "
            "None."
        )
    return Call(
        query,
        key_,
        value,
        as_mask(mask),
        as_scores(score),
        sinks,
        as_scale(scale),
        key if dropped else None,
        q_positions if isinstance(q_positions, str) else jnp.asarray(q_positions),
        None if kv_positions is None else jnp.asarray(kv_positions),
        dropout if dropped else 0.0,
        as_precision(precision),
        dtype,
        platform_of(query, key_, value),
    )


# Compiled once for each set of shapes and static options, also where a user does not.
@eqx.filter_jit
def _run(mechanism: AbstractMechanism, call: Call) -> tuple[Array, Array]:
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    request = request_of(call)
    check_supported(mechanism, request)
    if _is_empty(call):
        out = jnp.zeros(shape, request.dtype)
        lse = jnp.full(shape[:-1], -jnp.inf, request.dtype)
    else:
        out, lse = attention(mechanism, request)
        out, lse = out.reshape(shape), lse.reshape(shape[:-1])
    out, lse = with_sinks(out, lse, call.sinks)
    return out.astype(call.query.dtype), lse


def _is_empty(call: Call) -> bool:
    """Whether there is nothing to attend with, or nothing to attend to."""
    return 0 in (*call.query.shape[:-1], call.key_.shape[-3])


@eqx.filter_jit
def _weights(call: Call) -> Array:
    request = request_of(call)
    if _is_empty(call):
        batch, heads = call.query.shape[:-3], call.query.shape[-2]
        return jnp.zeros((*batch, heads, *request.lengths), request.dtype)
    weights = Vanilla().weights(request)
    if call.sinks is not None:
        _, lse = Vanilla().forward(request)
        _, total = with_sinks(jnp.zeros((*lse.shape, 1), lse.dtype), lse, call.sinks)
        weights = weights * jnp.exp(lse - total).swapaxes(1, 2)[..., None]
    batch = call.query.shape[:-3]
    return weights.reshape(*batch, *weights.shape[1:])
