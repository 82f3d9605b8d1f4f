"""The verb, and the module that holds its options."""

import functools as ft
from typing import Any, TYPE_CHECKING

import equinox as eqx
import numpy as np
from beartype import beartype as typechecker
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int, jaxtyped, PRNGKeyArray

from ._call import call_of, is_empty, of_request, run, weights
from ._config import AttentionConfig
from ._distributed import (
    as_sharding,
    explain_shards,
    MECHANISMS,
    Sharding,
    shards_of,
)
from ._mask import AbstractMask, Full
from ._mechanism import AbstractMechanism, Request
from ._options import (
    as_dropout,
    as_dtype,
    as_mask,
    as_mechanism,
    as_precision,
    as_scale,
    as_scores,
    both_masks,
    check_options,
)
from ._request import Call
from ._score import AbstractScore
from ._static import pdoc, Static, unwrap


_Query = Float[Array, "*batch q_len q_heads head_dim"]
_Key = Float[Array, "*batch kv_len kv_heads head_dim"]
_Value = Float[Array, "*batch kv_len kv_heads value_dim"]
_Mask = AbstractMask | Bool[Array, "..."] | Bool[np.ndarray, "..."]
_Score = AbstractScore | tuple[AbstractScore, ...] | list[AbstractScore]
_Sinks = Float[Array, " q_heads"] | None
_Scale = None | float | int | np.generic | Float[Array, "..."]
_QPositions = str | Int[Array, "..."] | Int[np.ndarray, "..."]
_KVPositions = None | Int[Array, "..."] | Int[np.ndarray, "..."]
_Mesh = Mesh | AbstractMesh | None
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
    sharding: Sharding | None = None,
    mesh: _Mesh = None,
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
    - `key_`: `"*batch kv_len kv_heads head_dim"`. Query head `h` reads key head
        `h // (q_heads // kv_heads)`.
    - `value`: `"*batch kv_len kv_heads value_dim"`.
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
    - `mechanism`: `"auto"`, `"flash"`, `"cudnn"`, `"blockwise"`, `"vanilla"`, or, where a
        sharding splits the sequence, `"ulysses"` or `"all_gather"`; or an
        [`eqx_attention.AbstractMechanism`][].
    - `sharding`: an [`eqx_attention.Sharding`][], which says which axes of a mesh split
        the batch, the heads and the tokens. Default: nothing is split.
    - `mesh`: the mesh of the sharding, a `jax.sharding.Mesh`. Default: the ambient one, as
        set by `jax.set_mesh`.
    - `return_lse`: whether to return the log-sum-exp too.

    **Returns:**

    `out`, of shape `"*batch q_len q_heads value_dim"` in the dtype of the query; or
    `(out, lse)`, with `lse` of shape `"*batch q_len q_heads"` in float32 (float64 for
    float64 inputs), differentiable too.

    **Raises:** `TypeError` for a wrong rank, axis or dtype; `ValueError` for a wrong value;
    [`eqx_attention.UnsupportedError`][] for what the mechanism does not do.
    """
    call = call_of(
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
        shards=shards_of(sharding, mesh),
    )
    out, lse = run(as_mechanism(mechanism), call)
    return (out, lse) if return_lse else out


@jaxtyped(typechecker=typechecker)
def attention_weights(
    query: _Query,
    key_: _Key,
    value: _Value | None = None,
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
    call = call_of(
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
    return weights(call)


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
    sharding: Sharding | None = eqx.field(static=True)
    mesh: _Mesh = eqx.field(static=True)

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
        sharding: Sharding | None = None,
        inference: bool = False,
        mesh: _Mesh = None,
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
        self.sharding = as_sharding(sharding)
        self.mesh = mesh
        self.inference = inference

    def __check_init__(self):
        check_options(self)

    @staticmethod
    @jaxtyped(typechecker=typechecker)
    def from_config(config: AttentionConfig, mesh: _Mesh = None) -> "Attention":
        """The one way from an [`eqx_attention.AttentionConfig`][] to a module.

        **Arguments:**

        - `config`: the options.
        - `mesh`: the mesh whose axes `config.sharding` names. Default: the ambient one,
            when called.

        **Raises:** `ValueError` if the mesh has not these axes, or there is no sharding.
        """
        return Attention(
            mechanism=config.mechanism,
            mask=config.mask,
            score=config.score,
            scale=config.scale,
            dropout=config.dropout,
            precision=config.precision,
            dtype=config.dtype,
            sharding=config.sharding,
            mesh=mesh,
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
        out, lse = run(self.mechanism, call)
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
        return of_request(call, ft.partial(self._explain, call))

    def _explain(self, call: Call, request: Request) -> str:
        lines = ["empty"] if is_empty(call) else [self.mechanism.explain(request)]
        for reason in self.mechanism.unsupported(request):
            lines.append(f"  refused: {reason}")
        if call.shards is not None and not is_empty(call):
            lines.append(explain_shards(request, call.shards))
        lines.append("mechanisms:")
        for name, mechanism in MECHANISMS.items():
            reasons = mechanism().unsupported(request)
            lines.append(f"  {name}: {'; '.join(reasons) or 'supported'}")
        return "\n".join(lines)

    def _call(
        self, query, key_, value, mask, score, sinks, key, inference, positions
    ) -> Call:
        return call_of(
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
            shards=shards_of(self.sharding, self.mesh),
        )
