import warnings
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from beartype import beartype
from jaxtyping import Array, Bool, Float, Int, jaxtyped, PRNGKeyArray

from .._attention import Attention, AttentionConfig
from .._cache import AbstractCache
from .._mask import AbstractMask, Dense, Full
from .rotary import RotaryEmbedding


class MultiheadAttention(eqx.Module):
    r"""Multihead attention: projects queries, keys and values, attends by
    [`eqx_attention.Attention`][], and projects the result.

    $$\text{MultiheadAttention}(Q, K, V)
      = \sum_i \text{Attention}\left(QW^Q_i, KW^K_i, VW^V_i\right)W^O_i$$

    It takes the place of `equinox.nn.MultiheadAttention`: the arguments, the
    parameters (for the same `key`, and in the same order, so that a file of the one
    loads into the other) and the numbers are the same, but for the bits of dropout and
    for queries that see no key, which here give 0 and not the mean of the values.

    What is new is given by keyword: grouped and multi-query attention, rotary
    embeddings, normalised queries and keys, any mask, score or mechanism (by
    `attention`), and caches.

    !!! Example

        ```python
        import eqx_attention as eqa
        import jax.numpy as jnp
        import jax.random as jr

        mha = eqa.MultiheadAttention(
            num_heads=8,
            query_size=64,
            num_kv_heads=2,
            rotary=eqa.RotaryEmbedding(8),
            qk_norm="rms",
            attention=eqa.AttentionConfig(mask=eqa.Causal()),
            key=jr.key(0),
        )
        x = jnp.ones((10, 64))
        out = mha(x, x, x)

        # The same, in two steps through a cache.
        cache = eqa.StaticCache.init(capacity=16, num_kv_heads=2, head_dim=8)
        out1, cache = mha(x[:7], x[:7], x[:7], cache=cache)
        out2, cache = mha(x[7:], x[7:], x[7:], cache=cache)
        ```

    ??? cite

        [Attention is All You Need](https://arxiv.org/abs/1706.03762). Grouped queries:
        [GQA](https://arxiv.org/abs/2305.13245). Normalised queries and keys:
        [Query-Key Normalization for Transformers](https://arxiv.org/abs/2010.04245)
        (`"l2"`) and [Scaling Vision Transformers to 22 Billion
        Parameters](https://arxiv.org/abs/2302.05442).

        ```bibtex
        @inproceedings{vaswani2017attention,
            author={Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and
                    Uszkoreit, Jakob and Jones, Llion and Gomez, Aidan N and
                    Kaiser, {\L}ukasz and Polosukhin, Illia},
            title={Attention is All You Need},
            booktitle={Advances in Neural Information Processing Systems},
            year={2017},
        }
        ```
    """

    query_proj: eqx.nn.Linear
    key_proj: eqx.nn.Linear
    value_proj: eqx.nn.Linear
    output_proj: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    query_norm: eqx.nn.RMSNorm | None
    key_norm: eqx.nn.RMSNorm | None
    rotary: RotaryEmbedding | None
    config: AttentionConfig

    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    query_size: int = eqx.field(static=True)
    key_size: int = eqx.field(static=True)
    value_size: int = eqx.field(static=True)
    output_size: int = eqx.field(static=True)
    qk_size: int = eqx.field(static=True)
    vo_size: int = eqx.field(static=True)
    use_query_bias: bool = eqx.field(static=True)
    use_key_bias: bool = eqx.field(static=True)
    use_value_bias: bool = eqx.field(static=True)
    use_output_bias: bool = eqx.field(static=True)
    qk_norm: Literal["rms", "l2"] | None = eqx.field(static=True)
    mesh: Any = eqx.field(static=True)

    @jaxtyped(typechecker=beartype)
    def __init__(
        self,
        num_heads: int,
        query_size: int,
        key_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        qk_size: int | None = None,
        vo_size: int | None = None,
        use_query_bias: bool = False,
        use_key_bias: bool = False,
        use_value_bias: bool = False,
        use_output_bias: bool = False,
        dropout_p: float | int = 0.0,
        inference: bool = False,
        dtype: Any = None,
        *,
        num_kv_heads: int | None = None,
        rotary: RotaryEmbedding | None = None,
        qk_norm: Literal["rms", "l2"] | None = None,
        attention: AttentionConfig | Attention | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `num_heads`: Number of query heads.
        - `query_size`: Number of input channels of the query.
        - `key_size`: Number of input channels of the key. Defaults to `query_size`.
        - `value_size`: Number of input channels of the value. Defaults to `query_size`.
        - `output_size`: Number of output channels. Defaults to `query_size`.
        - `qk_size`: Number of channels of a query or key head. Defaults to
            `query_size // num_heads`.
        - `vo_size`: Number of channels of a value head. Defaults to
            `query_size // num_heads`.
        - `use_query_bias`: Whether to use a bias in the query projection.
        - `use_key_bias`: Whether to use a bias in the key projection.
        - `use_value_bias`: Whether to use a bias in the value projection.
        - `use_output_bias`: Whether to use a bias in the output projection.
        - `dropout_p`: Dropout probability on attention weights.
        - `inference`: Whether to leave dropout out. May be toggled with
            `equinox.nn.inference_mode`, or overridden in a call.
        - `dtype`: The dtype of all parameters. Defaults to float32, or to float64 if
            JAX is in 64-bit mode.
        - `num_kv_heads`: Number of key and value heads, which must divide `num_heads`;
            query head `h` attends to key head `h // (num_heads // num_kv_heads)`.
            Defaults to `num_heads`. (Keyword only argument.)
        - `rotary`: An [`eqx_attention.RotaryEmbedding`][] of `qk_size`, applied to the
            query and key heads. Defaults to none. (Keyword only argument.)
        - `qk_norm`: How each query and key head is normalised before it is rotated:
            `"rms"` divides it by its root mean square, and multiplies its channels by
            learned weights; `"l2"` divides it by its length, so that logits are cosine
            similarities, times a learned scale a head that starts from 10 (it is
            `config.scale`, unless `attention` has one). Defaults to not at all.
            (Keyword only argument.)
        - `attention`: How to attend: an [`eqx_attention.AttentionConfig`][] or
            [`eqx_attention.Attention`][] with a mask, scores, mechanism and so on.
            Defaults to all defaults. (Keyword only argument.)
        - `key`: A `jax.random.key` to initialise the parameters. (Keyword only
            argument.)

        **Raises:**

        A `ValueError` if a size is not positive, the head counts do not divide,
        `rotary` has another size than `qk_size`, or `dropout_p` is not in [0, 1) or not
        the dropout of `attention`, where both have any.
        """
        key_size = query_size if key_size is None else key_size
        value_size = query_size if value_size is None else value_size
        output_size = query_size if output_size is None else output_size
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
            ("query_size", query_size),
            ("key_size", key_size),
            ("value_size", value_size),
            ("output_size", output_size),
        ):
            _check_positive(name, size)
        qk_size = query_size // num_heads if qk_size is None else qk_size
        vo_size = query_size // num_heads if vo_size is None else vo_size
        _check_positive("qk_size", qk_size)
        _check_positive("vo_size", vo_size)
        if num_heads % num_kv_heads != 0:
            raise ValueError(
                "MultiheadAttention: num_kv_heads must divide num_heads; got "
                f"num_heads={num_heads} and num_kv_heads={num_kv_heads}."
            )
        if rotary is not None and rotary.head_dim != qk_size:
            raise ValueError(
                "MultiheadAttention: rotary must have a head_dim of qk_size="
                f"{qk_size}; got one of {rotary.head_dim}."
            )
        if not 0 <= dropout_p < 1:
            raise ValueError(
                f"MultiheadAttention: dropout_p must be in [0, 1); got {dropout_p}."
            )
        if attention is None:
            attention = AttentionConfig()
        if dropout_p != 0 and attention.dropout not in (0, dropout_p):
            raise ValueError(
                "MultiheadAttention: dropout_p must be that of attention, if both are "
                f"given; got {dropout_p}, and attention.dropout={attention.dropout}."
            )
        dropout_p = dropout_p if attention.dropout == 0 else attention.dropout
        if isinstance(attention, Attention):
            inference = inference or attention.inference

        qkey, kkey, vkey, okey = jr.split(key, 4)
        self.query_proj = eqx.nn.Linear(
            query_size,
            num_heads * qk_size,
            use_bias=use_query_bias,
            dtype=dtype,
            key=qkey,
        )
        self.key_proj = eqx.nn.Linear(
            key_size,
            num_kv_heads * qk_size,
            use_bias=use_key_bias,
            dtype=dtype,
            key=kkey,
        )
        self.value_proj = eqx.nn.Linear(
            value_size,
            num_kv_heads * vo_size,
            use_bias=use_value_bias,
            dtype=dtype,
            key=vkey,
        )
        self.output_proj = eqx.nn.Linear(
            num_heads * vo_size,
            output_size,
            use_bias=use_output_bias,
            dtype=dtype,
            key=okey,
        )
        self.dropout = eqx.nn.Dropout(float(dropout_p), inference=inference)
        self.query_norm = self.key_norm = None
        scale = attention.scale
        if qk_norm == "rms":
            self.query_norm = _rms_norm(qk_size, dtype)
            self.key_norm = _rms_norm(qk_size, dtype)
        elif qk_norm == "l2" and scale is None:
            scale = jnp.full((num_heads,), 10.0, self.query_proj.weight.dtype)
        self.rotary = rotary
        self.config = _config(attention, scale=scale, dropout=0.0)

        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.query_size = query_size
        self.key_size = key_size
        self.value_size = value_size
        self.output_size = output_size
        self.qk_size = qk_size
        self.vo_size = vo_size
        self.use_query_bias = use_query_bias
        self.use_key_bias = use_key_bias
        self.use_value_bias = use_value_bias
        self.use_output_bias = use_output_bias
        self.qk_norm = qk_norm
        self.mesh = getattr(attention, "mesh", None)

    @classmethod
    @jaxtyped(typechecker=beartype)
    def from_config(
        cls,
        config: AttentionConfig,
        num_heads: int,
        query_size: int,
        *args: Any,
        mesh: Any = None,
        key: PRNGKeyArray,
        **kwargs: Any,
    ) -> "MultiheadAttention":
        """Makes a layer that attends as a configuration says.

        **Arguments:**

        - `config`: The configuration.
        - `mesh`: The mesh, if `config` has a `sharding`. (Keyword only argument.)
        - The others are those of the constructor, but for `attention`.
        """
        attention = Attention.from_config(config, mesh=mesh)
        return cls(num_heads, query_size, *args, attention=attention, key=key, **kwargs)

    @property
    def attention(self) -> Attention:
        """What attends between the projections, for example to
        `mha.attention.explain(...)`."""
        config = _config(self.config, self.config.scale, self.dropout.p)
        attention = Attention.from_config(config, mesh=self.mesh)
        if self.dropout.inference:
            attention = eqx.nn.inference_mode(attention)
        return attention

    @jax.named_scope("eqa.MultiheadAttention")
    @jaxtyped(typechecker=beartype)
    def __call__(
        self,
        query: Float[Array, "q_seq q_size"],
        key_: Float[Array, "kv_seq k_size"],
        value: Float[Array, "kv_seq v_size"],
        mask: AbstractMask | Bool[Array | np.ndarray, "..."] | None = None,
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: Callable[..., Any] | None = None,
        cache: AbstractCache | None = None,
        score: Any = (),
        sinks: Float[Array, " num_heads"] | None = None,
        q_positions: Literal["start", "end"] | Int[Array, " q_seq"] = "start",
        kv_positions: Int[Array, " kv_seq"] | None = None,
    ) -> Float[Array, "q_seq o_size"] | tuple[Float[Array, "q_seq o_size"], AbstractCache]:
        """**Arguments:**

        - `query`: The query tokens, of shape `(q_seq, query_size)`. Use `jax.vmap` for
            batches.
        - `key_`: The key tokens, of shape `(kv_seq, key_size)`.
        - `value`: The value tokens, of shape `(kv_seq, value_size)`.
        - `mask`: A mask, or a boolean array of shape `(q_seq, kv_seq)` or
            `(num_heads, q_seq, kv_seq)`, of which `True` is visible. It narrows the mask
            that the layer was made with. Defaults to none.
        - `key`: A `jax.random.key` for dropout. Unused if there is no dropout. (Keyword
            only argument.)
        - `inference`: Whether to leave dropout out. Defaults to what the layer was made
            with, or set to by `equinox.nn.inference_mode`. (Keyword only argument.)
        - `deterministic`: (Deprecated in favour of `inference`.)
        - `process_heads`: A function that takes the query, key and value heads, of shape
            `(seq, heads, channels)`, and returns new ones of the same shapes. It comes
            after `qk_norm` and before `rotary`. (Keyword only argument.)
        - `cache`: The keys and values of the tokens before these, to which this call
            appends its own (after `rotary`). The queries then attend to all that are in
            it. Positions of query and key tokens count from the cache's length, and
            `kv_seq` in `mask` is the number of the cache's slots. (Keyword only
            argument.)
        - `score`: Scores that follow those that the layer was made with. (Keyword only
            argument.)
        - `sinks`: One logit a query head, which joins the softmax and has no value.
            (Keyword only argument.)
        - `q_positions`, `kv_positions`: The positions of the tokens, by which `rotary`
            and all positional masks and scores go, as for
            [`eqx_attention.attend`][]. Not with a cache, which knows. (Keyword only
            arguments.)

        **Returns:**

        An array of shape `(q_seq, output_size)`; with a cache, that and the new cache.

        **Raises:**

        A `TypeError` if an array has a wrong rank, axis or dtype. A `ValueError` if
        there is dropout and `key` is missing, if `process_heads` changes a shape, or if
        positions are given with a cache. If the cache is full, that is an error as
        `cache.append` says.
        """
        if deterministic is not None:
            inference = deterministic
            warnings.warn(
                "MultiheadAttention()(deterministic=...) is deprecated "
                "in favour of MultiheadAttention()(inference=...)"
            )
        for name, x, size in (
            ("query", query, self.query_size),
            ("key_", key_, self.key_size),
            ("value", value, self.value_size),
        ):
            if x.shape[-1] != size:
                raise TypeError(
                    f"MultiheadAttention: {name} must have shape (seq, {size}); got "
                    f"{x.shape}."
                )
        q_seq, kv_seq = query.shape[0], key_.shape[0]

        query_heads = _heads(self.query_proj, query, self.num_heads)
        key_heads = _heads(self.key_proj, key_, self.num_kv_heads)
        value_heads = _heads(self.value_proj, value, self.num_kv_heads)
        if self.query_norm is not None and self.key_norm is not None:
            query_heads = jax.vmap(jax.vmap(self.query_norm))(query_heads)
            key_heads = jax.vmap(jax.vmap(self.key_norm))(key_heads)
        elif self.qk_norm == "l2":
            query_heads, key_heads = _l2_norm(query_heads), _l2_norm(key_heads)
        if process_heads is not None:
            heads = query_heads, key_heads, value_heads
            query_heads, key_heads, value_heads = process_heads(*heads)
            for old, new in zip(heads, (query_heads, key_heads, value_heads)):
                if old.shape != new.shape:
                    raise ValueError(
                        "process_heads must not change the shape of the heads: expected "
                        f"{old.shape}; got {new.shape}."
                    )

        if cache is not None:
            given = not isinstance(q_positions, str) or q_positions != "start"
            if given or kv_positions is not None:
                raise ValueError(
                    "MultiheadAttention: q_positions and kv_positions must not be given "
                    "with a cache: they count from its length."
                )
            if cache.length.shape != ():
                raise ValueError(
                    "MultiheadAttention: cache must have no batch axes (use jax.vmap "
                    f"for batches); got one of batch {cache.length.shape}."
                )
            q_positions = cache.length + jnp.arange(q_seq, dtype=cache.length.dtype)
            kv_positions = cache.length + jnp.arange(kv_seq, dtype=cache.length.dtype)
        if self.rotary is not None:
            if isinstance(q_positions, str) and q_positions == "end":
                if kv_positions is not None:
                    back = jnp.arange(1 - q_seq, 1, dtype=kv_positions.dtype)
                    q_positions = kv_positions[-1:] + back
            query_heads = self.rotary(query_heads, _positions(q_positions, q_seq, kv_seq))
            key_heads = self.rotary(key_heads, _positions(kv_positions, kv_seq, kv_seq))
        valid = None
        if cache is not None:
            cache = cache.append(key_heads, value_heads)
            key_heads, value_heads, kv_positions, valid = cache.keys_values()

        out: Any = self.attention(
            query_heads,
            key_heads,
            value_heads,
            mask=self._mask(mask, valid, q_seq),
            score=score,
            sinks=sinks,
            key=key,
            inference=inference,
            q_positions=q_positions,
            kv_positions=kv_positions,
        )
        out = jax.vmap(self.output_proj)(out.reshape(q_seq, self.num_heads * self.vo_size))
        return out if cache is None else (out, cache)

    def _mask(self, mask: Any, valid: AbstractMask | None, q_seq: int) -> AbstractMask:
        if mask is None:
            mask = Full()
        elif not isinstance(mask, AbstractMask):
            if mask.shape[:-1] not in ((q_seq,), (self.num_heads, q_seq)):
                raise TypeError(
                    "MultiheadAttention: mask must have shape (q_seq, kv_seq) or "
                    "(num_heads, q_seq, kv_seq), where "
                    f"q_seq={q_seq} and num_heads={self.num_heads}; got {mask.shape}."
                )
            mask = Dense(jnp.asarray(mask))
        return mask if valid is None else mask & valid


def _check_positive(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"MultiheadAttention: {name} must be positive; got {size}.")


def _config(
    attention: AttentionConfig | Attention, scale: Any, dropout: Any
) -> AttentionConfig:
    return AttentionConfig(
        mechanism=attention.mechanism,
        mask=attention.mask,
        score=attention.score,
        scale=scale,
        dropout=dropout,
        precision=attention.precision,
        dtype=attention.dtype,
        sharding=attention.sharding,
    )


def _heads(proj: eqx.nn.Linear, x: Array, num_heads: int) -> Array:
    out = jax.vmap(proj)(x)
    return out.reshape(out.shape[0], num_heads, out.shape[1] // num_heads)


def _rms_norm(size: int, dtype: Any) -> eqx.nn.RMSNorm:
    return eqx.nn.RMSNorm(size, eps=1e-6, use_bias=False, dtype=dtype)


def _l2_norm(x: Array) -> Array:
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    y = x.astype(dtype)
    square = jnp.sum(y * y, axis=-1, keepdims=True)
    # The constant is for heads of zeros: its square root is nothing beside a length.
    return (y * jax.lax.rsqrt(square + 1e-12)).astype(x.dtype)


def _positions(
    positions: Literal["start", "end"] | Array | None, seq: int, kv_seq: int
) -> Array:
    if positions is None or isinstance(positions, str):
        first = kv_seq - seq if positions == "end" else 0
        return jnp.arange(first, first + seq)
    return positions
