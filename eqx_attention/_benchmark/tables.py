"""A report as tables: their titles, headers and cells, and as plain text."""

import collections
import math
from collections.abc import Iterable
from typing import NamedTuple

from .report import Report, Row


# Of the columns of a table, how many name the line, and how many are of speed and memory.
_NAMES, _SPEEDS = 2, 6


class Table(NamedTuple):
    """`best` are the numbers of the lines that are the fastest at their length."""

    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]
    best: set[int]

    def halves(self) -> list["Table"]:
        """Two that are half as wide: speed and memory, and then errors."""
        first, rest = range(_NAMES + _SPEEDS), range(_NAMES + _SPEEDS, len(self.header))
        return [self._some(first), self._some([*range(_NAMES), *rest])]

    def _some(self, columns: Iterable[int]) -> "Table":
        header, *lines = (
            tuple(line[n] for n in columns) for line in (self.header, *self.lines)
        )
        return self._replace(header=header, lines=lines)


def tables(report: Report) -> list[Table]:
    """One a mesh and mask."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        found.setdefault((row.mesh, row.mask), []).append(row)
    small = (report.matmul_tflops or 0) < 1
    return [_table(mesh, mask, rows, small) for (mesh, mask), rows in found.items()]


def _header(small: bool) -> tuple[str, ...]:
    rate = "GFLOP/s" if small else "TFLOP/s"
    times = ("fwd ms", rate, "f+b ms", rate, "of matmul", "MiB")
    return ("length", "mechanism", *times, "error", "grad error", "norm ratio", "max grad")


def _table(mesh: str, mask: str, rows: list[Row], small: bool) -> Table:
    timed = [row for row in rows if row.forward_ms is not None or row.status == "ok"]
    best = set()
    for length in {row.sequence_length for row in timed}:
        rivals = [
            (row.both_ms, n)
            for n, row in enumerate(timed)
            if row.sequence_length == length and row.both_ms is not None
        ]
        if rivals:
            best.add(min(rivals)[1])
    title = f"{mask}, on {mesh}" if mesh else mask
    return Table(title, _header(small), [_cells(row, small) for row in timed], best)


def _cells(row: Row, small: bool) -> tuple[str, ...]:
    mechanism = row.mechanism
    if mechanism == "auto":
        mechanism = f"auto: {row.explain.split(':')[0].split(' ')[0].lower()}"
    return (
        f"{row.sequence_length:,}",
        mechanism,
        _number(row.forward_ms),
        _rate(row.forward_tflops, small),
        _number(row.both_ms),
        _rate(row.both_tflops, small),
        "" if row.both_share is None else f"{row.both_share:.0%}",
        _number(row.both_mib),
        _small(row.error_out),
        _small(row.error_grad),
        "" if row.grad_norm_ratio is None else f"{row.grad_norm_ratio:.4f}",
        _number(row.grad_max),
    )


def _number(x: float | None) -> str:
    """Three digits, but no fewer than those before the point."""
    if x is None:
        return ""
    if x == 0 or not math.isfinite(x):
        return str(x)
    return f"{x:,.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"


def _rate(x: float | None, small: bool) -> str:
    return _number(x if x is None or not small else 1000 * x)


def _small(x: float | None) -> str:
    return "" if x is None else f"{x:.0e}"


def heading(report: Report) -> str:
    s, machine = report.settings, report.machine
    text = (
        f"{machine['device']}, jax {machine['versions']['jax']}: batch {s['batch']}, "
        f"{s['num_attention_heads']} heads over {s['num_key_value_heads']} of "
        f"{s['head_dim']}, {s['dtype']}"
    )
    if report.matmul_tflops is not None:
        small = report.matmul_tflops < 1
        rate = _rate(report.matmul_tflops, small)
        text += f"; a matrix product: {rate} {'GFLOP/s' if small else 'TFLOP/s'}"
    return text


def notes(report: Report) -> list[str]:
    """What was not measured, with the reason; what errors are of; which mesh is best."""
    lines = _refused(report)
    parts = {r.sequence_length: r.reference for r in report.rows if r.reference}
    for length, part in sorted(parts.items()):
        if part != "all":
            lines.append(f"errors and gradients at {length:,} are of {part}")
    ranked = report.meshes()
    if len(ranked) > 1:
        each = [
            f"{mesh} ({'not all measured' if math.isinf(x) else f'{x:.2f}'})"
            for mesh, x in ranked
        ]
        lines.append(f"meshes, the fastest first, relative to it: {', '.join(each)}")
    if report.interrupted:
        lines.append("stopped before its end")
    for name, why in report.unwritten.items():
        lines.append(f"{name}: could not be written: {why}")
    return lines


def _refused(report: Report) -> list[str]:
    """Those of a mechanism and a reason in one line."""
    found: dict[tuple[str, ...], list[str]] = {}
    counts = collections.Counter()
    for row in report.rows:
        name = f"{row.mechanism} on {row.mesh}" if row.mesh else row.mechanism
        counts[name] += 1
        if row.status != "ok":
            where = f"{row.mask} {row.sequence_length:,}"
            found.setdefault((name, row.status, row.reason), []).append(where)
    lines = []
    for (name, status, reason), where in found.items():
        at = "" if len(where) == counts[name] else f" ({', '.join(where)})"
        lines.append(f"{name}{at}: {status}: {reason}")
    return lines


def plain(report: Report) -> str:
    lines = [heading(report)]
    for table in tables(report):
        lines += ["", f"{table.title} (* the fastest)"]
        if table.lines:
            lines += _aligned(table)
    found = notes(report)
    return "\n".join([*lines, *([""] if found else []), *found])


def _aligned(table: Table) -> list[str]:
    cells = [table.header, *table.lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    out = []
    for number, line in enumerate(cells, start=-1):
        mark = "*" if number in table.best else " "
        texts = [
            text.ljust(width) if title == "mechanism" else text.rjust(width)
            for title, text, width in zip(table.header, line, widths, strict=True)
        ]
        out.append(f"{mark} {'  '.join(texts)}".rstrip())
    return out
