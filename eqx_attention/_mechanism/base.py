from abc import abstractmethod
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._axes import axes
from .._dropout import Dropout
from .._dtype import accumulation_dtype
from .._keys import is_stored, Keys
from .._mask import AbstractMask
from .._score import AbstractScore
from .._static import Static
from .._tokens import Tokens
from .varying import vary, varying_axes


class Pairs(eqx.Module):
    """All that is said of (query token, key token) pairs, but for their logits' dot
    products. Each array has the axes (batch, head, query, key, *rest), of size one where it
    does not have the axis."""

    mask: AbstractMask
    score: tuple[AbstractScore, ...]
    scale: Static | Float[Array, "..."] = axes("head")
    dropout: Dropout | None
    q: Tokens
    kv: Tokens
    head: Int[Array, "1 head query 1"] | None = axes("head")


class Split(NamedTuple):
    """The mesh axes, each with its size, over which the tokens of a request are split: the
    request then is what one device holds of it, inside of a `jax.shard_map`.

    Arrays of `Request.pairs` that have the axis of queries, or of keys, hold those of this
    device; but those that have both hold this device's queries and the keys of all.

    `chunks` are the numbers of those chunks of the sequence that each device has, in its
    order; by default, the first device has the first tokens, and so on.
    """

    query: tuple[tuple[str, int], ...] = ()
    key: tuple[tuple[str, int], ...] = ()
    chunks: tuple[tuple[int, ...], ...] | None = None


class Request(eqx.Module):
    """What a mechanism is asked for: everything but the sinks, with one batch axis.

    - `query`: `"batch q_len q_heads head_dim"`
    - `key_`: `"batch kv_len kv_heads head_dim"`
    - `value`: `"batch kv_len kv_heads value_dim"`; both may be an
        [`eqx_attention.AbstractKeys`][] where the caller has them so.
    - `platform`: `"cpu"`, `"gpu"` or `"tpu"`, where this will run.
    - `result_dtype`: that of the output and of the gradients of `query`, `key_` and
        `value`: the dtype of accumulation where they are only a part of the whole.
    - `split`: over which mesh axes the tokens are split, if they are.
    """

    query: Float[Array, "batch q_len q_heads head_dim"]
    key_: Float[Keys, "batch kv_len kv_heads head_dim"]
    value: Float[Keys, "batch kv_len kv_heads value_dim"]
    pairs: Pairs
    precision: str | None = eqx.field(static=True)
    platform: str = eqx.field(static=True)
    result_dtype: Any = eqx.field(static=True)
    split: Split = eqx.field(static=True, default=Split())

    @property
    def dtype(self):
        """The dtype of statistics and accumulation."""
        return accumulation_dtype(self.query.dtype)

    @property
    def operand_dtype(self):
        """The dtype of the operands of both matrix products.

        CPUs have no products of 16-bit floats that are faster than those of float32.
        """
        return self.dtype if self.platform == "cpu" else self.query.dtype

    def full(self, shape: tuple[int, ...], value: float = 0) -> Array:
        """An array in the dtype of accumulation, to start a loop with."""
        return vary(jnp.full(shape, value, self.dtype), varying_axes(self.query))

    @property
    def lengths(self) -> tuple[int, int]:
        """`(q_len, kv_len)`."""
        return self.query.shape[1], self.key_.shape[1]

    @property
    def groups(self) -> int:
        """How many query heads read one key head."""
        return self.query.shape[2] // self.key_.shape[2]


def heads_unsupported(request: Request, largest: int) -> tuple[str, ...]:
    """Why a mechanism refuses the sizes of heads, if it takes those up to `largest`."""
    sizes = {"head_dim": request.query.shape[-1], "value_dim": request.value.shape[-1]}
    return tuple(
        f"{name} must be from 1 to {largest}, and is {size}"
        for name, size in sizes.items()
        if not 1 <= size <= largest
    )


def stored_unsupported(request: Request) -> tuple[str, ...]:
    """Why mechanisms that need arrays of all keys refuse, if they do."""
    for name, x in (("key_", request.key_), ("value", request.value)):
        if is_stored(x):
            kind = type(x).__name__
            return (f"it needs arrays of keys and values, and {name} is {kind}",)
    return ()


class Blocks(NamedTuple):
    """The size of a tile: how many batch elements, key heads, query and key tokens."""

    batch: int
    heads: int
    query: int
    key: int


Gradients = tuple[Array, Array, Array, tuple[Array, ...]]


class AbstractMechanism(eqx.Module):
    """Does the arithmetic of attention. Every mechanism accepts every mask and every score,
    or refuses with a reason."""

    @abstractmethod
    def unsupported(self, request: Request) -> tuple[str, ...]:
        """The reasons for which a request is refused; none if it is accepted.

        It looks at static facts alone: shapes, dtypes, types, the platform.
        """

    @abstractmethod
    def forward(
        self, request: Request
    ) -> tuple[
        Float[Array, "batch q_len q_heads value_dim"], Float[Array, "batch q_len q_heads"]
    ]:
        """Attends.

        **Returns:**

        `(out, lse)`, both in the dtype of accumulation, or `out` in that of the result.
        Rows that see no key are 0 and $-\\infty$.
        """

    @abstractmethod
    def backward(
        self,
        request: Request,
        out: Float[Array, "batch q_len q_heads value_dim"],
        lse: Float[Array, "batch q_len q_heads"],
        dout: Float[Array, "batch q_len q_heads value_dim"],
        dlse: Float[Array, "batch q_len q_heads"] | None,
        wrt: tuple[int, ...],
    ) -> Gradients:
        """The gradient of `forward`.

        **Arguments:**

        - `request`: as for `forward`.
        - `out`, `lse`: what `forward` gave; or the same over more keys than the request
            holds, and then this is the request's part of the whole gradient.
        - `dout`, `dlse`: the cotangents of these; `dlse` may be `None`, which is zero.
        - `wrt`: which of the leaves of `request.pairs` to differentiate too, by number.

        **Returns:**

        `(dq, dk, dv, dleaves)`, in the dtype of accumulation, or the first three in that
        of the result.
        """

    @abstractmethod
    def blocks(self, request: Request) -> Blocks:
        """The size of the tiles in which the portable derivatives work."""

    @abstractmethod
    def explain(self, request: Request) -> str:
        """One line that says how a request would be computed."""
