"""What each device of a ring computes at each hop: found from the mask, without a device.

At hop `s`, device `r` has the keys of device `r - s`. Its tokens and these are some chunks
of the sequence, and a mask sees all pairs of two chunks, none, or some. What is not known
at trace time (segments, or positions that are arrays) counts as some: the mechanism that
computes the hop then skips what it can.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._mask import (
    AbstractMask,
    And,
    Causal,
    Dense,
    Full,
    Keys,
    Not,
    Or,
    Padding,
    Segments,
    SlidingWindow,
    span,
)
from .._score import AbstractScore, ALiBi, Bias, RelativeBias, SoftCap
from .._static import at_trace_time, has_arrays
from .._tokens import Bounds, Tile
from .layout import Chunks


_EMPTY, _PARTIAL, _FULL = 0, 1, 2
# What is computed of a pair depends on no position; on the difference of both; on more.
_NOTHING, _DIFFERENCE, _MORE = 0, 1, 2
# Into how many pieces the tokens of a device are cut, to estimate what is to be computed.
_PIECES = 16
# What is cut off of a hop is a multiple of this, or of an eighth of the tokens.
_ALIGN = 128


class Side(NamedTuple):
    """The queries or the keys of all devices.

    - `chunks`: the numbers of the chunks of each device.
    - `size`: how many tokens a chunk has.
    - `shift`: of default positions, as in `Tokens`; `None` if positions are arrays.
    """

    chunks: Chunks
    size: int
    shift: int | None

    @property
    def length(self) -> int:
        """How many tokens a device has."""
        return len(self.chunks[0]) * self.size

    def indices(self, device: Any, some: tuple[int, int]) -> Array:
        """The indices of some of the tokens of a device."""
        chunks = jnp.asarray(self.chunks, jnp.int32)[device]
        index = chunks[:, None] * self.size + jnp.arange(self.size, dtype=jnp.int32)[None]
        return index.ravel()[slice(*some)]


class Step(NamedTuple):
    """One call of the mechanism that computes a hop.

    - `query`, `key`: from where to where, among the tokens of a device.
    - `kept`: the numbers of those parts of the mask (see `parts`) that hide a pair.
    - `shift`: how far the first query is behind the first key, if positions may be counted
        from there.
    """

    query: tuple[int, int]
    key: tuple[int, int]
    kept: tuple[int, ...]
    shift: int | None


class Hop(NamedTuple):
    """What is computed of keys that were sent `shift` devices on.

    - `keys`: from where to where they are needed, by any device.
    - `steps`: what devices do, which may be nothing.
    - `which`: for each device, the number of its step.
    - `pairs`: for each device, about how many pairs it computes.
    """

    shift: int
    keys: tuple[int, int]
    steps: tuple[Step | None, ...]
    which: tuple[int, ...]
    pairs: tuple[float, ...]


class Plan(NamedTuple):
    """The hops at which any device computes anything, in order."""

    hops: tuple[Hop, ...]
    n: int
    length: int

    @property
    def uniform(self) -> bool:
        """Whether all keys visit all devices."""
        whole = (0, self.length)
        return [h.shift for h in self.hops] == list(range(self.n)) and all(
            h.keys == whole for h in self.hops[1:]
        )

    @property
    def slowest(self) -> float:
        """How many pairs are computed one after another: devices wait at each hop."""
        return sum(max(h.pairs) for h in self.hops)

    @property
    def imbalance(self) -> float:
        """How much longer that is than if each device had the same to do."""
        total = sum(sum(h.pairs) for h in self.hops)
        return self.slowest * self.n / total if total else 1.0


def parts(mask: AbstractMask) -> tuple[AbstractMask, ...]:
    """The masks that all have to see a pair."""
    masks = mask.masks if isinstance(mask, And) else (mask,)
    return tuple(m for m in masks if not isinstance(m, Full))


def plan(
    mask: AbstractMask,
    score: tuple[AbstractScore, ...],
    q: Side,
    kv: Side,
    shifts: bool = True,
) -> Plan:
    """`shifts` is whether positions may be counted from where a hop has them, which makes
    different code of hops that otherwise have the same."""
    n = len(q.chunks)
    each = [_kinds(part, q, kv) for part in parts(mask)]
    every = np.minimum.reduce([_kinds(Full(), q, kv), *each])
    steps = _Steps(mask, score, q, kv, shifts, _by_chunk(every), list(map(_by_chunk, each)))
    amount = every.mean(axis=(1, 3)) / _FULL * q.size * kv.size
    hops = []
    for shift in range(n):
        pairs = [(r, (r - shift) % n) for r in range(n)]
        found = [steps.step(r, owner) for r, owner in pairs]
        if not any(found):
            continue
        distinct = tuple(dict.fromkeys(found))
        starts, ends = zip(*(s.key for s in distinct if s is not None))
        hops.append(
            Hop(
                shift,
                (min(starts), max(ends)),
                distinct,
                tuple(distinct.index(s) for s in found),
                tuple(float(amount[_at(q, kv, *pair)].sum()) for pair in pairs),
            )
        )
    return Plan(tuple(hops), n, kv.length)


def level(found: Plan, mask: AbstractMask) -> Plan:
    """The same plan, but all devices do the same at each hop: what any of them does, by the
    indices of the tokens. What is hidden is then for the mechanism to skip; but nothing is
    chosen while it runs, which on a GPU would wait for all before it."""

    def one(hop: Hop) -> Hop:
        if len(hop.steps) == 1:
            return hop
        starts, ends = zip(*(s.query for s in hop.steps if s is not None), strict=True)
        kept = tuple(range(len(parts(mask))))
        step = Step((min(starts), max(ends)), hop.keys, kept, None)
        return hop._replace(steps=(step,), which=(0,) * found.n)

    return found._replace(hops=tuple(map(one, found.hops)))


def halves(step: Step | None, mask: AbstractMask) -> tuple[Step | None, Step | None]:
    """A step of some queries as two, of fewer each."""
    if step is None:
        return None, None
    start, end = step.query
    middle = start + _aligned((0, (end - start) // 2), end - start)[1]
    if not start < middle < end:
        return step, None
    first, last = (_of_rows(step, r, mask) for r in ((start, middle), (middle, end)))
    return first, last


def _of_rows(step: Step, rows: tuple[int, int], mask: AbstractMask) -> Step | None:
    if step.shift is None:
        return step._replace(query=rows)
    shift = step.shift + rows[0] - step.query[0]
    kept = [parts(mask)[n] for n in step.kept]
    seen = span(And(tuple(kept))) if kept else (-np.inf, np.inf)
    lengths = rows[1] - rows[0], step.key[1] - step.key[0]
    query, key = _narrowed(seen, (0, lengths[0]), (0, lengths[1]), shift)
    if query[0] >= query[1] or key[0] >= key[1]:
        return None
    shift = shift + query[0] - key[0]
    query, key = (
        (first + x[0], first + x[1])
        for first, x in zip((rows[0], step.key[0]), (query, key), strict=True)
    )
    return Step(query, key, step.kept, shift)


def _at(q: Side, kv: Side, device: int, owner: int):
    return np.ix_(q.chunks[device], kv.chunks[owner])


class _Steps(NamedTuple):
    mask: AbstractMask
    score: tuple[AbstractScore, ...]
    q: Side
    kv: Side
    shifts: bool
    every: np.ndarray
    each: list[np.ndarray]

    def step(self, device: int, owner: int) -> Step | None:
        """What a device has to do with the keys of another."""
        q, kv = self.q, self.kv
        at = _at(q, kv, device, owner)
        seen = self.every[at] != _EMPTY
        if not seen.any():
            return None
        rows, columns = (_range(seen.any(axis)) for axis in (1, 0))
        inside = (slice(*rows), slice(*columns))
        kept = tuple(
            n for n, kinds in enumerate(self.each) if (kinds[at][inside] != _FULL).any()
        )
        query = (rows[0] * q.size, rows[1] * q.size)
        key = (columns[0] * kv.size, columns[1] * kv.size)
        masks = [parts(self.mask)[n] for n in kept]
        need = max([_NOTHING, *map(_of_mask, masks), *map(_of_score, self.score)])
        if need == _NOTHING:
            return Step(query, key, kept, 0)
        if q.shift is None or kv.shift is None:
            return Step(query, key, kept, None)
        if len(q.chunks[0]) == len(kv.chunks[0]) == 1:
            shift = q.chunks[device][0] * q.size + q.shift
            shift = shift - kv.chunks[owner][0] * kv.size - kv.shift
            query, key = _narrowed(span(self.mask), query, key, shift)
            if query[0] >= query[1] or key[0] >= key[1]:
                return None
            known = self.shifts and need == _DIFFERENCE
            shift = shift + query[0] - key[0]
            return Step(query, key, kept, shift if known else None)
        # Among the same tokens, in ascending order, what comes later in the sequence comes
        # later here.
        same = q.chunks[device] == kv.chunks[owner] and q[1:] == kv[1:]
        if same and all(map(_is_order, masks)) and not any(map(_of_score, self.score)):
            return Step(query, key, kept, query[0] - key[0])
        return Step(query, key, kept, None)


def _range(some: np.ndarray) -> tuple[int, int]:
    found = np.flatnonzero(some)
    return int(found[0]), int(found[-1]) + 1


def _narrowed(seen: tuple[float, float], query, key, shift: int):
    """The queries that may see any of these keys, and the keys that they may see, where
    the difference of positions is in the range `seen`."""
    low, high = seen
    (q_len, kv_len), rows, columns = (query[1], key[1]), list(query), list(key)
    if high < np.inf:
        columns[1] = min(kv_len, int(q_len + shift + high))
        rows[0] = max(0, int(-shift - high))
    if low > -np.inf:
        columns[0] = max(0, int(shift + low))
        rows[1] = min(q_len, int(kv_len - shift - low))
    return _aligned(rows, q_len), _aligned(columns, kv_len)


def _aligned(some, length: int) -> tuple[int, int]:
    if some[0] >= some[1]:
        return 0, 0
    align = min(_ALIGN, max(1, length // 8))
    return some[0] // align * align, min(length, -(-some[1] // align) * align)


def _of_mask(mask: AbstractMask) -> int:
    match mask:
        case Full() | Segments() | Keys() | Dense():
            return _NOTHING
        case Causal() | SlidingWindow():
            return _DIFFERENCE
        case And(masks=masks) | Or(masks=masks):
            return max(map(_of_mask, masks))
        case Not(mask=inner):
            return _of_mask(inner)
    return _MORE


def _of_score(score: AbstractScore) -> int:
    match score:
        case Bias() | SoftCap():
            return _NOTHING
        case ALiBi() | RelativeBias():
            return _DIFFERENCE
    return _MORE


def _is_order(mask: AbstractMask) -> bool:
    """Whether a mask sees the keys that do not come after a query."""
    if isinstance(mask, Causal) and isinstance(mask.offset, int):
        return mask.offset == 0
    return _of_mask(mask) == _NOTHING


def _by_chunk(kinds: np.ndarray) -> np.ndarray:
    least, most = kinds.min(axis=(1, 3)), kinds.max(axis=(1, 3))
    return np.where(least == most, least, _PARTIAL)


def _kinds(mask: AbstractMask, q: Side, kv: Side) -> np.ndarray:
    """What a mask sees of each two pieces: (chunk, piece, chunk, piece). To see what all
    masks see is the least of each, what any of them sees the greatest."""
    match mask:
        case And(masks=masks):
            return np.minimum.reduce([_kinds(m, q, kv) for m in masks])
        case Or(masks=masks):
            return np.maximum.reduce([_kinds(m, q, kv) for m in masks])
        case Not(mask=inner):
            return _FULL - _kinds(inner, q, kv)
    (q_low, q_high), (kv_low, kv_high) = _pieces(q), _pieces(kv)
    shape = (*q_low.shape, *kv_low.shape)
    by_index = isinstance(mask, Full | Padding)
    given = not by_index and (q.shift is None or kv.shift is None)
    if given or has_arrays(mask):
        kinds = np.full(shape, _PARTIAL)
    else:
        with at_trace_time():
            tiles = (_tile(q_low, kv_low, q, kv), _tile(q_high, kv_high, q, kv))
            some, every = mask.summary(mask, Bounds(*tiles))
            some, every = np.asarray(some).any(0), np.asarray(every).all(0)
        kinds = np.where(every, _FULL, np.where(some, _PARTIAL, _EMPTY))
        kinds = np.broadcast_to(kinds, (q_low.size, kv_low.size)).reshape(shape)
    return kinds


def _pieces(side: Side) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last index of each piece of each chunk: (chunk, piece)."""
    count = len(side.chunks) * len(side.chunks[0])
    pieces = min(_PIECES // len(side.chunks[0]) or 1, side.size)
    ends = np.arange(pieces + 1) * side.size // pieces
    first = np.arange(count)[:, None] * side.size + ends[None, :-1]
    last = np.arange(count)[:, None] * side.size + ends[None, 1:] - 1
    return first.astype(np.int32), last.astype(np.int32)


def _tile(q_index: np.ndarray, kv_index: np.ndarray, q: Side, kv: Side) -> Tile:
    rows, columns = q_index.reshape(1, -1, 1), kv_index.reshape(1, 1, -1)
    of_q, of_kv = rows + np.int32(q.shift or 0), columns + np.int32(kv.shift or 0)
    head = np.zeros((1, 1, 1), np.int32)
    return Tile(*map(jnp.asarray, (rows, columns, of_q, of_kv, head)))
