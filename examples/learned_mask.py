"""A mask that the model computes: tokens see those that it puts in the same group.

    uv run examples/learned_mask.py
    uv run examples/learned_mask.py --without mask    # all see all, and fails

Tokens of several sources come mixed, and each has to say what its source says on average.
A router puts each token in a group. It learns by a score, through which gradients flow: a
pair counts as much as it is likely to be of one group. Then each token is put in its
likeliest group for good, and a mask hides the others.
"""

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from gallery.flags import flags
from jaxtyping import Array, Float, PRNGKeyArray


def likely_the_same(logit, q_pos, kv_pos, head, q_group, kv_group, params):
    """Adds the logarithm of the probability that both are of one group."""
    same = sum(q * kv for q, kv in zip(q_group, kv_group))  # over all groups
    return logit + jnp.log(same + 1e-9)


def the_same(q_pos, kv_pos, head, q_group, kv_group, params):
    return q_group == kv_group


class GroupAttention(eqx.Module):
    router: eqx.nn.Linear

    def __call__(
        self, x: Float[Array, "seq features"], value: Float[Array, "seq size"], how: str
    ) -> Float[Array, "seq size"]:
        logits = jax.vmap(self.router)(x)
        mask, score = eqa.Full(), ()
        if how == "soft":
            # One array a group, each with one number a token.
            groups = tuple(jax.nn.softmax(logits).T)
            score = eqa.ScoreFn(likely_the_same, q_features=groups, kv_features=groups)
        elif how == "hard":
            group = jnp.argmax(logits, axis=-1)
            mask = eqa.Predicate(the_same, q_features=group, kv_features=group)
        # Of queries and keys of zeros, so that only the group counts.
        zeros = jnp.zeros((len(x), 1, 1))
        return eqa.attend(zeros, zeros, value[:, None], mask=mask, score=score)[:, 0]


def batch_of(key: PRNGKeyArray, batch: int, seq: int, groups: int) -> tuple[Array, ...]:
    """Where tokens lie, what they say, and what their source says on average."""
    source_key, x_key, mean_key, value_key = jr.split(key, 4)
    source = jr.randint(source_key, (batch, seq), 0, groups)
    # Sources lie on a circle, and their tokens near them.
    angle = 2 * jnp.pi * source.astype(jnp.float32) / groups
    x = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    x = x + 0.15 * jr.normal(x_key, x.shape)
    one_hot = jax.nn.one_hot(source, groups)
    value = one_hot @ jr.normal(mean_key, (batch, groups, 4))
    value = value + jr.normal(value_key, value.shape)
    total = jnp.einsum("bsg,bsc->bgc", one_hot, value)
    mean = total / jnp.maximum(one_hot.sum(axis=1), 1)[..., None]
    return x, value, one_hot @ mean


def loss_of(model: GroupAttention, data: tuple[Array, ...], how: str) -> Float[Array, ""]:
    x, value, target = data
    out = jax.vmap(lambda x, value: model(x, value, how))(x, value)
    return jnp.mean((out - target) ** 2)


@eqx.filter_jit
def train(
    model: GroupAttention, key: PRNGKeyArray, steps: int, sizes: tuple, lr: float
) -> GroupAttention:
    optimiser = optax.adam(lr)

    def step(carry, key):
        model, state = carry
        grads = eqx.filter_grad(loss_of)(model, batch_of(key, *sizes), "soft")
        updates, state = optimiser.update(grads, state)
        return (eqx.apply_updates(model, updates), state), None

    carry = (model, optimiser.init(eqx.filter(model, eqx.is_inexact_array)))
    return jax.lax.scan(step, carry, jr.split(key, steps))[0][0]


def main(argv: list[str] | None = None) -> None:
    args = flags(argv, __doc__, "mask", steps=200, batch=16, seq=48, groups=3, lr=0.05)
    sizes = (args.batch, args.seq, args.groups)
    model = GroupAttention(eqx.nn.Linear(2, args.groups, key=jr.key(0)))
    trained = train(model, jr.key(1), args.steps, sizes, args.lr)
    data = eqx.filter_jit(batch_of)(jr.key(2), *sizes)
    evaluate = eqx.filter_jit(loss_of)
    before, soft = (float(evaluate(x, data, "soft")) for x in (model, trained))
    hard = float(evaluate(trained, data, "none" if args.without else "hard"))
    print(f"squared error  {before:.4f} before training")
    print(f"               {soft:.4f} after, by the score that it learned with")
    print(f"               {hard:.1e} by the mask that it has become")
    assert soft < 0.1 * before, "the router has not learned the groups"
    assert hard < 1e-10, "the mask is not that of the groups"


if __name__ == "__main__":
    main()
