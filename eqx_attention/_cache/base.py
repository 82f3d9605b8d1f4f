from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from beartype import beartype
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, jaxtyped, PRNGKeyArray

from .._attention import attend
from .._keys import Keys
from .._mask import AbstractMask, And, Causal, Dense, Full
from .._options import both_masks
from .._tokens import both_positions


class AbstractCache(eqx.Module):
    """The keys and values of past tokens, for generating the next ones.

    A cache is immutable: `append` returns a new one, and leaves the old one as it was.
    It is a pytree of arrays of fixed shapes, and so may be carried by a `lax.scan`,
    mapped by `jax.vmap`, donated to a jitted function, and saved.

    A cache has *slots*, which are what attention sees as its key tokens. A slot holds one
    past token, or nothing. What is known of the slots (which hold a token, and at what
    positions) goes to attention as a mask and as positions, and combines with any
    other mask.
    """

    key_: eqx.AbstractVar[Any]
    value: eqx.AbstractVar[Any]
    """Where keys and values are stored: arrays, or [`eqx_attention.Quantized`][], of
    shape `(..., kv_heads, channels)`."""

    length: eqx.AbstractVar[Int[Array, "*batch"]]
    """How many tokens each sequence has appended so far. The next one has this
    position."""

    @classmethod
    @abstractmethod
    def init(
        cls,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        batch: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
    ) -> "AbstractCache":
        """Makes an empty cache.

        **Arguments:**

        - `capacity`: How many tokens of each sequence it can hold.
        - `num_kv_heads`: How many heads keys and values have.
        - `head_dim`: The number of channels of a key head.
        - `value_dim`: The number of channels of a value head. Defaults to `head_dim`. May
            be 0, where values are a part of the keys, as in
            [`eqx_attention.MultiheadLatentAttention`][].
        - `batch`: The batch axes. Defaults to none. (Keyword only argument.)
        - `dtype`: The dtype of the keys and values. (Keyword only argument.)

        **Raises:** a `ValueError` if a size is not positive.
        """

    @property
    @abstractmethod
    def capacity(self) -> int:
        """How many tokens of each sequence it can hold."""

    @property
    @abstractmethod
    def recent(self) -> int | None:
        """How many of the last tokens may be queries, if not all: of what earlier ones
        see, some is gone."""

    @abstractmethod
    def append(
        self,
        key_: Float[Keys, "*batch n kv_heads head_dim"],
        value: Float[Keys, "*batch n kv_heads value_dim"],
        *,
        lengths: Int[Array, "*#batch"] | None = None,
    ) -> "AbstractCache":
        """Appends the keys and values of `n` tokens to each sequence.

        **Arguments:**

        - `key_`: The keys, of shape `(*batch, n, kv_heads, head_dim)`.
        - `value`: The values, of shape `(*batch, n, kv_heads, value_dim)`.
        - `lengths`: How many of the `n` tokens, from the first on, each sequence
            appends; the others are padding, and are not stored. Defaults to all.
            (Keyword only argument.)

        **Returns:**

        A cache of the same shapes and dtypes.

        **Raises:**

        A `TypeError` if `key_` or `value` has a shape or a dtype that is not the
        cache's. If there is no room, then nothing is overwritten: it is a `ValueError`
        if this can be told from the shapes, and otherwise an error at run time.
        """

    @abstractmethod
    def keys_values(
        self,
    ) -> tuple[Any, Any, Int[Array, "*batch slots"] | None, AbstractMask]:
        """What attention needs to know: `(key_, value, kv_positions, mask)`.

        **Returns:**

        - The keys and values of all slots, as [`eqx_attention.attend`][] takes them.
        - The position of each slot's token, or `None` if it is the slot's index.
        - A mask by which just the slots that hold a token are visible.
        """

    @jaxtyped(typechecker=beartype)
    def attend(
        self,
        query: Float[Array, "*batch q_len q_heads head_dim"],
        *,
        mask: AbstractMask | Bool[Array, "..."] = Full(),
        score: Any = (),
        sinks: Float[Array, " q_heads"] | None = None,
        scale: Any = None,
        dropout: Any = 0.0,
        key: PRNGKeyArray | None = None,
        inference: bool = False,
        q_positions: Int[Array, "*#batch q_len"] | None = None,
        precision: Any = None,
        mechanism: Any = "auto",
        sharding: Any = None,
        mesh: Any = None,
        return_lse: bool = False,
    ) -> Any:
        """Attends to the tokens in the cache, as [`eqx_attention.attend`][] does.

        **Arguments:**

        - `query`: The queries, of shape `(*batch, q_len, q_heads, head_dim)`.
        - `q_positions`: The positions of the queries. Defaults to those of the last
            `q_len` tokens that were appended. They must be among the last tokens of
            `recent`. (Keyword only argument.)
        - The others are those of [`eqx_attention.attend`][]. Per-key arrays in `mask`
            and `score` go by slot. (Keyword only arguments.)

        **Returns:**

        As [`eqx_attention.attend`][].

        **Raises:**

        As [`eqx_attention.attend`][]; and a `ValueError` if there are more queries than
        `recent`, where their positions are left to the cache.
        """
        if not isinstance(mask, AbstractMask):
            mask = Dense(mask)
        if q_positions is None:
            q_len = query.shape[-3]
            if self.recent is not None and q_len > self.recent:
                raise ValueError(
                    f"{type(self).__name__}.attend: expected at most {self.recent} queries "
                    f"(the last tokens), got {q_len}: some of what the first see is gone."
                )
            if q_len == 1:
                mask = of_last_token(mask)
            last = self.length[..., None] - 1
            q_positions, _ = both_positions("end", last, query.shape[-3], 1)
        key_, value, kv_positions, valid = self.keys_values()
        return attend(
            query,
            key_,
            value,
            mask=both_masks(mask, valid),
            score=score,
            sinks=sinks,
            scale=scale,
            dropout=dropout,
            key=key,
            inference=inference,
            q_positions=q_positions,
            kv_positions=kv_positions,
            precision=precision,
            mechanism=mechanism,
            sharding=sharding,
            mesh=mesh,
            return_lse=return_lse,
        )


def of_last_token(mask: AbstractMask) -> AbstractMask:
    """What is left of a mask for the one query that is the last of all tokens: no other
    token comes after it, so that `Causal()` hides nothing. (Mechanisms that know lengths,
    but no positions, then can do it.)"""
    parts = mask.masks if isinstance(mask, And) else (mask,)
    parts = tuple(m for m in parts if not _sees_the_past(m))
    if not parts:
        return Full()
    return parts[0] if len(parts) == 1 else And(parts)


def _sees_the_past(mask: AbstractMask) -> bool:
    return isinstance(mask, Causal) and isinstance(mask.offset, int) and mask.offset >= 0
