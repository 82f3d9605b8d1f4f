"""How the examples train."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def fit(
    model: Any,
    loss: Callable[..., Any],
    batches: Iterable[tuple[Any, ...]],
    learning_rate: float,
) -> Any:
    """The model after a step of Adam for each batch, down the gradient of
    `loss(model, *batch)`."""
    state = optax.adam(learning_rate).init(eqx.filter(model, eqx.is_inexact_array))
    for batch in batches:
        model, state = _step(loss, learning_rate, model, state, batch)
    return model


@eqx.filter_jit
def _step(loss, learning_rate, model, state, batch):
    grads = eqx.filter_grad(loss)(model, *batch)
    updates, state = optax.adam(learning_rate).update(grads, state)
    return eqx.apply_updates(model, updates), state


def surprise(
    logits: Float[Array, "*batch vocabulary"], labels: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Negative log-likelihood of each label, in nats."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
