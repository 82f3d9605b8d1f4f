"""How long a call takes, of what is timed in turn: a round of each, three times."""

from collections.abc import Callable
from typing import Any, NamedTuple

from eqx_attention._benchmark.clock import in_turn as in_turn, seconds as seconds


ROUNDS = 3


class Calls(NamedTuple):
    """What is timed, already compiled, and how to wait for what a call returns."""

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]
    note: dict[str, Any]
