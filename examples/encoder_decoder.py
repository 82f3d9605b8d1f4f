"""An encoder and a decoder, with cross-attention, on sequences of different lengths.

    uv run examples/encoder_decoder.py
    uv run examples/encoder_decoder.py --without padding

Sets of tokens are sorted: the encoder reads a set in any order, and the decoder writes it
in order. Both sides are padded, and what the padding is has no influence.
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
from jaxtyping import PRNGKeyArray


VOCABULARY, MOST = 12, 8
END = 0  # it comes before the first token, and after the last


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    norms: list[eqx.nn.RMSNorm]
    attentions: list[Any]  # of eqa.MultiheadAttention
    feed_forwards: list[eqa.FeedForward]
    head: eqx.nn.Linear

    def __init__(self, width: int, heads: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 7)
        self.embedding = eqx.nn.Embedding(VOCABULARY, width, key=keys[0])
        self.norms = [eqx.nn.RMSNorm(width) for _ in range(6)]
        self.attentions = [eqa.MultiheadAttention(heads, width, key=k) for k in keys[1:4]]
        self.feed_forwards = [eqa.FeedForward(width, key=k) for k in keys[4:6]]
        self.head = eqx.nn.Linear(width, VOCABULARY, key=keys[6])

    def __call__(self, source, source_length, target, target_length, causal):
        """Both sides are tokens, `(seq,)`, and how many of these are no padding. Logits."""
        norms = [jax.vmap(norm) for norm in self.norms]
        encode, decode, cross = self.attentions
        in_source = eqa.Padding(source_length)
        in_target = eqa.Padding(target_length) & (eqa.Causal() if causal else eqa.Full())
        from_target = eqa.Padding(source_length, target_length)

        x = jax.vmap(self.embedding)(source)
        h = norms[0](x)
        x = x + encode(h, h, h, mask=in_source)
        x = norms[2](x + self.feed_forwards[0](norms[1](x)))

        y = jax.vmap(self.embedding)(target)
        h = norms[3](y)
        y = y + decode(h, h, h, mask=in_target)
        y = y + cross(norms[4](y), x, x, mask=from_target)
        y = y + self.feed_forwards[1](norms[5](y))
        return jax.vmap(self.head)(y)


@eqx.filter_jit
def logits(model, inputs, causal):
    return jax.vmap(lambda *x: model(*x, causal))(*inputs)


def loss(model, inputs, labels, real, causal):
    return jnp.mean(surprise(logits(model, inputs, causal), labels), where=real)


def main(argv: list[str] | None = None) -> float:
    flags = parser(__doc__, parts=("padding", "causal"))
    add(flags, "--steps", 150)
    add(flags, "--batch", 32)
    args = flags.parse_args(argv)
    rng, causal = np.random.default_rng(args.seed), args.without != "causal"

    def draw(batch: int):
        """What the model gets, what it should say, and where that is not padding."""
        lengths = rng.integers(1, MOST + 1, size=batch, dtype=np.int32)
        source = rng.permuted(np.tile(np.arange(1, VOCABULARY), (batch, 1)), axis=1)
        source = source[:, :MOST].astype(np.int32)  # padded with more tokens
        labels = np.full((batch, MOST + 1), END, np.int32)
        for label, tokens, n in zip(labels, source, lengths):
            label[:n] = np.sort(tokens[:n])
        real = np.arange(MOST + 1) <= lengths[:, None]
        if args.without == "padding":
            lengths = np.full_like(lengths, MOST)
        target = np.where(np.arange(MOST + 1) > 0, np.roll(labels, 1, axis=1), END)
        return (source, lengths, target, lengths + 1), labels, real

    model = Transformer(32, heads=4, key=jr.key(args.seed))
    batches = ((*draw(args.batch), causal) for _ in range(args.steps))
    model = fit(model, loss, batches, 5e-3)

    (source, source_length, target, target_length), labels, real = draw(args.batch)
    said = np.full((args.batch, MOST + 2), END, np.int32)
    for t in range(MOST + 1):
        given = (source, source_length, said[:, :-1], target_length)
        said[:, t + 1] = np.asarray(logits(model, given, causal))[:, t].argmax(-1)
    right = float(np.mean(((said[:, 1:] == labels) | ~real).all(1)))

    pads = np.where(real[:, 1:], source, END), np.where(real, target, END + 1)
    before, after = (
        np.asarray(logits(model, (x, source_length, y, target_length), causal))
        for x, y in ((source, target), pads)
    )
    moved = float(np.abs(after - before)[real].max())
    for i, n in enumerate(real[:3].sum(1) - 1):
        print(f"{str(source[i, :n]):22} is sorted as {said[i, 1 : n + 1]}")
    print(f"right       {right:.3f} of {args.batch} new sets, one token after another")
    print(f"padding     other tokens in it move logits by {moved:.1e}")
    assert right > 0.9, f"only {right:.3f} are sorted"
    assert moved == 0, "padding has an influence"
    return right


if __name__ == "__main__":
    main()
