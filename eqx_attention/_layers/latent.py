import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from beartype import beartype
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, jaxtyped, PRNGKeyArray

from .._attention import Attention, AttentionConfig
from .._cache import AbstractCache, StaticCache
from .._mask import AbstractMask
from .._tokens import both_positions
from .checks import (
    check_channels,
    check_dropout,
    check_linear,
    check_positive,
    check_rotary,
)
from .heads import rms_norm
from .latent_heads import (
    absorbed as absorbed_form,
    check_cache,
    check_parts,
    from_latents,
    latent_heads,
    query_heads,
    uncompressed,
)
from .options import attention_of, config_of, dropout_of, mask_of, of_cache
from .positions import appended, positions as positions_of
from .rotary import RotaryEmbedding


class MultiheadLatentAttention(eqx.Module):
    r"""Multi-head latent attention: self-attention whose keys and values, of all heads,
    are computed from one short *latent* vector a token, which is all that a cache keeps.

    With $x_t$ the input and $R_t$ the rotation to position $t$:

    $$c_t = \text{RMSNorm}(W^{DKV} x_t), \qquad k^R_t = R_t W^{KR} x_t, \qquad
      k_{t,i} = [W^{UK}_i c_t;\ k^R_t], \qquad v_{t,i} = W^{UV}_i c_t$$

    and a query head is $q_{t,i} = [W^{UQ}_i c'_t;\ R_t W^{QR}_i c'_t]$, where $c'_t$ is
    $x_t$ or, with `q_rank`, a latent vector of its own, $\text{RMSNorm}(W^{DQ} x_t)$. The
    part of the keys that is rotated, $k^R_t$, is the same for all heads.

    There are two forms, equal but for rounding:

    - *uncompressed*, as above: a key and a value for each head. The products are
        shorter, which suits training.
    - *absorbed*: as $q^\intercal W^{UK}_i c = (W^{UK\intercal}_i q)^\intercal c$, it is
        the queries that are multiplied, into the latent space. All heads then attend to
        one key head, $[c_t; k^R_t]$, and to the values $c_t$, and only the outputs are
        multiplied by $W^{UV}_i$. No key of a past token is ever computed again, which
        suits decoding.

    Up-projections have no biases, for which the absorbed form has no room.

    !!! Example

        ```python
        import eqx_attention as eqa
        import jax.numpy as jnp
        import jax.random as jr

        mla = eqa.MultiheadLatentAttention(
            num_heads=8,
            query_size=64,
            kv_rank=16,
            rope_size=4,
            attention=eqa.AttentionConfig(mask=eqa.Causal()),
            key=jr.key(0),
        )
        x = jnp.ones((10, 64))
        out = mla(x)

        # The same, in two steps through a cache of 16 + 4 channels a token.
        cache = mla.init_cache(capacity=16)
        out1, cache = mla(x[:7], cache=cache)
        out2, cache = mla(x[7:], cache=cache)
        ```

    ??? cite

        [DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language
        Model](https://arxiv.org/abs/2405.04434)

        ```bibtex
        @article{deepseek2024v2,
            author={{DeepSeek-AI}},
            title={{DeepSeek-V2}: A Strong, Economical, and Efficient
                   Mixture-of-Experts Language Model},
            journal={arXiv:2405.04434},
            year={2024},
        }
        ```
    """

    query_down: eqx.nn.Linear | None
    query_norm: eqx.nn.RMSNorm | None
    query_proj: eqx.nn.Linear
    latent_proj: eqx.nn.Linear
    latent_norm: eqx.nn.RMSNorm
    key_up: eqx.nn.Linear
    value_up: eqx.nn.Linear
    output_proj: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    rotary: RotaryEmbedding
    config: AttentionConfig

    num_heads: int = eqx.field(static=True)
    query_size: int = eqx.field(static=True)
    output_size: int = eqx.field(static=True)
    kv_rank: int = eqx.field(static=True)
    q_rank: int | None = eqx.field(static=True)
    nope_size: int = eqx.field(static=True)
    rope_size: int = eqx.field(static=True)
    vo_size: int = eqx.field(static=True)
    mesh: Any = eqx.field(static=True)

    @jaxtyped(typechecker=beartype)
    def __init__(
        self,
        num_heads: int,
        query_size: int,
        kv_rank: int,
        output_size: int | None = None,
        q_rank: int | None = None,
        nope_size: int | None = None,
        rope_size: int | None = None,
        vo_size: int | None = None,
        use_query_bias: bool = False,
        use_latent_bias: bool = False,
        use_output_bias: bool = False,
        dropout_p: float | int = 0.0,
        inference: bool = False,
        dtype: Any = None,
        *,
        rotary: RotaryEmbedding | None = None,
        attention: AttentionConfig | Attention | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `num_heads`: Number of query heads.
        - `query_size`: Number of input channels.
        - `kv_rank`: Number of channels of the latent vector of keys and values.
        - `output_size`: Number of output channels. Defaults to `query_size`.
        - `q_rank`: Number of channels of the latent vector of queries. Defaults to
            none: queries are projected from the input.
        - `nope_size`: Number of channels of a query or key head that are not rotated.
            Defaults to `query_size // num_heads`.
        - `rope_size`: Number of channels of a query or key head that are. Defaults to
            that of `rotary`, or else to half of `nope_size`, as in the paper.
        - `vo_size`: Number of channels of a value head. Defaults to
            `query_size // num_heads`.
        - `use_query_bias`: Whether to use a bias in the first projection of queries.
        - `use_latent_bias`: Whether to use a bias in the projection to the latent vector
            and to the rotated part of the keys.
        - `use_output_bias`: Whether to use a bias in the output projection.
        - `dropout_p`: Dropout probability on attention weights.
        - `inference`: Whether to leave dropout out. May be toggled with
            `equinox.nn.inference_mode`, or overridden in a call.
        - `dtype`: The dtype of all parameters. Defaults to float32, or to float64 if
            JAX is in 64-bit mode.
        - `rotary`: An [`eqx_attention.RotaryEmbedding`][] of `rope_size`. Defaults to
            `RotaryEmbedding(rope_size)`. (Keyword only argument.)
        - `attention`: How to attend: an [`eqx_attention.AttentionConfig`][] or
            [`eqx_attention.Attention`][] with a mask, scores, mechanism and so on. Its
            `scale` defaults to `(nope_size + rope_size) ** -0.5`, in both forms.
            (Keyword only argument.)
        - `key`: A `jax.random.key` to initialise the parameters. (Keyword only
            argument.)

        **Raises:**

        A `ValueError` if a size is not positive, `rotary` has another size than
        `rope_size`, or `dropout_p` is not in [0, 1) or not the dropout of `attention`,
        where both have any.
        """
        self.num_heads = num_heads
        check_positive(self, "num_heads")
        self.query_size = query_size
        self.output_size = query_size if output_size is None else output_size
        self.kv_rank = kv_rank
        self.q_rank = q_rank
        self.nope_size = query_size // num_heads if nope_size is None else nope_size
        self.vo_size = query_size // num_heads if vo_size is None else vo_size
        if rope_size is None:
            rope_size = self.nope_size // 2 if rotary is None else rotary.head_dim
        self.rope_size = rope_size
        check_positive(self, "rope_size")
        self.rotary = RotaryEmbedding(rope_size) if rotary is None else rotary

        attention = AttentionConfig() if attention is None else attention
        self.dropout = dropout_of(self, attention, dropout_p, inference)
        self._check_options()

        linear = ft.partial(eqx.nn.Linear, dtype=dtype)
        dkey, qkey, lkey, kkey, vkey, okey = jr.split(key, 6)
        q_size, head_size = query_size, self.nope_size + rope_size
        self.query_down, self.query_norm = None, None
        if q_rank is not None:
            self.query_down = linear(query_size, q_rank, use_query_bias, key=dkey)
            self.query_norm = rms_norm(q_rank, dtype)
            q_size, use_query_bias = q_rank, False
        self.query_proj = linear(q_size, num_heads * head_size, use_query_bias, key=qkey)
        self.latent_proj = linear(
            query_size, kv_rank + rope_size, use_latent_bias, key=lkey
        )
        self.latent_norm = rms_norm(kv_rank, dtype)
        self.key_up = linear(kv_rank, num_heads * self.nope_size, False, key=kkey)
        self.value_up = linear(kv_rank, num_heads * self.vo_size, False, key=vkey)
        self.output_proj = linear(
            num_heads * self.vo_size, self.output_size, use_output_bias, key=okey
        )
        # The size of a head is another one in the absorbed form, but not the scale.
        scale = head_size**-0.5 if attention.scale is None else attention.scale
        self.config = config_of(attention, scale=scale, dropout=0.0)
        self.mesh = getattr(attention, "mesh", None)

    def __check_init__(self):
        self._check_options()
        heads = self.num_heads
        q_size = self.query_size if self.q_rank is None else self.q_rank
        check_linear(self, "query_proj", q_size, heads * (self.nope_size + self.rope_size))
        check_linear(self, "latent_proj", self.query_size, self.kv_rank + self.rope_size)
        check_linear(self, "key_up", self.kv_rank, heads * self.nope_size)
        check_linear(self, "value_up", self.kv_rank, heads * self.vo_size)
        check_linear(self, "output_proj", heads * self.vo_size, self.output_size)
        check_parts(self)
        if self.config.dropout != 0 or self.config.scale is None:
            raise ValueError(
                "MultiheadLatentAttention: config must leave dropout to `dropout`, and "
                "have a scale."
            )

    def _check_options(self):
        """What must hold before there are parameters."""
        check_positive(self, "num_heads", "query_size", "output_size", "kv_rank")
        check_positive(self, "nope_size", "rope_size", "vo_size")
        if self.q_rank is not None:
            check_positive(self, "q_rank")
        check_dropout(self)
        check_rotary(self, "rope_size")

    @classmethod
    @jaxtyped(typechecker=beartype)
    def from_config(
        cls,
        config: AttentionConfig,
        num_heads: int,
        query_size: int,
        kv_rank: int,
        *args: Any,
        mesh: Any = None,
        key: PRNGKeyArray,
        **kwargs: Any,
    ) -> "MultiheadLatentAttention":
        """Makes a layer that attends as a configuration says.

        **Arguments:**

        - `config`: The configuration.
        - `mesh`: The mesh, if `config` has a `sharding`. (Keyword only argument.)
        - The others are those of the constructor, but for `attention`.
        """
        attention = Attention.from_config(config, mesh=mesh)
        sizes = (num_heads, query_size, kv_rank)
        return cls(*sizes, *args, attention=attention, key=key, **kwargs)

    @property
    def attention(self) -> Attention:
        """What attends between the projections, for example to
        `mla.attention.explain(...)`."""
        return attention_of(self)

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """`(num_kv_heads, head_dim, value_dim)` of a cache for this layer, of whatever
        kind: `SomeCache.init(capacity, *mla.cache_sizes)`. It holds one head, of
        `kv_rank + rope_size` channels, and no values, which are a part of the keys."""
        return 1, self.kv_rank + self.rope_size, 0

    @jaxtyped(typechecker=beartype)
    def init_cache(
        self, capacity: int, *, batch: tuple[int, ...] = (), dtype: DTypeLike | None = None
    ) -> StaticCache:
        """An empty [`eqx_attention.StaticCache`][] for this layer.

        **Arguments:**

        - `capacity`: How many tokens of each sequence it can hold.
        - `batch`: The batch axes. Defaults to none. (Keyword only argument.)
        - `dtype`: Its dtype. Defaults to that of the layer. (Keyword only argument.)

        **Raises:** a `ValueError` if a size is not positive.
        """
        dtype = self.latent_proj.weight.dtype if dtype is None else dtype
        return StaticCache.init(capacity, *self.cache_sizes, batch=batch, dtype=dtype)

    @jax.named_scope("eqa.MultiheadLatentAttention")
    @jaxtyped(typechecker=beartype)
    def __call__(
        self,
        x: Float[Array, "seq size"],
        mask: AbstractMask | Bool[Array | np.ndarray, "..."] | None = None,
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
        absorbed: bool | None = None,
        cache: AbstractCache | None = None,
        lengths: Int[Array, ""] | None = None,
        score: Any = (),
        sinks: Float[Array, " num_heads"] | None = None,
        positions: Int[Array, " seq"] | None = None,
    ) -> Float[Array, "seq o_size"] | tuple[Float[Array, "seq o_size"], AbstractCache]:
        """**Arguments:**

        - `x`: The tokens, of shape `(seq, query_size)`. Use `jax.vmap` for batches.
        - `mask`: A mask, or a boolean array of shape `(seq, seq)` or
            `(num_heads, seq, seq)`, of which `True` is visible. It narrows the mask that
            the layer was made with. Defaults to none.
        - `key`: A `jax.random.key` for dropout. Unused if there is no dropout. (Keyword
            only argument.)
        - `inference`: Whether to leave dropout out. Defaults to what the layer was made
            with, or set to by `equinox.nn.inference_mode`. (Keyword only argument.)
        - `absorbed`: Which of the two forms computes the result. Defaults to the absorbed
            one with a cache, and the uncompressed one without. For a long prompt that
            goes into a cache, the uncompressed one may be faster; it takes a cache of
            plain arrays only. (Keyword only argument.)
        - `cache`: What is kept of the tokens before these, made by `init_cache` or with
            `cache_sizes`. This call appends its own tokens, and they attend to all that
            are in it. Positions count from the cache's length, and the last axis of
            `mask` is the cache's slots. (Keyword only argument.)
        - `lengths`: How many of the tokens, from the first on, the cache gets; the others
            are padding. Defaults to all. (Keyword only argument.)
        - `score`: Scores that follow those that the layer was made with. (Keyword only
            argument.)
        - `sinks`: One logit a query head, which joins the softmax and has no value.
            (Keyword only argument.)
        - `positions`: The positions of the tokens, by which `rotary` and all positional
            masks and scores go. Defaults to 0, 1, 2, … Not with a cache, which knows.
            (Keyword only argument.)

        **Returns:**

        An array of shape `(seq, output_size)`; with a cache, that and the new cache.

        **Raises:**

        A `TypeError` if an array, or what the cache holds, has a wrong rank, axis or
        dtype. A `ValueError` if there is dropout and `key` is missing, or if positions
        are given with a cache, or lengths without. An
        [`eqx_attention.UnsupportedError`][] if `absorbed=False` with a cache that does
        not hold plain arrays. If the cache is full, that is an error as `cache.append`
        says.
        """
        check_channels(self, "x", x, self.query_size)
        check_cache(self, cache)
        seq = x.shape[0]
        absorbed = cache is not None if absorbed is None else absorbed
        q_positions = "start" if positions is None else positions
        q_positions, kv_positions = positions_of(
            self, cache, q_positions, positions, seq, seq
        )
        rotate_at, _ = both_positions(q_positions, kv_positions, seq, seq)
        cache, latents, _, kv_positions, valid = appended(
            self, cache, *latent_heads(self, x, rotate_at), kv_positions, lengths
        )
        form = absorbed_form if absorbed else uncompressed
        query, key_, value = form(self, query_heads(self, x, rotate_at), latents)
        attention = of_cache(self.attention, cache, seq, seq)
        out: Any = attention(
            query,
            key_,
            value,
            mask=mask_of(self, mask, valid, seq),
            score=score,
            sinks=sinks,
            key=key,
            inference=inference,
            q_positions=q_positions,
            kv_positions=kv_positions,
        )
        out = from_latents(self, out) if absorbed else out
        out = jax.vmap(self.output_proj)(out.reshape(seq, self.num_heads * self.vo_size))
        return out if cache is None else (out, cache)
