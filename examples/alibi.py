"""ALiBi: trained on short sequences, and as good on long ones.

    uv run examples/alibi.py
    uv run examples/alibi.py --without alibi

A text is a letter that stays for a while, in noise, and then another one. Attention that
knows no distances averages over all of it, and more of it is out of date as it grows.
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


VOCABULARY, HEADS = 8, 4
CHANGE, NOISE = 0.1, 0.3  # how often the letter changes, and how often one hides it


class LanguageModel(eqx.Module):
    embedding: eqx.nn.Embedding
    norm: eqx.nn.RMSNorm
    attention: Any  # an eqa.MultiheadAttention
    feed_forward: eqa.FeedForward
    head: eqx.nn.Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        self.embedding = eqx.nn.Embedding(VOCABULARY, width, key=keys[0])
        self.norm = eqx.nn.RMSNorm(width)
        causal = eqa.AttentionConfig(mask=eqa.Causal())
        self.attention = eqa.MultiheadAttention(HEADS, width, attention=causal, key=keys[1])
        self.feed_forward = eqa.FeedForward(width, key=keys[2])
        self.head = eqx.nn.Linear(width, VOCABULARY, key=keys[3])

    def __call__(
        self, tokens: Int[Array, " seq"], score: eqa.ALiBi
    ) -> Float[Array, "seq vocabulary"]:
        x = jax.vmap(self.embedding)(tokens)
        h = jax.vmap(self.norm)(x)
        # Given in the call, the slopes are no parameters of the model: they stay the same.
        x = x + self.attention(h, h, h, score=score)
        x = x + self.feed_forward(x)
        return jax.vmap(self.head)(x)


def draw(rng: np.random.Generator, batch: int, seq: int) -> np.ndarray:
    """Sequences of `seq + 1` tokens, of which each has a next one, but the last."""
    letter = rng.integers(VOCABULARY, size=batch)
    columns = []
    for _ in range(seq + 1):
        new, noise = rng.integers(VOCABULARY, size=(2, batch))
        letter = np.where(rng.random(batch) < CHANGE, new, letter)
        columns.append(np.where(rng.random(batch) < NOISE, noise, letter))
    return np.stack(columns, axis=1).astype(np.int32)


def best_losses(tokens: np.ndarray) -> np.ndarray:
    """Those of one who knows how sequences are drawn, by Bayes: (batch, seq)."""
    letter = np.full((len(tokens), VOCABULARY), 1 / VOCABULARY)
    columns = []
    for now, then in zip(tokens.T[:-1], tokens.T[1:]):
        letter = letter * ((1 - NOISE) * np.eye(VOCABULARY)[now] + NOISE / VOCABULARY)
        letter = letter / letter.sum(1, keepdims=True)
        letter = (1 - CHANGE) * letter + CHANGE / VOCABULARY
        chances = (1 - NOISE) * letter + NOISE / VOCABULARY
        columns.append(-np.log(chances[np.arange(len(then)), then]))
    return np.stack(columns, axis=1)


@eqx.filter_jit
def losses(model, tokens, score):
    logits = jax.vmap(lambda x: model(x, score))(tokens[:, :-1])
    return surprise(logits, tokens[:, 1:])


def mean_loss(model, tokens, score):
    return losses(model, tokens, score).mean()


def main(argv: list[str] | None = None) -> float:
    flags = parser(__doc__, parts=("alibi",))
    add(flags, "--steps", 200)
    add(flags, "--batch", 32)
    add(flags, "--seq", 32, "tokens a sequence, in training", least=8)
    add(flags, "--times", 8, "how many times as long the others are", least=2)
    args = flags.parse_args(argv)
    alibi = eqa.ALiBi.standard(HEADS)
    nothing = eqa.ALiBi(jnp.zeros(HEADS))  # the same as no score
    if args.without == "alibi":
        alibi = nothing

    longest = args.times * args.seq
    text = draw(np.random.default_rng([args.seed, 1]), 64, longest)
    best, excess = best_losses(text), {}
    print(f"{'excess, nats':14}  up to {args.seq:4} tokens  beyond, up to {longest:5}")
    for name, score in (("with ALiBi", alibi), ("with nothing", nothing)):
        rng = np.random.default_rng(args.seed)
        batches = ((draw(rng, args.batch, args.seq), score) for _ in range(args.steps))
        model = LanguageModel(32, key=jr.key(args.seed))
        model = fit(model, mean_loss, batches, 1e-2)
        more = np.asarray(losses(model, text, score)) - best
        short = more[:, args.seq // 2 : args.seq].mean()
        excess[name] = more[:, args.seq :].mean()
        print(f"{name:14}  {short:17.3f}  {excess[name]:20.3f}")
    assert excess["with ALiBi"] < 0.12, "ALiBi does not reach beyond its training"
    assert excess["with nothing"] > 2 * excess["with ALiBi"], "ALiBi makes no difference"
    return float(excess["with ALiBi"])


if __name__ == "__main__":
    main()
