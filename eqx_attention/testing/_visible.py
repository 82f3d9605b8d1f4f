"""Which pairs are visible: the meaning of each mask, written down a second time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

import eqx_attention as eqa


def positions(
    q_len: int,
    kv_len: int,
    q_positions: Any = "start",
    kv_positions: Any = None,
) -> tuple[Int[np.ndarray, "*#batch {q_len}"], Int[np.ndarray, "*#batch {kv_len}"]]:
    """The integer positions of the queries and of the keys.

    **Arguments:** as those of [`eqx_attention.attend`][].

    **Returns:** two arrays of NumPy, for the queries and for the keys.

    **Raises:** a `ValueError` if `q_positions` is a name other than `"start"` and `"end"`.
    """
    kv = np.arange(kv_len) if kv_positions is None else np.asarray(kv_positions)
    if not isinstance(q_positions, str):
        q = np.asarray(q_positions)
    elif q_positions == "start":
        q = np.arange(q_len)
    elif q_positions == "end":
        q = np.arange(q_len) + kv[..., -1:] - (q_len - 1)
    else:
        raise ValueError(
            f"q_positions: expected 'start', 'end' or an array, got {q_positions!r}."
        )
    return q.astype(np.int32), kv.astype(np.int32)


class Pairs(NamedTuple):
    """Where each pair is. All have the rank of `(*batch, head, query, key)`.

    `rows` are the indices of the queries, if these are not all queries.
    """

    batch: tuple[int, ...]
    q_pos: np.ndarray  # (*batch or 1s, 1, q_len, 1)
    kv_pos: np.ndarray  # (*batch or 1s, 1, 1, kv_len)
    q_index: np.ndarray
    kv_index: np.ndarray
    head: np.ndarray  # (1s, q_heads, 1, 1)
    rows: np.ndarray | None = None

    def number(self, x: Any) -> Any:
        """A number, or one a batch element."""
        if x is None or isinstance(x, int | float):
            return x
        return self._full(np.asarray(x), np.shape(x), ())

    def token(self, x: Any, side: str) -> Any:
        """An array `"*#batch len"` of one side."""
        if side == "query" and self.rows is not None:
            x = x[..., self.rows]
        *batch, size = np.shape(x)
        return self._full(x, batch, (1, size, 1) if side == "query" else (1, 1, size))

    def pair(self, x: Any) -> Any:
        """An array `"*#batch #q_heads #q_len #kv_len"`."""
        if self.rows is not None and np.ndim(x) > 1 and np.shape(x)[-2] > 1:
            x = x[..., self.rows, :]
        shape = (1,) * (3 - np.ndim(x)) + np.shape(x)
        return self._full(x, shape[:-3], shape[-3:])

    def _full(self, x, batch, rest):
        ones = (1,) * (len(self.batch) - len(batch))
        return x.reshape((*ones, *batch, *(rest or (1, 1, 1))))

    def arguments(self, holder: Any) -> tuple:
        """What a function of the user is called with, after the logit if there is one."""
        return (
            jnp.asarray(self.q_pos),
            jnp.asarray(self.kv_pos),
            jnp.asarray(self.head),
            jax.tree.map(lambda x: self.token(x, "query"), holder.q_features),
            jax.tree.map(lambda x: self.token(x, "key"), holder.kv_features),
            holder.params,
        )


def pairs_of(batch, q_heads, q_len, kv_len, q_positions, kv_positions, rows=None) -> Pairs:
    q_pos, kv_pos = positions(q_len, kv_len, q_positions, kv_positions)
    empty = np.zeros(0, np.int32)
    pairs = Pairs(tuple(batch), empty, empty, empty, empty, empty, rows)
    ones = (1,) * len(pairs.batch)
    return pairs._replace(
        q_pos=pairs.token(q_pos, "query"),
        kv_pos=pairs.token(kv_pos, "key"),
        q_index=pairs.token(np.arange(q_len), "query"),
        kv_index=pairs.token(np.arange(kv_len), "key"),
        head=np.arange(q_heads, dtype=np.int32).reshape((*ones, q_heads, 1, 1)),
    )


def visible_at(mask: Any, at: Pairs) -> np.ndarray:
    relative = at.kv_pos - at.q_pos
    everything = np.ones(np.shape(relative), bool)
    match mask:
        case None | eqa.Full():
            return everything
        case eqa.And():
            return np.logical_and.reduce(
                np.broadcast_arrays(*(visible_at(m, at) for m in mask.masks))
            )
        case eqa.Or():
            return np.logical_or.reduce(
                np.broadcast_arrays(*(visible_at(m, at) for m in mask.masks))
            )
        case eqa.Not():
            return ~visible_at(mask.mask, at)
        case eqa.Causal():
            return at.kv_pos <= at.q_pos + at.number(mask.offset)
        case eqa.SlidingWindow():
            left, right = at.number(mask.left), at.number(mask.right)
            after = everything if left is None else -left <= relative
            return after if right is None else after & (relative <= right)
        case eqa.Prefix():
            return everything & (at.kv_pos < at.number(mask.length))
        case eqa.Chunked():
            size = at.number(mask.size)
            return at.kv_pos // size == at.q_pos // size
        case eqa.Segments():
            kv_ids = mask.q_ids if mask.kv_ids is None else mask.kv_ids
            q = at.token(np.asarray(mask.q_ids), "query")
            return q == at.token(np.asarray(kv_ids), "key")
        case eqa.Padding():
            seen = everything & (at.kv_index < at.number(mask.kv_lengths))
            if mask.q_lengths is None:
                return seen
            return seen & (at.q_index < at.number(mask.q_lengths))
        case eqa.Keys():
            seen = everything & (at.token(np.asarray(mask.kv_valid), "key") != 0)
            if mask.q_valid is None:
                return seen
            return seen & (at.token(np.asarray(mask.q_valid), "query") != 0)
        case eqa.Dense():
            return at.pair(np.asarray(mask.array))
        case eqa.Predicate():
            return np.asarray(mask.fn(*at.arguments(mask)), bool)
        case eqa.BlockMask():
            return visible_at(
                mask.mask,
                at._replace(
                    q_pos=at.token(np.asarray(mask.q_position), "query"),
                    kv_pos=at.token(np.asarray(mask.kv_position), "key"),
                ),
            )
        case eqa.AbstractMask():
            raise TypeError(f"the reference does not know {type(mask).__name__}.")
        case _:
            return at.pair(np.asarray(mask, bool))


def visible_pairs(
    mask: Any,
    batch: tuple[int, ...],
    q_heads: int,
    q_len: int,
    kv_len: int,
    *,
    q_positions: Any = "start",
    kv_positions: Any = None,
) -> Bool[np.ndarray, "*batch {q_heads} {q_len} {kv_len}"]:
    """The pairs that a mask lets through, one by one.

    The meaning of each mask is stated here independently of the masks themselves. The
    mask's arrays must be concrete: this is not to be traced.

    **Arguments:**

    - `mask`: an [`eqx_attention.AbstractMask`][], a boolean array
        `"*#batch #q_heads #q_len #kv_len"`, or `None`, which hides nothing.
    - `batch`, `q_heads`, `q_len`, `kv_len`: the shape of the result.
    - `q_positions`, `kv_positions`: as in [`eqx_attention.attend`][].

    **Returns:** a boolean array of NumPy; `True` is visible.

    **Raises:** a `TypeError` for a mask of a class that is not one of this library's.
    """
    at = pairs_of(batch, q_heads, q_len, kv_len, q_positions, kv_positions)
    shape = (*batch, q_heads, q_len, kv_len)
    return np.broadcast_to(visible_at(mask, at), shape)
