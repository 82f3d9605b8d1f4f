"""A request as its hops see it: this device's queries, and the keys of another device."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._axes import add_at, declared, slice_at
from .._mask import And, Full
from .._mechanism import AbstractMechanism, Pairs, Request, Split, vary, varying_axes
from .._partial import merge
from .._tokens import Tokens
from .cargo import Cargo, Devices
from .plan import parts, Side, Step


class Role(NamedTuple):
    """What becomes of an array of `Request.pairs` at a hop.

    - `keys`: whether it belongs to keys, and is `"sent"` with them; or holds those of all
        devices, as `"columns"`; or `None`.
    - `rows`: whether it has the axis of queries.
    """

    keys: str | None
    rows: bool


def roles(request: Request, n: int) -> list[Role]:
    """The role of each leaf of `request.pairs`."""
    q_len, kv_len = request.lengths
    out = []
    leaves = jax.tree.leaves(request.pairs)
    for x, (where, spec) in zip(leaves, declared(request.pairs, ""), strict=True):
        if where.startswith("q.") or where.startswith("kv."):
            # Indices are those of the layout, which every device can count.
            sent = where == "kv.position" and x.shape[3] == kv_len
            rows = where == "q.position" and x.shape[2] == q_len
            out.append(Role("sent" if sent else None, rows))
            continue
        names = [name.removeprefix("#") for name in (spec or "").split()]
        rows = "query" in names and x.shape[2] == q_len
        keys = None
        if "key" in names and x.shape[3] == kv_len:
            keys = "sent"
        elif "key" in names and x.shape[3] == n * kv_len:
            keys = "columns"
        out.append(Role(keys, rows))
    return out


class Keys(NamedTuple):
    """Keys of another device: its number, which of its tokens they are, and the arrays."""

    owner: Any
    tokens: tuple[int, int]
    cargo: Cargo


class Rows(NamedTuple):
    """What the backward pass is given of queries, and the numbers of those leaves of the
    pairs that it is to differentiate."""

    out: Array
    lse: Array
    dout: Array
    dlse: Array | None
    wrt: tuple[int, ...]


class Sums(NamedTuple):
    """The gradients that stay on this device: of its queries, and of those leaves that are
    not sent."""

    query: Array
    leaves: tuple[Array, ...]


Partial = tuple[Array, Array]


class Local:
    """A device's part of a request."""

    def __init__(self, request: Request, devices: Devices, q: Side, kv: Side, me: Any):
        """`me` is the number of this device."""
        self.request, self.devices, self.q, self.kv, self.me = request, devices, q, kv, me
        self.leaves, self.treedef = jax.tree.flatten(request.pairs)
        self.roles = roles(request, devices.count)
        self.axes = varying_axes(request)

    def keys(self, start: int, end: int) -> Keys:
        """This device's own, from one to another."""
        sent = [self.request.key_, self.request.value]
        sent = [lax.slice_in_dim(x, start, end, axis=1) for x in sent]
        for x, role in zip(self.leaves, self.roles, strict=True):
            if role.keys == "sent":
                sent.append(lax.slice_in_dim(x, start, end, axis=3))
        return Keys(self.me, (start, end), Cargo(sent))

    def hop(self, step: Step, keys: Keys) -> tuple[Request, list[int]]:
        """What a step asks for; and, for each leaf of its pairs, the number that it has in
        the whole request (or -1)."""
        request = self.request
        key_, value, *sent = keys.cargo.arrays()
        start, end = (x - keys.tokens[0] for x in step.key)
        key_, value = (lax.slice_in_dim(x, start, end, axis=1) for x in (key_, value))
        leaves, travelling = [], iter(sent)
        for x, role in zip(self.leaves, self.roles, strict=True):
            if role.rows:
                x = lax.slice_in_dim(x, *step.query, axis=2)
            if role.keys == "sent":
                x = lax.slice_in_dim(next(travelling), start, end, axis=3)
                if role.rows:
                    x = lax.slice_in_dim(x, *step.query, axis=2)
            elif role.keys == "columns":
                first = keys.owner * self.kv.length + step.key[0]
                size = (*x.shape[:3], step.key[1] - step.key[0], *x.shape[4:])
                x = slice_at(x, [0, 0, 0, first] + [0] * (x.ndim - 4), size)
            leaves.append(x)
        index = (None, None)
        if step.shift is None:
            index = (
                self.q.indices(self.me, step.query).reshape(1, 1, -1, 1),
                self.kv.indices(keys.owner, step.key).reshape(1, 1, 1, -1),
            )
        pairs = _of_step(jax.tree.unflatten(self.treedef, leaves), step, index)
        numbers = jax.tree.unflatten(self.treedef, list(range(len(leaves))))
        hop = dataclasses.replace(
            request,
            query=lax.slice_in_dim(request.query, *step.query, axis=1),
            key_=key_,
            value=value,
            pairs=pairs,
            result_dtype=request.dtype,
            split=Split(),
        )
        return vary(hop, self.axes), _numbers_of_step(numbers, step)

    def forward(
        self, inner: AbstractMechanism, step: Step, keys: Keys, state: Partial | None
    ) -> Partial:
        """Adds a step to what was attended to before, which is `None` if nothing was."""
        hop, _ = self.hop(step, keys)
        out, lse = vary(inner.forward(hop), self.axes)
        more = (out.astype(lse.dtype), lse)
        start, end = step.query
        whole = (start, end) == (0, self.q.length)
        if state is None:
            if whole:
                return more
            state = self.nothing()
        before = [lax.slice_in_dim(x, start, end, axis=1) for x in state]
        more = merge([(before[0], before[1]), more])
        if whole:
            return more
        return _among(state[0], start, more[0]), _among(state[1], start, more[1])

    def nothing(self) -> Partial:
        """What it is to attend to no key."""
        request = self.request
        shape = (*request.query.shape[:-1], request.value.shape[-1])
        return request.full(shape), request.full(shape[:-1], -jnp.inf)

    def backward(
        self,
        inner: AbstractMechanism,
        step: Step,
        keys: Keys,
        rows: Rows,
        sums: Sums,
    ) -> tuple[Sums, list[Array]]:
        """Adds the gradients of a step to `sums`, and returns those that go with the
        keys."""
        hop, numbers = self.hop(step, keys)
        of_step = jax.tree.map(
            lambda x: lax.slice_in_dim(x, *step.query, axis=1), rows._replace(wrt=())
        )
        out, lse, dout, dlse, _ = of_step
        own = tuple(i for i, n in enumerate(numbers) if n in rows.wrt)
        found = inner.backward(hop, out, lse, dout, dlse, own)
        dq, dk, dv, found = vary(found, self.axes)
        dtype = self.request.dtype
        dleaves = {numbers[i]: d.astype(dtype) for i, d in zip(own, found, strict=True)}
        leaves = tuple(
            self._added(n, x, dleaves[n], step, keys) if n in dleaves else x
            for n, x in zip(self.staying(rows.wrt), sums.leaves, strict=True)
        )
        dq = sums.query + _placed(dq.astype(dtype), step.query, (0, self.q.length))
        goes = [_placed(d.astype(dtype), step.key, keys.tokens) for d in (dk, dv)]
        for n in self.going(rows.wrt):
            x = self._zeros(n, keys)
            goes.append(self._added(n, x, dleaves[n], step, keys) if n in dleaves else x)
        return Sums(dq, leaves), goes

    def no_sums(self, wrt: tuple[int, ...]) -> Sums:
        """Of no step."""
        shapes = [self.leaves[n].shape for n in self.staying(wrt)]
        full = self.request.full
        return Sums(full(self.request.query.shape), tuple(map(full, shapes)))

    def no_gradients(self, keys: Keys, wrt: tuple[int, ...]) -> list[Array]:
        """Of what goes with the keys."""
        request, (start, end) = self.request, keys.tokens
        shapes = [
            (x.shape[0], end - start, *x.shape[2:]) for x in (request.key_, request.value)
        ]
        dkv = [request.full(shape) for shape in shapes]
        return dkv + [self._zeros(n, keys) for n in self.going(wrt)]

    def staying(self, wrt: tuple[int, ...]) -> list[int]:
        """Those leaves whose gradients stay here."""
        return [n for n in wrt if self.roles[n].keys != "sent"]

    def going(self, wrt: tuple[int, ...]) -> list[int]:
        """Those whose gradients go with the keys."""
        return [n for n in wrt if self.roles[n].keys == "sent"]

    def _zeros(self, n: int, keys: Keys) -> Array:
        shape = list(self.leaves[n].shape)
        shape[3] = keys.tokens[1] - keys.tokens[0]
        return self.request.full(tuple(shape))

    def _added(self, n: int, x: Array, more: Array, step: Step, keys: Keys) -> Array:
        role, first = self.roles[n], [0] * x.ndim
        first[2] = step.query[0] if role.rows else 0
        if role.keys == "sent":
            first[3] = step.key[0] - keys.tokens[0]
        elif role.keys == "columns":
            first[3] = keys.owner * self.kv.length + step.key[0]
        return _plus(x, first, more)


def _plus(x: Array, first: Sequence[Any], more: Array) -> Array:
    return x + more if x.shape == more.shape else add_at(x, first, more)


def _among(x: Array, start: int, some: Array) -> Array:
    """An array, but with some tokens in the place of others.

    XLA for GPUs would let a kernel write an update into another one's results, and fails
    where these are read for it. So this is none.
    """
    end = start + some.shape[1]
    shape = [1, x.shape[1]] + [1] * (x.ndim - 2)
    at = lax.broadcasted_iota(jnp.int32, shape, 1)
    inside = (at >= start) & (at < end)
    return jnp.where(inside, _placed(some, (start, end), (0, x.shape[1])), x)


def _of_step(pairs: Pairs, step: Step, index: tuple[Any, Any]) -> Pairs:
    kept = [parts(pairs.mask)[n] for n in step.kept]
    mask = kept[0] if len(kept) == 1 else And(tuple(kept)) if kept else Full()
    lengths = [b - a for a, b in (step.query, step.key)]
    q, kv = Tokens(None, lengths[0], step.shift or 0), Tokens(None, lengths[1], 0)
    if step.shift is None:
        q, kv = (
            Tokens(old.position, length, old.shift, x)
            for old, length, x in zip((pairs.q, pairs.kv), lengths, index, strict=True)
        )
    return dataclasses.replace(pairs, mask=mask, q=q, kv=kv)


def _numbers_of_step(numbers: Pairs, step: Step) -> list[int]:
    """For each leaf of what `_of_step` gives, its number, of which `numbers` is made."""
    kept = [parts(numbers.mask)[n] for n in step.kept]
    tokens = []
    if step.shift is None:
        for side in (numbers.q, numbers.kv):
            tokens += [*jax.tree.leaves(side.position), -1]
    first = (kept, numbers.score, numbers.scale, numbers.dropout)
    return [*jax.tree.leaves(first), *tokens, *jax.tree.leaves(numbers.head)]


def _placed(x: Array, some: tuple[int, int], whole: tuple[int, int]) -> Array:
    """Zeros around what is of some tokens of others."""
    if some == whole:
        return x
    widths = [(0, 0)] * x.ndim
    widths[1] = (some[0] - whole[0], whole[1] - some[1])
    return jnp.pad(x, widths)
