import functools as ft
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
from .._mask import AbstractMask
from .._tokens import both_positions
from .checks import (
    check_channels,
    check_dropout,
    check_linear,
    check_positive,
    check_rotary,
)
from .heads import normalise, process, project, rms_norm
from .options import attention_of, config_of, dropout_of, mask_of, of_cache
from .positions import appended, positions
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
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive(self, "num_heads", "num_kv_heads")
        self.query_size = query_size
        self.key_size = query_size if key_size is None else key_size
        self.value_size = query_size if value_size is None else value_size
        self.output_size = query_size if output_size is None else output_size
        self.qk_size = query_size // num_heads if qk_size is None else qk_size
        self.vo_size = query_size // num_heads if vo_size is None else vo_size
        self.use_query_bias = use_query_bias
        self.use_key_bias = use_key_bias
        self.use_value_bias = use_value_bias
        self.use_output_bias = use_output_bias
        self.qk_norm = qk_norm
        self.rotary = rotary

        attention = AttentionConfig() if attention is None else attention
        self.dropout = dropout_of(self, attention, dropout_p, inference)
        self._check_options()

        linear = ft.partial(eqx.nn.Linear, dtype=dtype)
        qkey, kkey, vkey, okey = jr.split(key, 4)
        self.query_proj = linear(
            query_size, num_heads * self.qk_size, use_query_bias, key=qkey
        )
        self.key_proj = linear(
            self.key_size, self.num_kv_heads * self.qk_size, use_key_bias, key=kkey
        )
        self.value_proj = linear(
            self.value_size, self.num_kv_heads * self.vo_size, use_value_bias, key=vkey
        )
        self.output_proj = linear(
            num_heads * self.vo_size, self.output_size, use_output_bias, key=okey
        )
        self.query_norm = rms_norm(self.qk_size, dtype) if qk_norm == "rms" else None
        self.key_norm = rms_norm(self.qk_size, dtype) if qk_norm == "rms" else None
        scale = attention.scale
        if qk_norm == "l2" and scale is None:
            scale = jnp.full((num_heads,), 10.0, self.query_proj.weight.dtype)
        self.config = config_of(attention, scale=scale, dropout=0.0)
        self.mesh = getattr(attention, "mesh", None)

    def __check_init__(self):
        self._check_options()
        check_linear(self, "query_proj", self.query_size, self.num_heads * self.qk_size)
        check_linear(self, "key_proj", self.key_size, self.num_kv_heads * self.qk_size)
        check_linear(self, "value_proj", self.value_size, self.num_kv_heads * self.vo_size)
        check_linear(self, "output_proj", self.num_heads * self.vo_size, self.output_size)
        if getattr(self.config, "dropout", None) != 0:
            raise ValueError("MultiheadAttention: config must leave dropout to `dropout`.")
        for name in ("query_norm", "key_norm"):
            norm = getattr(self, name)
            if (norm is not None) != (self.qk_norm == "rms"):
                raise ValueError(
                    f"MultiheadAttention: {name} must be given if and only if qk_norm is "
                    f"'rms'; got qk_norm={self.qk_norm!r} and {name}={norm}."
                )

    def _check_options(self):
        """What must hold before there are parameters."""
        check_positive(self, "num_heads", "num_kv_heads", "query_size", "key_size")
        check_positive(self, "value_size", "output_size", "qk_size", "vo_size")
        check_dropout(self)
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                "MultiheadAttention: num_kv_heads must divide num_heads; got "
                f"num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}."
            )
        if self.rotary is not None:
            check_rotary(self, "qk_size")

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
        return attention_of(self)

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
        lengths: Int[Array, ""] | None = None,
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
        - `lengths`: How many of the tokens, from the first on, the cache gets; the others
            are padding. Defaults to all. (Keyword only argument.)
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
        positions are given with a cache, or lengths without. If the cache is full, that
        is an error as `cache.append` says.
        """
        if deterministic is not None:
            inference = deterministic
            warnings.warn(
                "MultiheadAttention()(deterministic=...) is deprecated "
                "in favour of MultiheadAttention()(inference=...)"
            )
        check_channels(self, "query", query, self.query_size)
        check_channels(self, "key_", key_, self.key_size)
        check_channels(self, "value", value, self.value_size)
        q_seq, kv_seq = query.shape[0], key_.shape[0]

        query_heads = project(self.query_proj, query, self.num_heads)
        key_heads = project(self.key_proj, key_, self.num_kv_heads)
        value_heads = project(self.value_proj, value, self.num_kv_heads)
        query_heads = normalise(query_heads, self.qk_norm, self.query_norm)
        key_heads = normalise(key_heads, self.qk_norm, self.key_norm)
        if process_heads is not None:
            query_heads, key_heads, value_heads = process(
                process_heads, query_heads, key_heads, value_heads
            )

        q_positions, kv_positions = positions(
            self, cache, q_positions, kv_positions, q_seq, kv_seq
        )
        if self.rotary is not None:
            q, kv = both_positions(q_positions, kv_positions, q_seq, kv_seq)
            query_heads = self.rotary(query_heads, q)
            key_heads = self.rotary(key_heads, kv)
        cache, key_heads, value_heads, kv_positions, valid = appended(
            self, cache, key_heads, value_heads, kv_positions, lengths
        )

        attention = of_cache(self.attention, cache, q_seq, kv_seq)
        out: Any = attention(
            query_heads,
            key_heads,
            value_heads,
            mask=mask_of(self, mask, valid, q_seq),
            score=score,
            sinks=sinks,
            key=key,
            inference=inference,
            q_positions=q_positions,
            kv_positions=kv_positions,
        )
        out = jax.vmap(self.output_proj)(out.reshape(q_seq, self.num_heads * self.vo_size))
        return out if cache is None else (out, cache)
