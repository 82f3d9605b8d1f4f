"""The two passes of a ring: which keys go where, and what is computed meanwhile.

Each permute is issued before what is computed of the keys that are already here, on which
it does not depend, so that both can be done at once.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._mechanism import AbstractMechanism
from .cargo import Cargo
from .hop import Keys, Local, Partial, Rows, Sums
from .plan import Hop, Plan, Step


_T = TypeVar("_T")
# As many kinds of steps may be in the code of a loop, not to have more code than hops.
_KINDS = 3


class Passes:
    """A device's part of a request, and the plan of its hops.

    `loose` is the plan of the same hops that a loop runs over, whose steps are alike.
    """

    def __init__(
        self,
        inner: AbstractMechanism,
        local: Local,
        plan: Plan,
        loose: Plan,
        scan: bool,
    ):
        self.inner, self.local, self.plan = inner, local, plan
        self.devices = local.devices
        self.middle = middle(plan, loose) if scan else None

    def forward(self) -> Partial:
        """`(out, lse)` over all keys."""
        own = self.local.keys(0, self.local.kv.length)
        if not self.plan.uniform:
            return self._forward_directly(own)
        hops = self.plan.hops
        coming = self._onward(own) if len(hops) > 1 else own
        state = self._attend(hops[0], own, None)
        rest = hops[1:]
        if self.middle is not None:
            (which, steps), count = self.middle, len(hops) - 2

            def body(carry, xs):
                (out, lse), cargo = carry
                shift, which = xs
                keys = self._keys(shift, cargo)
                coming = self._onward(keys)
                state = self._switch(which, steps, self._attending(keys), (out, lse))
                return (state, coming.cargo), None

            shifts = jnp.arange(1, count + 1, dtype=jnp.int32)
            carry = (state, coming.cargo)
            (state, cargo), _ = lax.scan(body, carry, (shifts, which))
            coming = self._keys(count + 1, cargo)
            rest = hops[-1:]
        for hop in rest:
            keys = coming
            if hop.shift + 1 < self.plan.n:
                coming = self._onward(keys)
            state = self._attend(hop, keys, state)
        return state

    def backward(self, rows: Rows) -> tuple[Sums, list[Array]]:
        """The gradients that stay, and those of this device's own keys."""
        own = self.local.keys(0, self.local.kv.length)
        sums = self.local.no_sums(rows.wrt)
        if not self.plan.uniform:
            return self._backward_directly(own, rows, sums)
        hops = self.plan.hops
        coming = self._onward(own) if len(hops) > 1 else own
        sums, goes = self._gradient(hops[0], own, rows, sums)
        if len(hops) == 1:
            return sums, goes
        mine = goes

        def hop_of(keys, sums, sent, fn):
            """Adds what is computed of keys to what was, at the hop before, by another."""
            moved = None if sent is None else sent.sent(self.devices, self._next())
            sums, goes = fn(keys, sums)
            if moved is not None:
                goes = [a + b for a, b in zip(goes, moved.arrays(), strict=True)]
            return sums, Cargo(goes)

        def peeled(hop, keys, sums, sent):
            fn = lambda keys, sums: self._gradient(hop, keys, rows, sums)  # noqa: E731
            return hop_of(keys, sums, sent, fn)

        rest, sent = hops[1:], None
        if self.middle is not None:
            (which, steps), count = self.middle, len(hops) - 2
            keys, coming = coming, self._onward(coming)
            sums, sent = peeled(hops[1], keys, sums, None)

            def body(carry, xs):
                sums, sent, cargo = carry
                shift, which = xs
                keys = self._keys(shift, cargo)
                coming = self._onward(keys)

                def fn(keys, sums):
                    step = self._differentiating(keys, rows)
                    return self._switch(which, steps, step, sums)

                sums, sent = hop_of(keys, sums, sent, fn)
                return (sums, sent, coming.cargo), None

            shifts = jnp.arange(2, count + 1, dtype=jnp.int32)
            carry = (sums, sent, coming.cargo)
            (sums, sent, cargo), _ = lax.scan(body, carry, (shifts, which[1:]))
            coming = self._keys(count + 1, cargo)
            rest = hops[-1:]
        for hop in rest:
            keys = coming
            if hop.shift + 1 < self.plan.n:
                coming = self._onward(keys)
            sums, sent = peeled(hop, keys, sums, sent)
        assert sent is not None
        back = sent.sent(self.devices, self._next()).arrays()
        return sums, [a + b for a, b in zip(mine, back, strict=True)]

    def _forward_directly(self, own: Keys) -> Partial:
        state = None
        hops = self.plan.hops
        keys = self._fetched(hops[0], own) if hops else own
        for n, hop in enumerate(hops):
            coming = self._fetched(hops[n + 1], own) if n + 1 < len(hops) else keys
            state = self._attend(hop, keys, state)
            keys = coming
        return self.local.nothing() if state is None else state

    def _backward_directly(self, own: Keys, rows: Rows, sums: Sums):
        mine = self.local.no_gradients(own, rows.wrt)
        hops = self.plan.hops
        keys = self._fetched(hops[0], own) if hops else own
        for n, hop in enumerate(hops):
            coming = self._fetched(hops[n + 1], own) if n + 1 < len(hops) else keys
            sums, goes = self._gradient(hop, keys, rows, sums)
            if hop.shift:
                back = self.devices.onward(-hop.shift)
                goes = Cargo(goes).sent(self.devices, back).arrays()
            mine = [
                _plus(whole, some, hop, 1 if n < 2 else 3)
                for n, (whole, some) in enumerate(zip(mine, goes, strict=True))
            ]
            keys = coming
        return sums, mine

    def _next(self) -> tuple[int, ...]:
        return self.devices.onward(1)

    def _keys(self, shift: Any, cargo: Cargo) -> Keys:
        owner = (self.local.me - shift) % self.devices.count
        return Keys(owner, (0, self.local.kv.length), cargo)

    def _onward(self, keys: Keys) -> Keys:
        """The keys of the device before."""
        owner = (keys.owner - 1) % self.devices.count
        cargo = keys.cargo.sent(self.devices, self._next())
        return Keys(owner, keys.tokens, cargo)

    def _fetched(self, hop: Hop, own: Keys) -> Keys:
        """The keys of the device from which they are needed, and no others."""
        if hop.shift == 0:
            return own
        some = self.local.keys(*hop.keys)
        cargo = some.cargo.sent(self.devices, self.devices.onward(hop.shift))
        return Keys(self._keys(hop.shift, cargo).owner, hop.keys, cargo)

    def _attend(self, hop: Hop, keys: Keys, state: Partial | None) -> Partial:
        fn = self._attending(keys)
        if len(hop.steps) == 1:
            return fn(hop.steps[0], state)
        state = self.local.nothing() if state is None else state
        which = jnp.asarray(hop.which, jnp.int32)
        return self._switch(which, hop.steps, fn, state)

    def _gradient(self, hop: Hop, keys: Keys, rows: Rows, sums: Sums):
        fn = self._differentiating(keys, rows)
        if len(hop.steps) == 1:
            return fn(hop.steps[0], sums)
        which = jnp.asarray(hop.which, jnp.int32)
        return self._switch(which, hop.steps, fn, sums)

    def _switch(self, which: Array, steps: Sequence[Step | None], fn: Callable, state: Any):
        """`which` has the number of the step of each device."""
        branches = [ft.partial(fn, step) for step in steps]
        if len(branches) == 1:
            return branches[0](state)
        return lax.switch(which[self.local.me], branches, state)

    def _attending(self, keys: Keys) -> Callable[..., Partial]:
        def fn(step, state):
            if step is None:
                return state
            return self.local.forward(self.inner, step, keys, state)

        return fn

    def _differentiating(self, keys: Keys, rows: Rows) -> Callable:
        def fn(step, sums):
            if step is None:
                return sums, self.local.no_gradients(keys, rows.wrt)
            return self.local.backward(self.inner, step, keys, rows, sums)

        return fn


def _plus(whole: Array, some: Array, hop: Hop, axis: int) -> Array:
    """Adds the gradients of those keys that were needed to those of all."""
    widths = [(0, 0)] * whole.ndim
    widths[axis] = (hop.keys[0], whole.shape[axis] - hop.keys[1])
    return whole + jnp.pad(some, widths)


def middle(plan: Plan, loose: Plan) -> tuple[Array, tuple[Step | None, ...]] | None:
    """Of all hops but the first and the last: the number of the step of each device at
    each, and the steps. `None` if a loop over them would not be shorter."""
    for one in (plan, loose):
        hops = one.hops[1:-1]
        if not one.uniform or len(hops) < 2:
            continue
        steps = tuple(dict.fromkeys(s for hop in hops for s in hop.steps))
        if len(steps) <= _KINDS or one is loose:
            which = [[steps.index(hop.steps[w]) for w in hop.which] for hop in hops]
            return jnp.asarray(which, jnp.int32), steps
    return None
