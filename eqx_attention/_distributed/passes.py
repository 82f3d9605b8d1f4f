"""The two passes of a ring: which keys go where, and what is computed meanwhile.

What is sent never depends on what is computed of the keys that are already here, so that
both can be done at once.
"""

import functools as ft
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from .._mechanism import AbstractMechanism
from .cargo import Cargo, sent_together
from .hop import Keys, Local, Partial, Rows, Sums
from .plan import halves, Hop, Plan, Step


# As many kinds of steps may be in the code of a loop, not to have more code than hops.
_KINDS = 3
# What is computed of each query, without products, takes as long as to send this part of
# the keys and values.
_BRIEF = 1 / 4


class Todo(NamedTuple):
    """The steps of a hop, and the number of that of each device."""

    which: Int[Array, " devices"]
    steps: tuple[Step | None, ...]


class Passes:
    """A device's part of a request, and the plan of its hops: `loose` is the same plan
    without what is special to one hop, for a loop over them."""

    def __init__(
        self,
        inner: AbstractMechanism,
        local: Local,
        plan: Plan,
        loose: Plan,
        scan: bool,
    ):
        self.inner, self.local, self.plan, self.loose = inner, local, plan, loose
        self.scan, self.devices = scan, local.devices

    def forward(self) -> Partial:
        """`(out, lse)` over all keys."""
        hops, own = self.plan.hops, self._own()

        def visit(todo: Todo, keys: Keys, state: Partial | None) -> Partial:
            def attend(step, state):
                if step is None:
                    return self.local.nothing() if state is None else state
                return self.local.forward(self.inner, step, keys, state)

            if len(todo.steps) > 1 and state is None:
                state = self.local.nothing()
            return self._switch(todo, attend, state)

        def one_of_many(todo: Todo, keys: Keys, state: Partial, _: None):
            return visit(todo, keys, state), None

        if self.plan.uniform:
            coming = self._onward(own)[0] if len(hops) > 1 else own
            state = visit(_todo(hops[0]), own, None)
            return self._around(hops[1:], coming, (state, None), one_of_many)[0]
        state = None
        for hop, keys in self._directly(hops, own):
            state = visit(_todo(hop), keys, state)
        return self.local.nothing() if state is None else state

    def backward(self, rows: Rows) -> tuple[Sums, list[Array]]:
        """The gradients that stay on this device, and those of its own keys.

        Of its own keys a device computes one part while the first keys are on their way
        to it, the other while the last gradients are."""
        hops, own, sums = self.plan.hops, self._own(), self.local.no_sums(rows.wrt)

        def gradient(todo: Todo, keys: Keys, sums: Sums) -> tuple[Sums, list[Array]]:
            def differentiate(step, sums):
                if step is None:
                    return sums, self.local.no_gradients(keys, rows.wrt)
                return self.local.backward(self.inner, step, keys, rows, sums)

            return self._switch(todo, differentiate, sums)

        def one_of_many(todo: Todo, keys: Keys, sums: Sums, before: Cargo):
            """What is computed of keys is added to what was at the hop before, by another
            device."""
            sums, goes = gradient(todo, keys, sums)
            return sums, Cargo(_added(goes, before.arrays()))

        if not self.plan.uniform:
            return self._backward_directly(own, rows, sums, gradient)
        if len(hops) == 1:
            return gradient(_todo(hops[0]), own, sums)
        first, last = self._halved(hops[0], own)
        keys, _ = self._onward(own)
        sums, mine = gradient(first, own, sums)
        sums, keys = self._after(sums, first, keys)
        coming = self._onward(keys)[0] if len(hops) > 2 else keys
        sums, goes = gradient(_todo(hops[1]), keys, sums)
        carry = (sums, Cargo(goes))
        sums, sent = self._around(hops[2:], coming, carry, one_of_many)
        back = sent.sent(self.devices, self.devices.onward(1))
        sums, more = gradient(last, own, sums)
        return sums, _added(_added(mine, more), back.arrays())

    def _backward_directly(self, own: Keys, rows: Rows, sums: Sums, gradient: Callable):
        here = [hop for hop in self.plan.hops if not hop.shift]
        away = [hop for hop in self.plan.hops if hop.shift]
        first, last = None, [_todo(hop) for hop in here]
        if here and not self._brief(away):
            first, *last = self._halved(here[0], own)
        mine, back = self.local.no_gradients(own, rows.wrt), []
        if first is not None:
            sums, goes = gradient(first, own, sums)
            mine = _added(mine, goes)
        for n, (hop, keys) in enumerate(self._directly(away, own)):
            if n == 0 and first is not None:
                sums, keys = self._after(sums, first, keys)
            sums, goes = gradient(_todo(hop), keys, sums)
            to = self.devices.onward(-hop.shift)
            back.append((Cargo(goes).sent(self.devices, to), hop.keys))
        for todo in last:
            sums, goes = gradient(todo, own, sums)
            mine = _added(mine, goes)
        for sent, keys in back:
            mine = _onto(mine, sent.arrays(), keys)
        return sums, mine

    def _around(self, hops: Sequence[Hop], coming: Keys, carry: Any, visit: Callable):
        """Visits hops, each with the keys that were sent on by one device since the one
        before. `carry` is what stays, and what is sent on too (or `None`)."""
        if not hops:
            return carry
        *middle, last = hops

        def on(todo, keys, carry):
            stays, goes = carry
            coming, goes = self._onward(keys, goes)
            return visit(todo, keys, stays, goes), coming

        loop = self._loop(middle) if self.scan else None
        if loop is None:
            for hop in middle:
                # What a hop sends is not to be sent before the hop that is computed.
                stays, cargo = lax.optimization_barrier((carry[0], coming.cargo))
                coming = coming._replace(cargo=cargo)
                carry, coming = on(_todo(hop), coming, (stays, carry[1]))
        else:

            def body(loop_carry, xs):
                carry, cargo = loop_carry
                shift, which = xs
                keys = self._keys(shift, cargo)
                carry, coming = on(Todo(which, loop.steps), keys, carry)
                return (carry, coming.cargo), None

            shifts = jnp.asarray([hop.shift for hop in middle], jnp.int32)
            start = (carry, coming.cargo)
            (carry, cargo), _ = lax.scan(body, start, (shifts, loop.which))
            coming = self._keys(last.shift, cargo)
        stays, goes = carry
        if goes is not None:
            goes = goes.sent(self.devices, self.devices.onward(1))
        return visit(_todo(last), coming, stays, goes)

    def _loop(self, hops: Sequence[Hop]) -> Todo | None:
        """What all of these hops do; `None` if a loop would not be shorter."""
        if len(hops) < 2:
            return None
        for plan in (self.plan, self.loose):
            if not plan.uniform:
                continue
            alike = [plan.hops[hop.shift] for hop in hops]
            steps = tuple(dict.fromkeys(s for hop in alike for s in hop.steps))
            few = len(steps) <= _KINDS or plan is self.loose
            if few and self._able(steps, self._own()):
                which = [[steps.index(hop.steps[w]) for w in hop.which] for hop in alike]
                return Todo(jnp.asarray(which, jnp.int32), steps)
        return None

    def _directly(self, hops: Sequence[Hop], own: Keys) -> Iterator[tuple[Hop, Keys]]:
        """Hops, each with the keys of the device from which they are needed, and no
        others: those of the next one are on their way when one is given."""
        fetched = [self._fetched(hop, own) for hop in hops[:1]]
        for n, hop in enumerate(hops):
            fetched += [self._fetched(after, own) for after in hops[n + 1 : n + 2]]
            yield hop, fetched.pop(0)

    def _fetched(self, hop: Hop, own: Keys) -> Keys:
        if hop.shift == 0:
            return own
        cargo = self.local.keys(*hop.keys).cargo
        cargo = cargo.sent(self.devices, self.devices.onward(hop.shift))
        return Keys((own.owner - hop.shift) % self.devices.count, hop.keys, cargo)

    def _own(self) -> Keys:
        return self.local.keys(0, self.local.kv.length)

    def _keys(self, shift: Any, cargo: Cargo) -> Keys:
        owner = (self.local.me - shift) % self.devices.count
        return Keys(owner, (0, self.local.kv.length), cargo)

    def _brief(self, away: Sequence[Hop]) -> bool:
        """Whether keys come while it is computed what the backward pass needs of each
        query: then nothing of a device's own need be kept for that time."""
        count = sum(end - start for start, end in (hop.keys for hop in away))
        return count <= _BRIEF * self.local.kv.length

    def _onward(self, keys: Keys, also: Cargo | None = None) -> tuple[Keys, Cargo | None]:
        """The keys that the device before has, and what else is sent on, as it has it."""
        sent = [keys.cargo] if also is None else [keys.cargo, also]
        cargo, *more = sent_together(sent, self.devices, self.devices.onward(1))
        owner = (keys.owner - 1) % self.devices.count
        return Keys(owner, keys.tokens, cargo), more[0] if more else None

    def _halved(self, hop: Hop, own: Keys) -> tuple[Todo, Todo]:
        """What devices do of their own keys: first, and at the end."""
        mask = self.local.request.pairs.mask
        first, last = zip(*(halves(step, mask) for step in hop.steps), strict=True)
        if not self._able((*first, *last), own):
            first, last = hop.steps, (None,) * len(hop.steps)
        which = jnp.asarray(hop.which, jnp.int32)
        return Todo(which, first), Todo(which, last)

    def _after(self, sums: Sums, todo: Todo, keys: Keys) -> tuple[Sums, Keys]:
        """The same, but the keys are neither computed with nor sent on before what was
        added to `sums` is computed: so that meanwhile they are on their way. One row of it
        is enough to say so, which costs nothing if fused with what adds to it next."""
        first = min((step.query[0] for step in todo.steps if step is not None), default=0)
        row = lax.slice_in_dim(sums.query, first, first + 1, axis=1)
        row, cargo = lax.optimization_barrier((row, keys.cargo))
        at = lax.broadcasted_iota(jnp.int32, (1, sums.query.shape[1], 1, 1), 1) == first
        query = jnp.where(at, row, sums.query)
        return sums._replace(query=query), keys._replace(cargo=cargo)

    def _able(self, steps: Sequence[Step | None], keys: Keys) -> bool:
        """Whether the mechanism within computes these steps too."""
        hops = (self.local.hop(step, keys)[0] for step in steps if step is not None)
        return not any(self.inner.unsupported(hop) for hop in hops)

    def _switch(self, todo: Todo, fn: Callable, state: Any) -> Any:
        branches = [ft.partial(fn, step) for step in todo.steps]
        if len(set(todo.steps)) == 1:
            return branches[0](state)
        return lax.switch(todo.which[self.local.me], branches, state)


def _todo(hop: Hop) -> Todo:
    return Todo(jnp.asarray(hop.which, jnp.int32), hop.steps)


def _added(xs: Sequence[Array], ys: Sequence[Array]) -> list[Array]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def _onto(whole: Sequence[Array], some: Sequence[Array], keys: tuple[int, int]):
    """Adds the gradients of some keys, and of what belongs to them, to those of all."""

    def one(x, y, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (keys[0], x.shape[axis] - keys[1])
        return x + jnp.pad(y, widths)

    axes = [1, 1] + [3] * (len(whole) - 2)
    return [one(*xs) for xs in zip(whole, some, axes, strict=True)]
