"""A decoder-only transformer over bytes, of eqx_attention's parts."""

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .config import RunConfig


VOCABULARY = 256
EMBEDDING_SCALE = 0.02

# One a block; none if there is nothing to keep.
Caches = tuple[eqa.AbstractCache, ...]


class Block(eqx.Module):
    """Attention between tokens, then a network on each token, each added to its input."""

    attention_norm: eqx.nn.RMSNorm
    attention: eqa.MultiheadAttention
    rotary: eqa.RotaryEmbedding
    feed_forward_norm: eqx.nn.RMSNorm
    feed_forward: eqa.FeedForward

    def __init__(
        self, config: RunConfig, attention: eqa.AttentionConfig, *, key: PRNGKeyArray
    ):
        attention_key, feed_forward_key = jr.split(key)
        self.attention_norm = eqx.nn.RMSNorm(config.width, use_bias=False)
        self.attention = eqa.MultiheadAttention(
            num_heads=config.heads,
            query_size=config.width,
            num_kv_heads=config.kv_heads,
            qk_norm="rms",
            attention=attention,
            key=attention_key,
        )
        self.rotary = eqa.RotaryEmbedding(config.head_dim)
        self.feed_forward_norm = eqx.nn.RMSNorm(config.width, use_bias=False)
        self.feed_forward = eqa.FeedForward(
            config.width,
            3 * config.width,
            activation="swiglu",
            block_size=config.ff_block,
            key=feed_forward_key,
        )

    def __call__(
        self,
        x: Float[Array, "seq width"],
        positions: Int[Array, " seq"],
        cache: eqa.AbstractCache | None,
        length: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "seq width"], eqa.AbstractCache | None]:
        def rotate(q, k, v):
            return self.rotary(q, positions), self.rotary(k, positions), v

        h = jax.vmap(self.attention_norm)(x)
        h = self.attention(h, h, h, process_heads=rotate, cache=cache, lengths=length)
        if isinstance(h, tuple):  # given a cache, it returns the new one, too
            h, cache = h
        x = x + h
        h = jax.vmap(self.feed_forward_norm)(x)
        return x + self.feed_forward(h), cache


class LanguageModel(eqx.Module):
    """Logits of the next byte, at every byte."""

    embedding: Float[Array, "vocabulary width"]
    blocks: tuple[Block, ...]
    norm: eqx.nn.RMSNorm

    def __init__(
        self,
        config: RunConfig,
        attention: eqa.AttentionConfig | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """`attention` defaults to that of the `config`."""
        attention = config.attention if attention is None else attention
        embedding_key, *block_keys = jr.split(key, 1 + config.depth)
        shape = (VOCABULARY, config.width)
        self.embedding = EMBEDDING_SCALE * jr.normal(embedding_key, shape)
        self.blocks = tuple(Block(config, attention, key=key) for key in block_keys)
        self.norm = eqx.nn.RMSNorm(config.width, use_bias=False)

    def __call__(
        self,
        tokens: Int[Array, " seq"],
        caches: Caches = (),
        length: Int[Array, ""] | None = None,
        positions: Int[Array, " seq"] | None = None,
    ) -> tuple[Float[Array, "seq vocabulary"], Caches]:
        """**Arguments:**

        - `tokens`: Bytes, as integers. Use `jax.vmap` for batches.
        - `caches`: What the model has read before these, from `init_caches` or from an
            earlier call. Defaults to nothing, and to keeping nothing.
        - `length`: How many of the tokens, from the first on, the caches get; the others
            are padding. Defaults to all.
        - `positions`: Where in the text the tokens are, for rotary embeddings. By default
            they follow each other, after those that the model has read before.

        **Returns:**

        The logits, and the caches for the call that goes on from here (if `caches` were
        given).
        """
        # One matrix reads bytes and writes them. Its entries are of a size that suits the
        # logits; what goes into the first block is of size 1.
        x = self.embedding[tokens] / EMBEDDING_SCALE
        if positions is None:
            positions = jnp.arange(len(tokens)) + (caches[0].length if caches else 0)
        new_caches = []
        for block, cache in zip(self.blocks, caches or (None,) * len(self.blocks)):
            x, cache = block(x, positions, cache, length)
            if cache is not None:
                new_caches.append(cache)
        return jax.vmap(self.norm)(x) @ self.embedding.T, tuple(new_caches)


def num_parameters(model: LanguageModel) -> int:
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return sum(array.size for array in arrays)


def losses(
    model: LanguageModel, tokens: Int[Array, "batch seq+1"]
) -> Float[Array, "batch seq"]:
    """Negative log-likelihood of each byte after the first, in nats."""
    logits, _ = jax.vmap(model)(tokens[:, :-1])
    return surprise(logits, tokens[:, 1:])


def surprise(
    logits: Float[Array, "batch seq vocabulary"], targets: Int[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """Negative log-likelihood of each target, in nats."""
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
