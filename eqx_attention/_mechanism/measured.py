"""Which of the mechanisms for GPUs is faster, from what was measured on one."""

import functools as ft
import json
import math
import pathlib
from typing import Any

from .._mask import Full
from .base import Request


# Written by benchmarks/auto_table.py.
TABLE = pathlib.Path(__file__).parent / "measured.json"


@ft.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def nearest(length: int, head_dim: int, masked: bool) -> dict[str, Any]:
    """The row of the table that is most like a call: in the size of heads, then in whether
    there is a mask, then in length."""

    def distance(row):
        _, row_length, _, _, row_dim = row["shape"]
        return (
            abs(math.log2(row_dim / head_dim)),
            row["masked"] != masked,
            abs(math.log2(row_length / length)),
        )

    return min(_table()["rows"], key=distance)


def faster(request: Request) -> tuple[str, str]:
    """`"flash"` or `"cudnn"`, and why."""
    _, length, _, head_dim = request.query.shape
    row = nearest(length, head_dim, not isinstance(request.pairs.mask, Full))
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
