"""What the GPUs did during one call: how much of the communication was exposed."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .profile import Event, profiled


# In the names of kernels and copies that move data between devices.
_MOVES = ("nccl", "sendrecv", "collective", "memcpyp2p", "peer")


_CALLS = 3


def timeline(call: Callable[[], Any], folder: pathlib.Path) -> dict[str, Any]:
    """Traces calls, one right after another, to a folder. Of one in the middle, and of each
    device, in milliseconds: the whole, up to the next call; when any kernel computed, when
    anything was moved, when it was moved and nothing computed, and when nothing happened.
    And the longest events of the first device, with their starts."""

    def run():
        for _ in range(_CALLS - 1):
            call()
        return call()

    summary, longest = {}, []
    for device, found in profiled(run, str(folder)).items():
        if not found:
            continue
        start, end, events = one_of(found)
        moving = [(a, b) for a, b, name in events if _moves(name)]
        computing = [(a, b) for a, b, name in events if not _moves(name)]
        both = _total(moving) + _total(computing) - _total([*moving, *computing])
        summary[device] = {
            "whole_ms": (end - start) / 1e6,
            "computing_ms": _total(computing) / 1e6,
            "moving_ms": _total(moving) / 1e6,
            "exposed_ms": (_total(moving) - both) / 1e6,
            "idle_ms": (end - start - _total([*moving, *computing])) / 1e6,
        }
        if not longest:
            longest = sorted(events, key=lambda e: e[0] - e[1])[:60]
    first = min((event.start for event in longest), default=0)
    events = [
        [round((a - first) / 1e6, 3), round((b - a) / 1e6, 3), name[:80]]
        for a, b, name in sorted(longest)
    ]
    return {"summary": summary, "start_ms, ms, name": events}


def one_of(found: Sequence[Event]) -> tuple[float, float, list[Event]]:
    """From when to when a call in the middle ran, and what: calls run as many kernels."""
    found = sorted(found)
    each = len(found) // _CALLS
    first = _CALLS // 2 * each
    return found[first].start, found[first + each].start, found[first : first + each]


def _moves(name: str) -> bool:
    return any(word in name.lower() for word in _MOVES)


def _total(ranges: Iterable[tuple[float, float]]) -> float:
    """How long their union is."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(ranges):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total
