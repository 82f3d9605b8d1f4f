"""How long a call takes, of what is timed in turn: a round of each, three times."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple


ROUNDS = 3
_ROUND = 0.06  # seconds


class Calls(NamedTuple):
    """What is timed, already compiled, and how to wait for what a call returns."""

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]
    note: dict[str, Any]


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """A call, of as many as take 60 ms, but at most 200; after one that is not counted."""
    start = time.perf_counter()
    wait(call())
    count = math.ceil(_ROUND / (time.perf_counter() - start))
    count = max(1, min(200, count))
    start = time.perf_counter()
    for _ in range(count):
        out = call()
    wait(out)
    return (time.perf_counter() - start) / count
