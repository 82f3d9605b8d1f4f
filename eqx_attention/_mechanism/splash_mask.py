"""What a mask is to jax's splash attention: an id of each token, which are to be equal, and
a rule for the positions of each pair, or all pairs written out."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from .._axes import Block
from .._mask import (
    AbstractMask,
    And,
    Causal,
    Chunked,
    Dense,
    Full,
    Keys,
    Not,
    Or,
    Padding,
    Prefix,
    Segments,
    SlidingWindow,
)
from .._tokens import Tokens
from .base import Request
from .tile import TileOf


Rule = Callable[[Any, Any], Any]
_TOKENS = (Segments, Keys, Padding)


class Parts(NamedTuple):
    """The masks that all have to see a pair.

    - `tokens`: those that become ids of tokens.
    - `pairs`: the others.
    - `written`: whether these are written out, as one of them is already.
    """

    tokens: tuple[AbstractMask, ...]
    pairs: tuple[AbstractMask, ...]
    written: bool


def parts(mask: AbstractMask) -> Parts:
    masks = mask.masks if isinstance(mask, And) else (mask,)
    tokens = tuple(m for m in masks if isinstance(m, _TOKENS))
    pairs = tuple(m for m in masks if not isinstance(m, (*_TOKENS, Full)))
    is_dense = lambda x: isinstance(x, Dense)  # noqa: E731
    written = any(map(is_dense, jax.tree.leaves(pairs, is_leaf=is_dense)))
    return Parts(tokens, pairs, written)


def mask_unsupported(request: Request) -> Iterator[str]:
    """Why a mask is none that the kernels compute."""
    tokens, pairs, written = parts(request.pairs.mask)
    if sum(isinstance(m, Segments) for m in tokens) > 1:
        yield "it computes one Segments only"
    if written or not pairs:
        return
    refused = {id(m): m for part in pairs for m in _refused(part)}
    yield from (f"it computes no mask {mask}" for mask in refused.values())
    if not request.pairs.kv.counted:
        yield "its masks count the positions of keys, and these are arrays"


def _refused(mask: AbstractMask) -> Iterator[AbstractMask]:
    """The parts of a mask that are no rule for positions by numbers that are static."""
    match mask:
        case And(masks=masks) | Or(masks=masks):
            for m in masks:
                yield from _refused(m)
        case Not(mask=inner):
            yield from _refused(inner)
        case Causal(offset=int()) | Chunked(size=int()) | Prefix(length=int()):
            pass
        case SlidingWindow(left=None | int(), right=None | int()):
            pass
        case _:
            yield mask


def rule(request: Request, kv_len: int) -> Rule | None:
    """What a kernel asks of the position of a query and the index of a key, where keys are
    padded to `kv_len`; `None` if it has nothing to ask.

    It is made of comparisons, `&` and `|` alone, which is what jax's own rules are.
    """
    _, pairs, written = parts(request.pairs.mask)
    if written:
        return None
    own, shift = request.key_.shape[1], request.pairs.kv.shift

    def visible(q, kv):
        found = [_visible(mask, q, kv + shift if shift else kv, True) for mask in pairs]
        if own < kv_len:
            found.append(kv < own)
        return _joined(found, True)

    return visible if pairs or own < kv_len else None


def _visible(mask: AbstractMask, q, kv, holds: bool):
    """Whether a mask sees pairs, or (if not `holds`) does not."""
    match mask:
        case Not(mask=inner):
            return _visible(inner, q, kv, not holds)
        case And(masks=masks) | Or(masks=masks):
            found = [_visible(m, q, kv, holds) for m in masks]
            return _joined(found, isinstance(mask, And) == holds)
        case Causal(offset=n):
            return kv - q <= n if holds else kv - q > n
        case Prefix(length=n):
            return kv < n if holds else kv >= n
        case Chunked(size=int(n)):
            q, kv = _floor_div(q, n), _floor_div(kv, n)
            return q == kv if holds else q != kv
        case SlidingWindow(left=left, right=right):
            found = []
            if left is not None:
                found.append(kv - q >= -left if holds else kv - q < -left)
            if right is not None:
                found.append(kv - q <= right if holds else kv - q > right)
            # A window that ends nowhere sees all, which is a rule too.
            return _joined(found or [kv == kv if holds else kv != kv], holds)
    raise TypeError(f"expected a mask by positions, got {mask}")


def _floor_div(x: Int[Array, "..."], n: int) -> Int[Array, "..."]:
    """`x // n`, without the sign of `x`, for which jax asks which TPU there is."""
    divisor = lax.full_like(x, n)
    return jnp.where(x < 0, lax.div(x + 1, divisor) - 1, lax.div(x, divisor))


def _joined(found: list, every: bool):
    first, *rest = found
    for x in rest:
        first = first & x if every else first | x
    return first


def q_positions(request: Request) -> Int[Array, "#batch q_len"]:
    """Of which the rule is asked."""
    q = request.pairs.q
    if q.position is not None:
        return q.position[:, 0, :, 0]
    return _index(q) + q.shift


def _index(tokens: Tokens) -> Int[Array, "1 length"]:
    if tokens.index is None:
        return jnp.arange(tokens.length, dtype=jnp.int32)[None]
    return tokens.index.reshape(1, -1)


def token_ids(
    request: Request,
) -> tuple[Int[Array, "#batch q_len"], Int[Array, "#batch kv_len"]] | None:
    """Numbers of queries and keys, which are equal where the masks of tokens see a pair;
    `None` if there is no such mask."""
    tokens, _, _ = parts(request.pairs.mask)
    if not tokens:
        return None
    q_len, kv_len = request.lengths
    ids = jnp.zeros((1, q_len), jnp.int32), jnp.zeros((1, kv_len), jnp.int32)
    seen = jnp.ones((1, q_len), bool), jnp.ones((1, kv_len), bool)
    hides = False
    for mask in tokens:
        match mask:
            case Segments(q_ids=q, kv_ids=kv):
                ids = q[:, 0, :, 0], kv[:, 0, 0]
            case _:
                hides = True
                seen = tuple(a & b for a, b in zip(seen, _seen(request, mask), strict=True))
    if not hides:
        return ids
    if any(isinstance(m, Segments) for m in tokens):
        ids = jnp.vectorize(_ranked, signature="(q),(k)->(q),(k)")(*ids)
    return jnp.where(seen[0], ids[0], -2), jnp.where(seen[1], ids[1], -1)


def _seen(request: Request, mask: AbstractMask) -> tuple[Bool[Array, "..."], ...]:
    """Which queries, and which keys, a mask sees at all."""
    everywhere = jnp.ones((1, request.lengths[0]), bool)
    match mask:
        case Keys(kv_valid=kv, q_valid=q):
            return everywhere if q is None else q[:, 0, :, 0], kv[:, 0, 0]
        case Padding(q_lengths=q, kv_lengths=kv):
            rows = everywhere if q is None else _index(request.pairs.q) < _column(q)
            return rows, _index(request.pairs.kv) < _column(kv)
    raise TypeError(f"expected a mask by tokens, got {mask}")


def _column(x) -> Array:
    return jnp.asarray(x, jnp.int32).reshape(-1, 1)


def _ranked(q: Int[Array, " q"], kv: Int[Array, " k"]):
    """The same ids, none of them negative: their places among those of queries. A key has
    -1 if no query has its id."""
    known = jnp.sort(q)
    rank = lambda x: jnp.searchsorted(known, x).astype(jnp.int32)  # noqa: E731
    place = jnp.minimum(rank(kv), known.size - 1)
    return rank(q), jnp.where(known[place] == kv, place, -1)


def written_out(request: Request) -> Bool[Array, "#batch #head q_len kv_len"]:
    """All pairs of the masks of pairs."""
    batch, q_len, heads, _ = request.query.shape
    kv_len = request.key_.shape[1]
    block = Block((0, 0, 0, 0), (batch, heads, q_len, kv_len))
    visible = TileOf(request, block).visible
    assert visible is not None
    return jnp.broadcast_to(visible, (*visible.shape[:2], q_len, kv_len))
