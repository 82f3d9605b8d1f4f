"""The optimiser, one training step, and the validation loss."""

from collections.abc import Callable

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

from .checkpoint import Checkpoint
from .config import RunConfig
from .data import batch_starts, cut, held_out_windows, Split
from .model import LanguageModel, losses


class State(eqx.Module):
    """All that changes during a run, and thus all that a checkpoint must hold. Nothing of
    the order of the data is in it but the number of the step."""

    model: LanguageModel
    opt_state: optax.OptState
    step: Int32[Array, ""]
    train_loss: Float[Array, " steps"]  # of each step; NaN for those to come
    validation_loss: Float[Array, " steps"]  # after each step; NaN where not computed


def optimiser(config: RunConfig) -> optax.GradientTransformation:
    warmup = config.steps // 20
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.lr / (warmup + 1),
        peak_value=config.lr,
        warmup_steps=warmup,
        decay_steps=config.steps,
        end_value=config.lr / 20,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=config.weight_decay,
            # The weights of norms are no matrices, and not decayed.
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


@eqx.filter_jit
def init_state(config: RunConfig, attention: eqa.AttentionConfig | None = None) -> State:
    model = LanguageModel(config, attention, key=jr.key(config.seed))
    return State(
        model=model,
        opt_state=optimiser(config).init(eqx.filter(model, eqx.is_inexact_array)),
        step=jnp.array(0, jnp.int32),
        train_loss=jnp.full(config.steps, jnp.nan, jnp.float32),
        validation_loss=jnp.full(config.steps, jnp.nan, jnp.float32),
    )


def restore(saved: Checkpoint) -> tuple[RunConfig, State]:
    """What a checkpoint of `train_lm.py` holds."""
    config = RunConfig(**saved.header["config"])
    like = eqx.filter_eval_shape(init_state, config)  # shapes and dtypes, no numbers
    return config, saved.restore(like)


# The old state's memory is reused for the new one: all arguments but the first are donated.
@eqx.filter_jit(donate="all-except-first")
def train_step(constants: tuple[RunConfig, UInt8[Array, " train"]], state: State) -> State:
    config, text = constants
    starts = batch_starts(config.seed, state.step, config.batch, len(text) - config.seq)
    tokens = cut(text, starts, config.seq + 1)
    return updated(config, state, lambda model: losses(model, tokens).mean())


def updated(
    config: RunConfig, state: State, loss_of: Callable[[LanguageModel], Float[Array, ""]]
) -> State:
    """The state after a step down the gradient of a loss."""
    loss, grads = eqx.filter_value_and_grad(loss_of)(state.model)
    updates, opt_state = optimiser(config).update(
        grads, state.opt_state, eqx.filter(state.model, eqx.is_inexact_array)
    )
    return State(
        model=eqx.apply_updates(state.model, updates),
        opt_state=opt_state,
        step=state.step + 1,
        train_loss=state.train_loss.at[state.step].set(loss),
        validation_loss=state.validation_loss,
    )


@eqx.filter_jit
def _scored_loss(
    model: LanguageModel,
    text: UInt8[Array, " text"],
    starts: Int[Array, " batch"],
    scored: Bool[Array, "batch seq"],
) -> Float[Array, ""]:
    tokens = cut(text, starts, scored.shape[1] + 1)
    return jnp.sum(losses(model, tokens), where=scored)


def evaluate(model: LanguageModel, split: Split, seq: int, batch: int = 16) -> float:
    """Mean loss over the held-out bytes, in nats a byte."""
    text = jnp.asarray(np.concatenate(split))
    windows = held_out_windows(len(split.train), len(split.held_out), seq)
    # The last batch is filled up with windows of which nothing is scored.
    missing = -len(windows.starts) % batch
    starts = np.pad(windows.starts, (0, missing)).reshape(-1, batch)
    scored = np.pad(windows.scored, ((0, missing), (0, 0))).reshape(-1, batch, seq)
    total = sum(
        float(_scored_loss(model, text, jnp.asarray(s), jnp.asarray(m)))
        for s, m in zip(starts, scored)
    )
    return total / len(split.held_out)
