"""A training step of which each device has a part of the tokens, and the whole model.

All but attention is done token by token, so that nothing else moves anything from device to
device, until the gradients are added up.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree, UInt8

from .config import RunConfig
from .data import batch_starts
from .model import LanguageModel, surprise
from .train import init_state, State, updated


MECHANISMS = ("ring", "ulysses", "all_gather")


class Tokens(NamedTuple):
    """Those of a batch, in the order in which they lie on the devices."""

    inputs: Int[Array, "batch seq"]
    targets: Int[Array, "batch seq"]
    positions: Int[Array, "batch seq"]


def mean_loss(model: LanguageModel, mesh: Mesh, tokens: Tokens) -> Float[Array, ""]:
    """Each device computes the losses of its own tokens."""
    arrays, rest = eqx.partition(model, eqx.is_array)

    @jax.shard_map(mesh=mesh, in_specs=(P(), P(None, "sp")), out_specs=P())
    def of_device(arrays, tokens):
        # Each has the whole model; their gradients are added up once, and here.
        model = eqx.combine(jax.lax.pcast(arrays, "sp", to="varying"), rest)
        logits, _ = jax.vmap(lambda x, at: model(x, positions=at))(
            tokens.inputs, tokens.positions
        )
        return jax.lax.pmean(surprise(logits, tokens.targets).mean(), "sp")

    return of_device(arrays, tokens)


# The old state's memory is reused for the new one.
@eqx.filter_jit(donate="all-except-first")
def train_step(constants: tuple[RunConfig, Mesh, Tokens], state: State) -> State:
    config, mesh, tokens = constants
    return updated(config, state, lambda model: mean_loss(model, mesh, tokens))


class Program:
    """A training step over some devices. Each process has all of the text."""

    def __init__(
        self,
        config: RunConfig,
        mechanism: str,
        text: UInt8[np.ndarray, " train"],
        devices: Sequence[Any],
    ):
        self.config, self.text = config, text
        n, auto = len(devices), (AxisType.Auto,)
        self.mesh = jax.make_mesh((n,), ("sp",), auto, devices=devices)
        # A causal ring is balanced in the zigzag layout; a window reaches less far without.
        zigzag = mechanism == "ring" and config.mask == "causal"
        self.layout: Literal["zigzag", "contiguous"] = "zigzag" if zigzag else "contiguous"
        chosen = eqa.Ring(layout=self.layout) if mechanism == "ring" else mechanism
        self.attention = dataclasses.replace(
            config.attention, mechanism=chosen, sharding=eqa.Sharding(sequence="sp")
        )

    def init(self) -> State:
        return self._place(init_state(self.config, self.attention), P())

    def constants(self, number: int) -> tuple[RunConfig, Mesh, Tokens]:
        """What the step of that number is given, besides the state. Its tokens are laid
        out: but for the ring, nothing knows of that."""
        config, seq = self.config, np.arange(self.config.seq + 1)
        last = len(self.text) - config.seq
        starts = np.asarray(batch_starts(config.seed, number, config.batch, last))
        tokens = self.text[starts[:, None] + seq].astype(np.int32)
        positions = np.broadcast_to(seq[:-1].astype(np.int32), tokens[:, 1:].shape)
        tokens = (tokens[:, :-1], tokens[:, 1:], positions)
        tokens = Tokens(*(eqa.to_layout(x, self.mesh.size, self.layout) for x in tokens))
        return config, self.mesh, self._place(tokens, P(None, "sp"))

    def compiled(self, state: State) -> Any:
        """The training step."""
        return train_step.lower(self.constants(0), state).compile()

    def explain(self) -> str:
        """How the tokens of different devices meet."""
        config = self.config
        q, k = (
            jnp.zeros((config.batch, config.seq, heads, config.head_dim))
            for heads in (config.heads, config.kv_heads)
        )
        attention = eqa.Attention.from_config(self.attention, mesh=self.mesh)
        return attention.explain(q, k, k).partition("\nmechanisms:")[0]

    def _place(self, tree: PyTree, spec: P) -> PyTree:
        """Arrays that each process has, as arrays over the devices of all of them."""
        sharding = NamedSharding(self.mesh, spec)

        def place(x):
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.tree.map(place, arrays), rest)
