"""Draws the masks and scores of a page, from the page's own snippets.

`python docs/_pictures.py PAGE` runs the snippets of a page in order, and prints a JSON list
that has, for each of them, an SVG or null: what `mask` sees, by `eqa.visualise`, if the
snippet gives `mask` a value; or what `score` does to logits that are all equal. Sizes are
those of `query` and `key_`.
"""

import contextlib
import inspect
import io
import json
import pathlib
import re
import sys
from typing import Any

import eqx_attention as eqa
import jax.numpy as jnp
import numpy as np
from _charts import figure, line, svg, text


FENCE = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_SIZE = 160  # of a picture, in the units of SVG
_REACH = 60.0  # of the logits of a curve


def of_mask(mask: Any, num_heads: int, q_len: int, kv_len: int, head: int = 0) -> str:
    """Dark where a key (column) is visible to a query (row)."""
    drawn = eqa.visualise(mask, q_len, kv_len, num_heads=num_heads, head=head, width=kv_len)
    rows = [[{"█": 1.0, "·": 0.0}[cell] for cell in row] for row in drawn.split("\n")]
    return _cells(rows, "which keys (columns) each query (rows) sees")


def of_score(score: Any, num_heads: int, q_len: int, kv_len: int, head: int = 0) -> str:
    """The weights of one head where all logits were 0; or, if a score goes by the logit
    alone, the new logit over the old one."""
    query, key_ = jnp.zeros((q_len, num_heads, 1)), jnp.zeros((kv_len, num_heads, 1))
    weights = np.asarray(eqa.attention_weights(query, key_, key_, score=score))[head]
    if np.ptp(weights) > 1e-6:
        rows = (weights / weights.max()).tolist()
        return _cells(rows, "the weight of each key (columns) to each query (rows)")
    logits = jnp.linspace(-_REACH, _REACH, 61)
    query = jnp.ones((1, num_heads, 1))
    key_ = jnp.broadcast_to(logits[:, None, None], (61, num_heads, 1))
    weights = eqa.attention_weights(query, key_, key_, scale=1.0, score=score)[head, 0]
    new = jnp.log(weights) - jnp.log(weights[30])  # up to that of the logit 0
    return _curve(np.asarray(logits), np.asarray(new), "the new logit, over the old one")


def _cells(rows: list[list[float]], title: str) -> str:
    """Runs of equal cells are one rectangle, and all of one shade one path."""
    paths: dict[int, list[str]] = {}
    cell = _SIZE / max(len(rows), len(rows[0]))
    for i, row in enumerate(rows):
        j = 0
        while j < len(row):
            end, shade = j, round(20 * row[j])
            while end < len(row) and round(20 * row[end]) == shade:
                end += 1
            width, height = (end - j) * cell, cell - 0.4
            place = f"M{j * cell:.1f} {i * cell:.1f}"
            paths.setdefault(shade, []).append(
                f"{place}h{width:.1f}v{height:.1f}h-{width:.1f}z"
            )
            j = end
    parts = [
        f'<path class="cells s0" fill-opacity="{shade / 20}" d="{"".join(path)}"/>'
        for shade, path in sorted(paths.items())
        if shade
    ]
    width, height = (n * cell for n in (len(rows[0]), len(rows)))
    frame = f'<rect width="{width:.1f}" height="{height:.1f}" class="frame"/>'
    return figure(svg(width, height, title, [frame, *parts]))


def _curve(x: np.ndarray, y: np.ndarray, title: str) -> str:
    half = _SIZE / 2
    at = lambda v: half * v / _REACH  # noqa: E731
    points = " ".join(f"{half + at(a):.1f},{half - at(b):.1f}" for a, b in zip(x, y))
    parts = [
        line(0, half, _SIZE, half),
        line(half, 0, half, _SIZE),
        line(0, _SIZE, _SIZE, 0),
        f'<polyline points="{points}" class="line s0"/>',
        text(_SIZE - 2, half + 14, f"{_REACH:.0f}", anchor="end"),
        text(half + 4, 12, f"{_REACH:.0f}"),
    ]
    return figure(svg(_SIZE, _SIZE, title, parts))


def pictures(page: str) -> list[str | None]:
    """Of each snippet of a page, in order."""
    namespace: dict[str, Any] = {"__name__": "page"}
    found: list[str | None] = []
    for code in FENCE.findall(page):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(inspect.cleandoc(code), namespace)
        draw = {"mask": of_mask, "score": of_score}
        given = [name for name in draw if re.search(f"^{name} = ", code, re.MULTILINE)]
        if not given:
            found.append(None)
            continue
        (name,) = given
        query, key_ = namespace["query"], namespace["key_"]
        q_len, num_heads, _ = query.shape
        sizes = (num_heads, q_len, key_.shape[0])
        found.append(draw[name](namespace[name], *sizes))
    return found


if __name__ == "__main__":
    print(json.dumps(pictures(pathlib.Path(sys.argv[1]).read_text())))
