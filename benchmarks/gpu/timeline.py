"""What the GPUs did during one call: how much of the communication was exposed."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from .profile import profiled


# In the names of kernels and copies that move data between devices.
_MOVES = ("nccl", "sendrecv", "collective", "memcpyp2p", "peer")


def timeline(call: Callable[[], Any], folder: pathlib.Path) -> dict[str, Any]:
    """Traces a call to a folder; of each device, in milliseconds: the whole, when any
    kernel computed, when anything was moved, when it was moved and nothing computed, and
    when nothing happened. And the longest events of the first device, with their starts."""
    summary, events = {}, []
    for device, found in profiled(call, str(folder)).items():
        if not found:
            continue
        start = min(a for a, _, _ in found)
        moving = [(a, b) for a, b, name in found if _moves(name)]
        computing = [(a, b) for a, b, name in found if not _moves(name)]
        both = _total(moving) + _total(computing) - _total([*moving, *computing])
        whole = max(b for _, b, _ in found) - start
        summary[device] = {
            "whole_ms": whole / 1e6,
            "computing_ms": _total(computing) / 1e6,
            "moving_ms": _total(moving) / 1e6,
            "exposed_ms": (_total(moving) - both) / 1e6,
            "idle_ms": (whole - _total([*moving, *computing])) / 1e6,
        }
        if not events:
            longest = sorted(found, key=lambda e: e[0] - e[1])[:60]
            events = [
                [round((a - start) / 1e6, 3), round((b - a) / 1e6, 3), name[:80]]
                for a, b, name in sorted(longest)
            ]
    return {"summary": summary, "start_ms, ms, name": events}


def _moves(name: str) -> bool:
    return any(word in name.lower() for word in _MOVES)


def _total(ranges: Iterable[tuple[float, float]]) -> float:
    """How long their union is."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(ranges):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total
