"""How many times as fast as its peers our kernel is."""

import math
from typing import Any

from .cases import TIMED


OURS = "flash"
_PARTS = ("fwd", "fb")


def _geometric(xs: list[float]) -> float | None:
    return math.exp(sum(map(math.log, xs)) / len(xs)) if xs else None


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """`{case: {peer: {"fwd": …, "fb": …}}}`: their time divided by ours."""
    times = {(row["case"], row["mechanism"]): row for row in rows}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (case, name), row in times.items():
        ours = times.get((case, OURS))
        if name == OURS or ours is None:
            continue
        ratio = {part: row[f"{part}_ms"] / ours[f"{part}_ms"] for part in _PARTS}
        found.setdefault(case, {})[name] = ratio
    return found


def _plain_causal(case: str) -> bool:
    """Causal, and of heads of 64 or 128: what the geometric means are over."""
    timed = TIMED.get(case)
    return (
        timed is not None
        and timed.kind == "causal"
        and timed.shape[4:] in ((64, 64), (128, 128))
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = ratios(rows)
    names = sorted({name for peers in found.values() for name in peers})
    means = {}
    for name in names:
        of = [x[name] for case, x in found.items() if _plain_causal(case) and name in x]
        means[name] = {part: _geometric([ratio[part] for ratio in of]) for part in _PARTS}
    return {"ours": OURS, "ratios": found, "means of causal, 64 and 128": means}


def lines(summary: dict[str, Any]) -> list[str]:
    found, means = summary["ratios"], summary["means of causal, 64 and 128"]
    out = [f"times as fast as: {', '.join(means)} (forward, forward and backward)"]

    def cells(of: dict) -> str:
        def cell(x: dict | None) -> str:
            numbers = [None, None] if x is None else [x[part] for part in _PARTS]
            texts = ("     " if y is None else f"{y:5.2f}" for y in numbers)
            return " ".join(texts)

        return "  ".join(f"{cell(of.get(name)):>12s}" for name in means)

    out.append(" " * 36 + "  ".join(f"{name:>12s}" for name in means))
    out += [f"{case:36s}{cells(of)}" for case, of in found.items()]
    out.append(f"{'geometric mean, causal, 64 and 128':36s}{cells(means)}")
    return out
