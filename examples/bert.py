"""BERT, of eqx_attention's parts, with the weights that a `BertModel` has saved."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int


Tensors = Mapping[str, np.ndarray]  # by the names that a `BertModel` gives them


class Layer(eqx.Module):
    """Attention between tokens, then a network on each token. Each is added to its input,
    and the sum is normalised."""

    attention: eqa.MultiheadAttention
    attention_norm: eqx.nn.LayerNorm
    feed_forward: eqa.FeedForward
    feed_forward_norm: eqx.nn.LayerNorm

    def __init__(self, width: int, hidden_size: int, heads: int, eps: float):
        key = jr.key(0)  # of numbers that are not to stay
        self.attention = eqa.MultiheadAttention(
            num_heads=heads,
            query_size=width,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            key=key,
        )
        self.attention_norm = eqx.nn.LayerNorm(width, eps)
        self.feed_forward = eqa.FeedForward(
            width, hidden_size, activation="gelu_exact", use_bias=True, key=key
        )
        self.feed_forward_norm = eqx.nn.LayerNorm(width, eps)

    def __call__(
        self, x: Float[Array, "seq width"], mask: eqa.AbstractMask
    ) -> Float[Array, "seq width"]:
        out: Any = self.attention(x, x, x, mask)
        x = jax.vmap(self.attention_norm)(x + out)
        return jax.vmap(self.feed_forward_norm)(x + self.feed_forward(x))


_PARTS = {
    "attention.self.query": lambda layer: layer.attention.query_proj,
    "attention.self.key": lambda layer: layer.attention.key_proj,
    "attention.self.value": lambda layer: layer.attention.value_proj,
    "attention.output.dense": lambda layer: layer.attention.output_proj,
    "attention.output.LayerNorm": lambda layer: layer.attention_norm,
    "intermediate.dense": lambda layer: layer.feed_forward.up_proj,
    "output.dense": lambda layer: layer.feed_forward.down_proj,
    "output.LayerNorm": lambda layer: layer.feed_forward_norm,
}


class Bert(eqx.Module):
    embedding: Float[Array, "vocabulary width"]
    position: Float[Array, "max_seq width"]
    norm: eqx.nn.LayerNorm
    layers: tuple[Layer, ...]

    def __init__(self, tensors: Tensors, depth: int, heads: int, eps: float = 1e-12):
        """**Raises:** `KeyError` or `ValueError` if a tensor is missing or has another
        shape."""
        self.embedding = jnp.asarray(tensors["embeddings.word_embeddings.weight"])
        position = tensors["embeddings.position_embeddings.weight"]
        # A text is one sequence here, so that all its tokens are of the first type.
        first_type = tensors["embeddings.token_type_embeddings.weight"][:1]
        self.position = jnp.asarray(position + first_type)
        hidden_size, width = tensors["encoder.layer.0.intermediate.dense.weight"].shape
        norm = eqx.nn.LayerNorm(width, eps)
        self.norm = _filled(norm, lambda x: x, tensors, "embeddings.LayerNorm")
        # Shapes and no numbers, of which each is then given by a tensor.
        empty = eqx.filter_eval_shape(Layer, width, hidden_size, heads, eps)
        layers = [empty] * depth
        for name, part in _PARTS.items():
            for i in range(depth):
                layers[i] = _filled(layers[i], part, tensors, f"encoder.layer.{i}.{name}")
        self.layers = tuple(layers)

    def __call__(
        self, tokens: Int[Array, " seq"], mask: eqa.AbstractMask
    ) -> Float[Array, "seq width"]:
        """A vector a token. Use `jax.vmap` for batches."""
        x = jax.vmap(self.norm)(self.embedding[tokens] + self.position[: len(tokens)])
        for layer in self.layers:
            x = layer(x, mask)
        return x


def _filled(module, part, tensors: Tensors, name: str):
    """`module`, in which the weight and the bias of a part are those of that name."""
    for leaf in ("weight", "bias"):
        old, new = getattr(part(module), leaf), tensors[f"{name}.{leaf}"]
        if new.shape != old.shape:
            raise ValueError(f"{name}.{leaf}: expected {old.shape}, got {new.shape}")
        where = lambda module: getattr(part(module), leaf)  # noqa: E731
        module = eqx.tree_at(where, module, jnp.asarray(new))
    return module
