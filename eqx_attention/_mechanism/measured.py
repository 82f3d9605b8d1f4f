"""Which of the mechanisms for GPUs is faster, from what was measured on one."""

import functools as ft
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from .._mask import Full
from .base import Request


# Written by benchmarks/auto_table.py.
TABLE = pathlib.Path(__file__).parent / "measured.json"


@ft.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


class Asked(NamedTuple):
    """What of a call decides which row of a table it is like."""

    length: int
    head_dim: int
    masked: bool

    def unlike(self, shape: Sequence[int], masked: bool) -> tuple[float, bool, float]:
        """How unlike a row is, of a (batch, length, heads, key heads, head_dim): in the
        size of heads, then in whether there is a mask, then in length."""
        _, length, _, _, head_dim = shape
        return (
            abs(math.log2(head_dim / max(1, self.head_dim))),
            masked != self.masked,
            abs(math.log2(length / max(1, self.length))),
        )


def asked(request: Request) -> Asked:
    _, length, _, head_dim = request.query.shape
    return Asked(length, head_dim, not isinstance(request.pairs.mask, Full))


def nearest(length: int, head_dim: int, masked: bool) -> dict[str, Any]:
    """The row of the table that is most like a call."""
    call = Asked(length, head_dim, masked)
    rows = _table()["rows"]
    return min(rows, key=lambda row: call.unlike(row["shape"], row["masked"]))


def faster(request: Request) -> tuple[str, str]:
    """`"flash"` or `"cudnn"`, and why."""
    row = nearest(*asked(request))
    ms = row["ms"]
    best, other = sorted(ms, key=lambda name: ms[name])
    mask = "causal" if row["masked"] else "without a mask"
    shape = tuple(row["shape"])
    why = (
        f"{ms[best]:.2f} ms against {other}'s {ms[other]:.2f}, forward and backward, at "
        f"(batch, length, heads, key heads, head_dim) = {shape}, {mask}, on one "
        f"{_table()['device']}"
    )
    return best, why
