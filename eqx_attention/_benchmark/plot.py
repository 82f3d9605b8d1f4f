"""Speed and memory over length."""

import io
import os

from .extras import needed
from .files import write_bytes
from .report import Report, Row


_PANELS = (
    ("both_ms", "forward and backward, ms"),
    ("both_tflops", "forward and backward, TFLOP/s"),
    ("both_mib", "peak memory, MiB"),
)


def check_plot(path: str | os.PathLike[str]) -> None:
    """That a plot can be drawn there."""
    needed("matplotlib.figure", "plot")
    known = needed("matplotlib.backend_bases", "plot").FigureCanvasBase.filetypes
    suffix = os.path.splitext(path)[1].removeprefix(".")
    if suffix not in known:
        raise ValueError(
            f"plot: expected a file name that ends in one of {', '.join(sorted(known))}; "
            f"got {os.fspath(path)!r}."
        )


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """A line a mechanism, in a row of panels a mask, all axes logarithmic."""
    figures = needed("matplotlib.figure", "plot")
    masks = list(dict.fromkeys((row.mask, row.mesh) for row in report.rows))
    height = max(1, len(masks))
    figure = figures.Figure(figsize=(14, 3.6 * height), layout="constrained")
    axes = figure.subplots(height, len(_PANELS), squeeze=False)
    lengths = sorted({row.sequence_length for row in report.rows})
    names = list(dict.fromkeys(row.mechanism for row in report.rows))
    for line, (mask, mesh) in zip(axes, masks, strict=False):
        rows = [row for row in report.rows if (row.mask, row.mesh) == (mask, mesh)]
        for ax, (field, label) in zip(line, _PANELS, strict=True):
            for number, name in enumerate(names):
                _line(ax, [row for row in rows if row.mechanism == name], field, number)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xlabel("length")
            ax.set_xticks(lengths, [str(x) for x in lengths])
            ax.set_xticks([], minor=True)
            ax.set_ylabel(label)
            ax.grid(alpha=0.3)
            ax.set_title(f"{mask}, on {mesh}" if mesh else mask)
    for line in axes:
        if line[0].get_legend_handles_labels()[0]:
            line[0].legend(fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format=os.path.splitext(path)[1].removeprefix("."), dpi=120)
    write_bytes(path, out.getvalue())


def _line(ax, rows: list[Row], field: str, number: int) -> None:
    points = [(row.sequence_length, getattr(row, field)) for row in rows]
    points = sorted((x, y) for x, y in points if y is not None)
    if points:
        # Those that one mechanism does as another are one upon the other.
        style = "--" if rows[0].mechanism == "auto" else "-"
        ax.plot(
            *zip(*points, strict=True),
            style,
            marker="o",
            markersize=4,
            color=f"C{number}",
            label=rows[0].mechanism,
        )
