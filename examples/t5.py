"""T5's relative bias: attention that learns at which distances to look.

    uv run examples/t5.py
    uv run examples/t5.py --without bias

A token's label is the larger of two others: the one two places before it, and the one just
after it. The encoder has no notion of order but the bias: without it, permuting the tokens
permutes what comes out, and labels are guesses.
"""

from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from gallery.flags import add, parser
from gallery.train import fit, surprise
from jaxtyping import Array, Float, Int, PRNGKeyArray


VOCABULARY = 8
BEFORE, AFTER = 2, 1
SCORED = slice(BEFORE, -AFTER)  # the tokens that have both


class Encoder(eqx.Module):
    embedding: eqx.nn.Embedding
    table: Float[Array, "buckets heads"]
    norm: eqx.nn.RMSNorm
    attention: Any  # an eqa.MultiheadAttention
    feed_forward: eqa.FeedForward
    head: eqx.nn.Linear

    def __init__(self, width: int, heads: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        self.embedding = eqx.nn.Embedding(VOCABULARY, width, key=keys[0])
        self.table = jnp.zeros((16, heads))
        self.norm = eqx.nn.RMSNorm(width)
        config = eqa.AttentionConfig(scale=1.0)  # T5 does not scale its logits
        self.attention = eqa.MultiheadAttention(heads, width, attention=config, key=keys[1])
        self.feed_forward = eqa.FeedForward(width, activation="relu", key=keys[2])
        self.head = eqx.nn.Linear(width, VOCABULARY, key=keys[3])

    @property
    def bias(self) -> eqa.RelativeBias:
        # Of eight buckets on either side, four are for one distance each. T5 has a table
        # that all layers share, so that it is passed to each, and not a part of it.
        return eqa.RelativeBias(self.table, bidirectional=True, max_distance=16)

    def __call__(self, tokens: Int[Array, " seq"]) -> Float[Array, "seq vocabulary"]:
        x = jax.vmap(self.embedding)(tokens)
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h, score=self.bias)
        x = x + self.feed_forward(x)
        return jax.vmap(self.head)(x)


@eqx.filter_jit
def logits(model, tokens, with_bias):
    model = eqx.tree_at(lambda m: m.table, model, model.table * with_bias)  # 0 or 1
    return jax.vmap(model)(tokens)


def loss(model, tokens, labels, with_bias):
    return surprise(logits(model, tokens, with_bias)[:, SCORED], labels).mean()


def main(argv: list[str] | None = None) -> float:
    flags = parser(__doc__, parts=("bias",))
    add(flags, "--steps", 300)
    add(flags, "--batch", 16)
    add(flags, "--seq", 24, "tokens a sequence", least=BEFORE + AFTER + 1)
    args = flags.parse_args(argv)
    rng, with_bias = np.random.default_rng(args.seed), np.float32(args.without is None)

    def draw(batch: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(VOCABULARY, size=(batch, args.seq), dtype=np.int32)
        apart = BEFORE + AFTER
        return tokens, np.maximum(tokens[:, :-apart], tokens[:, apart:])

    batches = ((*draw(args.batch), with_bias) for _ in range(args.steps))
    model = Encoder(16, heads=2, key=jr.key(args.seed))
    model = fit(model, loss, batches, 1e-2)

    tokens, labels = draw(64)
    order = rng.permutation(args.seq)
    predicted, permuted, without, permuted_without = (
        np.asarray(logits(model, x, yes))
        for yes in (with_bias, np.float32(0))
        for x in (tokens, tokens[:, order])
    )
    accuracy = float(np.mean(predicted[:, SCORED].argmax(-1) == labels))
    moved = np.abs(permuted - predicted[:, order]).max()
    moved_without = np.abs(permuted_without - without[:, order]).max()

    distances = np.arange(-4, 5)
    learned = model.table[model.bias.buckets(jnp.asarray(distances), 16)]
    print("distance   ", *(f"{d:5}" for d in distances))
    for h, row in enumerate(np.asarray(learned).T):
        print(f"head {h}     ", *(f"{bias:5.1f}" for bias in row))
    print(f"accuracy    {accuracy:.3f}")
    print(
        f"permuted    logits differ by {moved:.1f}, and by {moved_without:.0e} without it"
    )
    assert accuracy > 0.9, f"an accuracy of {accuracy:.3f}"
    assert moved_without < 1e-4, "it is not only the bias that knows of order"
    return accuracy


if __name__ == "__main__":
    main()
