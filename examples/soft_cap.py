"""Gemma 2's attention: capped logits, and layers that are local and global in turn.

    uv run examples/soft_cap.py
    uv run examples/soft_cap.py --without score    # not capped, and fails

In each sequence one token is marked, and the model has to say, at the end, which. It starts
with logits so large that a softmax sees one key and has next to no gradient, as happens to
a training that goes wrong. The cap bounds them, and the model learns all the same.
"""

from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from gallery.flags import flags
from jaxtyping import Array, Float, Int, PRNGKeyArray


VOCABULARY, HEADS = 8, 4
TOO_LARGE = 40  # times what the weights of queries and keys should be


class Block(eqx.Module):
    norm: eqx.nn.RMSNorm
    attention: eqa.MultiheadAttention
    feed_forward: eqa.FeedForward

    def __init__(self, width: int, config: eqa.AttentionConfig, key: PRNGKeyArray):
        k1, k2 = jr.split(key)
        mha = eqa.MultiheadAttention(HEADS, width, num_kv_heads=2, attention=config, key=k1)
        weights = lambda mha: (mha.query_proj.weight, mha.key_proj.weight)  # noqa: E731
        self.attention = eqx.tree_at(weights, mha, replace_fn=lambda x: TOO_LARGE * x)
        self.feed_forward = eqa.FeedForward(width, activation="geglu", key=k2)
        self.norm = eqx.nn.RMSNorm(width, use_bias=False)

    def __call__(self, x: Float[Array, "seq width"]) -> Float[Array, "seq width"]:
        h = jax.vmap(self.norm)(x)
        out: Any = self.attention(h, h, h)
        x = x + out
        return x + self.feed_forward(jax.vmap(self.norm)(x))

    def lse(self, x: Float[Array, "seq width"]) -> Float[Array, "seq heads"]:
        """Log-sum-exp of the logits of each query and head: how large they are."""
        h, mha = jax.vmap(self.norm)(x), self.attention
        linears = (mha.query_proj, mha.key_proj, mha.value_proj)
        heads = [jax.vmap(f)(h).reshape(len(h), -1, mha.qk_size) for f in linears]
        return mha.attention(*heads, return_lse=True)[1]


class Model(eqx.Module):
    embedding: Float[Array, "tokens width"]
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, width: int, window: int, score, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        self.embedding = jr.normal(keys[0], (2 * VOCABULARY, width))  # and those marked
        # Local, global, and so on in a deeper one.
        masks = (eqa.Causal() & eqa.SlidingWindow(window - 1), eqa.Causal())
        configs = [eqa.AttentionConfig(mask=mask, score=score) for mask in masks]
        self.blocks = [Block(width, config, key) for config, key in zip(configs, keys[1:])]
        self.head = eqx.nn.Linear(width, VOCABULARY, key=keys[3])

    def __call__(self, tokens: Int[Array, " seq"]) -> Float[Array, " vocabulary"]:
        x = self.embedding[tokens]
        for block in self.blocks:
            x = block(x)
        return self.head(x[-1])


def loss_of(model: Model, key: PRNGKeyArray, seq: int, batch: int) -> Float[Array, ""]:
    token_key, mark_key = jr.split(key)
    tokens = jr.randint(token_key, (batch, seq), 0, VOCABULARY)
    # Far from the end: the local layer does not see it there.
    marked = jnp.arange(seq) == jr.randint(mark_key, (batch, 1), 0, seq // 2)
    answers = jnp.sum(tokens, axis=1, where=marked)
    logits = jax.vmap(model)(jnp.where(marked, tokens + VOCABULARY, tokens))
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()


@eqx.filter_jit
def train(
    model: Model, key: PRNGKeyArray, steps: int, seq: int, batch: int, lr: float
) -> Float[Array, " steps"]:
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = optax.adam(lr)

    def step(carry, key):
        params, state = carry
        loss = lambda x: loss_of(eqx.combine(x, static), key, seq, batch)  # noqa: E731
        loss, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state)
        return (eqx.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, optimiser.init(params)), jr.split(key, steps))[1]


def main(argv: list[str] | None = None) -> None:
    sizes = dict(steps=120, seq=32, batch=32, window=8, width=32)
    multiples = dict(width=HEADS)
    args = flags(argv, __doc__, "score", multiples=multiples, **sizes, lr=5e-3, cap=50.0)
    score = () if args.without else eqa.SoftCap(args.cap)
    model = eqx.filter_jit(Model)(args.width, args.window, score, jr.key(0))
    lse = eqx.filter_jit(Block.lse)(model.blocks[0], model.embedding)
    largest, bound = float(jnp.abs(lse).max()), args.cap + np.log(2 * VOCABULARY)
    print(f"log-sum-exp  up to {largest:.1f}; if capped, {bound:.1f} at most")
    assert largest <= bound, "the logits are not bounded"
    losses = train(model, jr.key(1), args.steps, args.seq, args.batch, args.lr)
    loss = float(np.asarray(losses)[-10:].mean())
    print(f"loss         {loss:.3f} nats after {args.steps} steps, {losses[0]:.3f} before")
    assert loss < 0.3, "the model has not learned to see the marked token"


if __name__ == "__main__":
    main()
