"""A vision transformer that fills in missing patches, by a bias for each offset.

    uv run examples/vit.py
    uv run examples/vit.py --without bias

What a missing patch should look like is known from those around it, if the block knows
which these are. Without the bias it does not, and can but fill in the same for all.
"""

from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from gallery.flags import add, parser
from gallery.train import fit
from jaxtyping import Array, Float, PRNGKeyArray


PATCH = 4


class Block(eqx.Module):
    """A block of a vision transformer, of images of `side * side` patches."""

    table: Float[Array, "heads offsets"]
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]
    attention: Any  # an eqa.MultiheadAttention
    feed_forward: eqa.FeedForward
    side: int = eqx.field(static=True)

    def __init__(self, side: int, width: int, heads: int, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.table = jnp.zeros((heads, (2 * side - 1) ** 2))
        self.norms = (eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width))
        self.attention = eqa.MultiheadAttention(heads, width, key=keys[0])
        self.feed_forward = eqa.FeedForward(width, key=keys[1])
        self.side = side

    @property
    def bias(self) -> eqa.Bias:
        row, column = np.divmod(np.arange(self.side**2), self.side)
        down, right = (x[None, :] - x[:, None] + self.side - 1 for x in (row, column))
        return eqa.Bias(self.table[:, down * (2 * self.side - 1) + right])

    def __call__(self, x: Float[Array, "patches width"]) -> Float[Array, "patches width"]:
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, score=self.bias)
        return x + self.feed_forward(jax.vmap(self.norms[1])(x))


class Painter(eqx.Module):
    embedding: eqx.nn.Linear
    missing: Float[Array, " width"]
    block: Block
    head: eqx.nn.Linear

    def __init__(self, side: int, width: int, heads: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        self.embedding = eqx.nn.Linear(PATCH**2, width, key=keys[0])
        self.missing = jr.normal(keys[1], (width,))
        self.block = Block(side, width, heads, key=keys[2])
        self.head = eqx.nn.Linear(width, PATCH**2, key=keys[3])

    def __call__(self, patches, shown) -> Float[Array, "patches pixels"]:
        x = jax.vmap(self.embedding)(patches)
        x = jnp.where(shown[:, None], x, self.missing)
        return jax.vmap(self.head)(self.block(x))


def draw(rng: np.random.Generator, batch: int, side: int):
    """Sums of three waves, as patches; and which patches are shown."""
    y, x = np.mgrid[: side * PATCH, : side * PATCH] / (side * PATCH)
    down, right, phase = rng.uniform(-2, 2, size=(3, batch, 3, 1, 1))
    images = np.sin(2 * np.pi * (down * y + right * x + phase)).sum(1).astype(np.float32)
    images = images.reshape(batch, side, PATCH, side, PATCH).swapaxes(2, 3)
    shown = rng.permuted(np.tile(np.arange(side**2) % 4 > 0, (batch, 1)), axis=1)
    return images.reshape(batch, side**2, PATCH**2), shown


@eqx.filter_jit
def paint(model, patches, shown, with_bias):
    model = eqx.tree_at(lambda m: m.block.table, model, with_bias * model.block.table)
    return jax.vmap(model)(patches, shown)


def loss(model, patches, shown, with_bias):
    error = paint(model, patches, shown, with_bias) - patches
    return jnp.mean(error**2, where=~shown[..., None])


def main(argv: list[str] | None = None) -> float:
    flags = parser(__doc__, parts=("bias",))
    add(flags, "--steps", 300)
    add(flags, "--batch", 32)
    add(flags, "--side", 6, "patches a row", least=3)
    args = flags.parse_args(argv)
    rng, with_bias = np.random.default_rng(args.seed), np.float32(args.without is None)

    batches = ((*draw(rng, args.batch, args.side), with_bias) for _ in range(args.steps))
    model = Painter(args.side, 32, heads=4, key=jr.key(args.seed))
    model = fit(model, loss, batches, 1e-2)
    patches, shown = draw(rng, 256, args.side)
    error = np.asarray(paint(model, patches, shown, with_bias)) - patches
    rest = (patches - patches.mean((1, 2), keepdims=True))[~shown]
    unexplained = float(np.mean(error[~shown] ** 2) / np.mean(rest**2))
    print(f"unexplained {unexplained:.3f} of the variance within images")
    print("bias        of the patches around a patch, mean of the heads")
    bias = np.asarray(model.block.table).mean(0).reshape(2 * args.side - 1, -1)
    for row in bias[args.side - 3 : args.side + 2, args.side - 3 : args.side + 2]:
        print("           ", *(f"{x:4.1f}" for x in row))
    assert unexplained < 0.7, f"{unexplained:.3f} of the variance is unexplained"
    return unexplained


if __name__ == "__main__":
    main()
