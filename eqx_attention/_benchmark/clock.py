"""How long a call takes, of what is timed in turn."""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar


_Name = TypeVar("_Name", bound=Hashable)


def seconds(
    call: Callable[[], Any],
    wait: Callable[[Any], Any],
    at_least: float = 0.06,
    each: bool = False,
) -> float:
    """A call, of as many as take `at_least` seconds, but at most 200; after one that is not
    counted, unless that takes more than a second, and then counts alone. So the call has
    been made before, and is compiled.

    `wait` waits for what a call returns: for that of the last one, or if `each` of each
    one, without which the devices of a CPU that wait for one another may wait forever.
    """
    start = time.perf_counter()
    wait(call())
    took = time.perf_counter() - start
    if took > 1:
        return took
    count = max(1, min(200, math.ceil(at_least / max(took, 1e-9))))
    start = time.perf_counter()
    for _ in range(count - 1):
        out = call()
        if each:
            wait(out)
    wait(call())
    return (time.perf_counter() - start) / count


def in_turn(
    calls: Mapping[_Name, Callable[[], Any]],
    wait: Callable[[Any], Any],
    rounds: int,
    at_least: float = 0.06,
) -> dict[_Name, list[float]]:
    """The seconds of each, in each round. They are timed one after another, round after
    round: whatever else the machine does falls on all of them alike."""
    times: dict[_Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, wait, at_least))
    return times
