"""Trains through the log-sum-exp: attention in two parts that are merged, and a z-loss.

    uv run examples/logsumexp.py
    uv run examples/logsumexp.py --without mask    # sees what is not there, and fails

A memory and the recent tokens are attended to on their own. Merged, that is attention to
both, gradients included. A z-loss keeps the log-sum-exp small, so that logits do not grow.
"""

import functools as ft

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from gallery.flags import flags
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Data(eqx.Module):
    """Each query is for what one token says: of the memory, or of those that follow it."""

    length: Int[Array, " batch"]  # of what is in the memory
    query: Float[Array, "batch seq size"]
    key: Float[Array, "batch memory+seq size"]
    value: Float[Array, "batch memory+seq size"]
    target: Float[Array, "batch seq size"]


def merged(q, k, v, data: Data, masked: bool = True, through: bool = True):
    """`through` the log-sum-exps: otherwise, wrongly, their gradients are dropped."""
    memory = k.shape[1] - q.shape[1]
    masks = (eqa.Padding(data.length), eqa.Causal()) if masked else (eqa.Full(),) * 2
    partials = []
    for part, mask in zip((slice(None, memory), slice(memory, None)), masks):
        out, lse = eqa.attend(q, k[:, part], v[:, part], mask=mask, return_lse=True)
        partials.append((out, lse if through else jax.lax.stop_gradient(lse)))
    return eqa.merge(partials)


def at_once(q, k, v, data: Data):
    """The same by the formula, for comparison."""
    seq, memory = q.shape[1], k.shape[1] - q.shape[1]
    index = jnp.arange(memory + seq)
    stored = index < data.length[:, None, None]
    recent = (index >= memory) & (index - memory <= jnp.arange(seq)[:, None])
    logits = jnp.einsum("bqhd,bkhd->bqk", q, k) / q.shape[-1] ** 0.5
    logits = jnp.where(stored | recent, logits, -jnp.inf)
    out = jnp.einsum("bqk,bkhd->bqhd", jax.nn.softmax(logits), v)
    return out, jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def loss_of(model: Float[Array, "2 size size"], data: Data, z, attention=merged):
    q, k = data.query @ model[0], data.key @ model[1]
    out, lse = attention(q[:, :, None], k[:, :, None], data.value[:, :, None], data)
    error = jnp.mean((out[:, :, 0] - data.target) ** 2)
    return error + z * jnp.mean(lse**2), (error, jnp.sqrt(jnp.mean(lse**2)))


@eqx.filter_jit
def gradient(model: Array, data: Data, z: float, attention) -> Array:
    return jax.grad(loss_of, has_aux=True)(model, data, z, attention)[0]


def data_of(rng: PRNGKeyArray, batch: int, memory: int, seq: int, size: int) -> Data:
    keys = jr.split(rng, 3)
    length = jr.randint(keys[0], (batch, 1), memory // 2, memory + 1)
    key, value = jr.normal(keys[1], (2, batch, memory + seq, size))
    key = key.at[..., 0].set(1)  # a constant, by which all logits can be lowered
    # Any that is in the memory, or not later than the query.
    wanted = jr.randint(keys[2], (batch, seq), 0, length + jnp.arange(1, seq + 1))
    wanted = jnp.where(wanted < length, wanted, wanted - length + memory)
    take = jax.vmap(lambda x, i: x[i])
    return Data(length[:, 0], take(key, wanted), key, value, take(value, wanted))


@eqx.filter_jit
def train(model: Array, rng: PRNGKeyArray, z: Array, steps: int, sizes: tuple):
    """The squared error and the size of the log-sum-exp, at the end."""
    optimiser = optax.adam(0.03)

    def step(carry, rng):
        model, state = carry
        grads, aux = jax.grad(loss_of, has_aux=True)(model, data_of(rng, *sizes), z)
        updates, state = optimiser.update(grads, state)
        return (model + updates, state), aux

    _, results = jax.lax.scan(step, (model, optimiser.init(model)), jr.split(rng, steps))
    return [x[-20:].mean() for x in results]


def main(argv: list[str] | None = None) -> None:
    defaults: dict = dict(steps=200, batch=16, memory=16, seq=16, size=8, z=1e-3)
    args = flags(argv, __doc__, "mask", **defaults)
    sizes = args.batch, args.memory, args.seq, args.size
    model = jr.normal(jr.key(0), (2, args.size, args.size)) / args.size**0.5
    data = eqx.filter_jit(data_of)(jr.key(1), *sizes)
    ours = ft.partial(merged, masked=not args.without)
    exact = np.asarray(gradient(model, data, args.z, at_once))
    for name, way in ("merged", ours), ("cut", ft.partial(ours, through=False)):
        error = np.linalg.norm(gradient(model, data, args.z, way) - exact)
        error = error / np.linalg.norm(exact)
        print(f"{name:8} gradient differs by {error:.1e}")
        assert (error < 1e-5) == (name == "merged"), "not the gradient of attention to both"

    largest = float("inf")
    for z in (0.0, args.z):
        error, lse = train(model, jr.key(2), jnp.asarray(z), args.steps, sizes)
        print(f"z={z:<6g} squared error {error:.3f}, log-sum-exp {lse:.2f}")
        assert error < 0.5, "it is not learned where to look"
        assert lse < 0.5 * largest, "the z-loss does not keep the log-sum-exp small"
        largest = lse


if __name__ == "__main__":
    main()
