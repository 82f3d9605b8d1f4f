"""Which layout a ring has, and what follows from that."""

import math
from typing import Any, NamedTuple

from .._mechanism import Request
from .cargo import Devices
from .hop import Local
from .layout import chunks_of
from .plan import Plan, plan, Side


# Tokens are exchanged at each call if devices then wait so much less for one another.
_WORTH = 0.85


class Chosen(NamedTuple):
    """The layout of a ring, the plan of its hops, and why it is this one."""

    layout: str
    why: str
    devices: Devices
    request: Request
    q: Side
    kv: Side
    plan: Plan

    def local(self, request: Request, me: Any) -> Local:
        """The request of device `me`, in this layout."""
        return Local(request, self.devices, self.q, self.kv, me)

    def loose(self) -> Plan:
        """The same plan without what is special to one hop."""
        pairs = self.request.pairs
        return plan(pairs.mask, pairs.score, self.q, self.kv, shifts=False)


def devices_of(request: Request) -> Devices:
    axes = request.split.key
    return Devices(tuple(name for name, _ in axes), math.prod(n for _, n in axes))


def choose(request: Request, layout: str) -> Chosen:
    """The layout asked for, or, if `"auto"`, the one that takes less time."""
    if layout != "auto":
        return _in_layout(request, layout, f"{layout}, as asked for")
    plain = _in_layout(request, "contiguous", "")
    if plain.devices.count == 1:
        return plain._replace(why="contiguous: there is one device")
    if any(length % 2 for length in request.lengths):
        return plain._replace(why="contiguous: devices have odd numbers of tokens")
    zigzag = _in_layout(request, "zigzag", "")
    before, after = plain.plan.imbalance, zigzag.plan.imbalance
    if zigzag.plan.slowest < _WORTH * plain.plan.slowest:
        why = f"zigzag, by exchange: contiguous, the imbalance would be {before:.2f}"
        return zigzag._replace(why=why)
    return plain._replace(why=f"contiguous: in zigzag, the imbalance would be {after:.2f}")


def _in_layout(request: Request, layout: str, why: str) -> Chosen:
    devices, pairs = devices_of(request), request.pairs
    chunks = chunks_of(layout, devices.count)
    q, kv = (
        Side(chunks, length // len(chunks[0]), None if x.position is not None else x.shift)
        for x, length in zip((pairs.q, pairs.kv), request.lengths, strict=True)
    )
    found = plan(pairs.mask, pairs.score, q, kv)
    return Chosen(layout, why, devices, request, q, kv, found)
