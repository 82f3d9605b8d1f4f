"""Documents packed in rows, without padding: the same numbers as one document a row.

    uv run examples/packed_documents.py
    uv run examples/packed_documents.py --without segments

Three things make it so. `Segments` keeps attention within a document; positions start anew
with each; and the last token of a document does not predict the first of the next one. Then
logits, loss and gradients are those of documents that are padded to rows of their own.
"""

from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from gallery.flags import add, parser
from gallery.packing import lay_out, pack, PADDING
from gallery.train import surprise
from jaxtyping import Array, Float, Int, PRNGKeyArray


VOCABULARY = 64


class LanguageModel(eqx.Module):
    embedding: Float[Array, "vocabulary width"]
    position: Float[Array, "positions width"]
    attention: Any  # an eqa.MultiheadAttention
    feed_forward: eqa.FeedForward

    def __init__(self, longest: int, width: int, heads: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        self.embedding = jr.normal(keys[0], (VOCABULARY, width))
        self.position = jr.normal(keys[1], (longest, width))
        config = eqa.AttentionConfig(mask=eqa.Causal())
        self.attention = eqa.MultiheadAttention(heads, width, attention=config, key=keys[2])
        self.feed_forward = eqa.FeedForward(width, key=keys[3])

    def __call__(
        self,
        tokens: Int[Array, " seq"],
        positions: Int[Array, " seq"],
        mask: eqa.AbstractMask,
    ) -> Float[Array, "seq vocabulary"]:
        x = self.embedding[tokens] + self.position[positions]
        x = x + self.attention(x, x, x, mask=mask)
        x = x + self.feed_forward(x)
        return x @ self.embedding.T / x.shape[1]


@eqx.filter_jit
@eqx.filter_value_and_grad(has_aux=True)
def loss(model, tokens, segments, positions, scored, with_segments):
    """The mean loss where it is scored; and all logits."""

    def row(tokens, segments, positions):
        mask = eqa.Segments(segments) if with_segments else eqa.Full()
        return model(tokens, positions, mask)

    logits = jax.vmap(row)(tokens, segments, positions)
    return jnp.mean(surprise(logits[:, :-1], tokens[:, 1:]), where=scored), logits


def main(argv: list[str] | None = None) -> float:
    flags = parser(__doc__, parts=("segments", "positions", "borders"))
    add(flags, "--documents", 64)
    add(flags, "--seq", 128, "tokens a row, and of the longest document", least=2)
    args = flags.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    lengths = 2 + ((args.seq - 1) * rng.uniform(size=args.documents) ** 3).astype(int)
    documents = [rng.integers(VOCABULARY, size=n, dtype=np.int32) for n in lengths]
    model = LanguageModel(args.seq, 32, heads=4, key=jr.key(args.seed))

    results = []
    for name, rows in (
        ("padded", [[number] for number in range(len(documents))]),
        ("packed", pack(documents, args.seq)),
    ):
        tokens, segments, positions = lay_out(documents, rows, args.seq)
        scored = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != PADDING)
        with_segments = name == "packed" and args.without != "segments"
        if name == "packed" and args.without == "positions":
            positions = np.broadcast_to(np.arange(args.seq), tokens.shape)
        if name == "packed" and args.without == "borders":
            scored = segments[:, 1:] != PADDING
        (value, logits), grads = loss(
            model, tokens, segments, positions, scored, with_segments
        )
        # In the order of the documents.
        order = np.argsort(segments[segments != PADDING], kind="stable")
        logits = np.asarray(logits)[segments != PADDING][order]
        results.append((logits, value, jax.tree.leaves(grads)))
        print(
            f"{name}      {len(rows):3} rows, {len(logits) / tokens.size:4.0%} of them "
            f"tokens: a loss of {value:.6f}"
        )
    (logits, value, grads), (logits_packed, value_packed, grads_packed) = results
    errors = [
        difference(logits_packed, logits),
        difference(value_packed, value),
        max(difference(a, b) for a, b in zip(grads_packed, grads)),
    ]
    print(
        "differ by   {:.0e} in logits, {:.0e} in loss, {:.0e} in gradients".format(*errors)
    )
    assert max(errors) < 1e-4, "packed documents are not what they are alone"
    return max(errors)


def difference(x, y) -> float:
    """The largest, relative to the largest number."""
    return float(np.abs(x - y).max() / np.abs(y).max())


if __name__ == "__main__":
    main()
