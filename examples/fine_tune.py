"""Fine-tunes a model by adapters of low rank (LoRA), and leaves all else as it is.

    uv run examples/fine_tune.py
    uv run examples/fine_tune.py --without mask    # sees what comes later, and fails

The model says, at each token, the mean over the tokens so far of some linear function of
them. It is trained for one function, and then fine-tuned for another, which differs from
the first by a matrix of low rank.
"""

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from gallery.flags import flags
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


class LoRA(eqx.Module):
    """A linear map, and a change of low rank, which starts at nothing."""

    linear: eqx.nn.Linear
    down: Float[Array, "rank in"]
    up: Float[Array, "out rank"]

    def __init__(self, linear: eqx.nn.Linear, rank: int, key: PRNGKeyArray):
        out_size, in_size = linear.weight.shape
        self.linear = linear
        self.down = jr.normal(key, (rank, in_size)) / in_size**0.5
        self.up = jnp.zeros((out_size, rank))

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.linear(x) + self.up @ (self.down @ x)

    def merged(self) -> eqx.nn.Linear:
        """The same as one matrix, as fast as before."""
        weight = self.linear.weight + self.up @ self.down
        return eqx.tree_at(lambda x: x.weight, self.linear, weight)


def adapted(model: eqa.MultiheadAttention) -> list:
    """The maps that have adapters."""
    return [model.value_proj, model.output_proj]


def is_trained(model: eqa.MultiheadAttention) -> PyTree[bool]:
    """`True` for the arrays of adapters, and `False` for all others."""
    arrays = lambda x: [y for lora in adapted(x) for y in (lora.down, lora.up)]  # noqa: E731
    nothing = jax.tree.map(lambda _: False, model)
    return eqx.tree_at(arrays, nothing, replace_fn=lambda _: True)


def batch_of(key: PRNGKeyArray, matrix: Float[Array, "out in"], batch: int, seq: int):
    """Tokens, and the mean of a function of them, up to each."""
    x = jr.normal(key, (batch, seq, matrix.shape[1]))
    number = jnp.arange(1, seq + 1, dtype=x.dtype)[:, None]
    return x, jnp.cumsum(x @ matrix.T, axis=1) / number


@eqx.filter_jit
def train(model, which, matrix, key, steps: int, batch: int, seq: int, lr: float):
    """Trains the leaves of the model that `which` says. No other is touched."""
    params, frozen = eqx.partition(model, which)
    optimiser = optax.adam(lr)

    def loss_of(params, key):
        x, y = batch_of(key, matrix, batch, seq)
        model = eqx.combine(params, frozen)
        return jnp.mean((jax.vmap(lambda x: model(x, x, x))(x) - y) ** 2)

    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, key)
        updates, state = optimiser.update(grads, state)
        return (eqx.apply_updates(params, updates), state), loss

    carry = (params, optimiser.init(params))
    (params, _), losses = jax.lax.scan(step, carry, jr.split(key, steps))
    return eqx.combine(params, frozen), (losses[0], losses[-1])


def main(argv: list[str] | None = None) -> None:
    sizes = dict(steps=300, batch=16, seq=16, width=16, rank=2)
    args = flags(argv, __doc__, "mask", multiples=dict(width=2), **sizes, lr=5e-3)
    keys = jr.split(jr.key(0), 6)
    old = jr.normal(keys[0], (args.width, args.width)) / args.width**0.5
    up, down = jr.normal(keys[1], (2, args.width, args.rank)) / args.width**0.5
    config = eqa.AttentionConfig(mask=eqa.Full() if args.without else eqa.Causal())
    model = eqa.MultiheadAttention(2, args.width, attention=config, key=keys[2])
    options = (args.steps, args.batch, args.seq, args.lr)

    model, (first, last) = train(model, eqx.is_inexact_array, old, keys[3], *options)
    print(f"first function   loss {first:.1e} -> {last:.1e}")
    assert last < 0.05 * first, "the first function is not learned"

    adapters = [LoRA(x, args.rank, keys[4]) for x in adapted(model)]
    start = eqx.tree_at(adapted, model, adapters)
    new = old + up @ down.T
    tuned, (first, last) = train(start, is_trained(start), new, keys[5], *options)
    print(f"second function  loss {first:.1e} -> {last:.1e}")
    assert last < 0.05 * first, "the second function is not learned"

    (few, frozen), (_, before) = (eqx.partition(x, is_trained(x)) for x in (tuned, start))
    arrays = [jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (few, frozen)]
    few, others = (sum(x.size for x in part) for part in arrays)
    same = eqx.tree_equal(frozen, before)
    print(f"trained          {few} numbers; {others} others the same, bit by bit: {same}")
    assert same, "a frozen array has changed"

    merged = eqx.tree_at(adapted, tuned, [x.merged() for x in adapted(tuned)])
    x = jr.normal(keys[5], (args.seq, args.width))
    error = float(jnp.abs(merged(x, x, x) - tuned(x, x, x)).max())
    print(f"merged           differs by {error:.1e}")
    assert error < 1e-5, "the adapters are not merged"


if __name__ == "__main__":
    main()
