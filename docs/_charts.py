"""Charts as SVG whose colours are those of the page, in its light scheme and its dark one.

They are put into pages as they are, so that `_static/extra.css` reaches them: classes `s0`
to `s5` are colours of series, and text has the colour of text. There is no blank line in
what they return, at which Markdown would end them.
"""

import html
import math
from collections.abc import Mapping, Sequence


WIDTH = 480
_ROW, _NAMES, _VALUES = 19, 112, 52


def figure(svg: str, caption: str = "") -> str:
    """One drawing, or several side by side, with a caption."""
    text = f"\n<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="chart">\n{svg}{text}\n</figure>\n'


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    label = html.escape(title, quote=True)
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">'
    return "\n".join([head, *parts, "</svg>"])


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {where}{kind}>{html.escape(words)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    where = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {where} class="{kind}"/>'


def bars(
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    series: Sequence[str],
    unit: str,
    *,
    top: float | None = None,
) -> str:
    """A horizontal bar for each series in each group, with its number.

    **Arguments:**

    - `groups`: from the name of a group to its numbers, by series.
    - `series`: all that there are. The place in it says which colour one has.
    - `unit`: of the numbers, or the empty string.
    - `top`: what the longest bar could be. By default, what the longest is.
    """
    most = top or max(value for of in groups.values() for value in of.values())
    room = WIDTH - _NAMES - _VALUES
    y, parts = 16.0, [text(0, 16, f"{title}, {unit}" if unit else title, "title")]
    for group, of in groups.items():
        y += 24
        parts.append(text(0, y, group, "group"))
        for name in (name for name in series if name in of):
            y += _ROW
            length, color = room * of[name] / most, series.index(name)
            parts += [
                text(_NAMES - 8, y, name, anchor="end"),
                f'<rect x="{_NAMES}" y="{y - 11:.1f}" width="{length:.1f}" height="14" '
                f'class="s{color}"/>',
                text(_NAMES + length + 5, y, _number(of[name])),
            ]
    return svg(WIDTH, y + 8, title, parts)


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    *,
    log: bool = False,
    top: float | None = None,
) -> str:
    """A line for each series, over powers of two; both axes logarithmic if `log`.

    **Arguments:**

    - `series`: from a name to the points, in any order.
    - `top`: where the axis of y ends. By default at the largest number.
    """
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points]
    left, right, above, height = 60.0, WIDTH - 14.0, 34.0, 250.0
    ticks = _decades(ys) if log else _steps(max(ys) if top is None else top)
    low, high = ticks[0], ticks[-1]

    def across(x: float) -> float:
        if len(xs) == 1:
            return (left + right) / 2
        span = math.log2(xs[-1] / xs[0])
        return left + 24 + (right - left - 48) * math.log2(x / xs[0]) / span

    def up(y: float) -> float:
        if log:
            share = math.log(y / low) / math.log(high / low)
        else:
            share = (y - low) / (high - low)
        return height - (height - above) * share

    parts = [text(0, 16, title, "title")]
    for tick in ticks:
        parts += [line(left, up(tick), right, up(tick))]
        parts += [text(left - 7, up(tick) + 4, _number(tick), anchor="end")]
    parts += [text(across(x), height + 17, f"{x:,.0f}", anchor="middle") for x in xs]
    parts += [text((left + right) / 2, height + 36, x_label, "axis", "middle")]
    y = height + 58
    for n, (name, points) in enumerate(series.items()):
        places = [(across(x), up(v), x, v) for x, v in sorted(points)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, *_ in places)
        parts.append(f'<polyline points="{path}" class="line s{n}"/>')
        for a, b, x, v in places:
            told = html.escape(f"{name}, {x:,.0f}: {_number(v)}")
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" class="s{n}">')
            parts.append(f"<title>{told}</title></circle>")
        at = f'x="{left}" y="{y - 10:.1f}"'
        parts.append(f'<rect {at} width="18" height="10" class="s{n}"/>')
        last = "" if log else f": {', '.join(_number(v) for *_, v in places)}"
        parts.append(text(left + 25, y, name + last))
        y += _ROW
    return svg(WIDTH, y - 8, title, parts)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 20 else f"{x:.3g}"


def _steps(top: float) -> list[float]:
    """0 to at least `top`, in four or five equal steps that read well."""
    rough = top / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= rough * (1 - 1e-9))
    return [round(n * step, 10) for n in range(math.ceil(top / step - 1e-9) + 1)]


def _decades(ys: Sequence[float]) -> list[float]:
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    return [10.0**n for n in range(low, max(high, low + 1) + 1)]
