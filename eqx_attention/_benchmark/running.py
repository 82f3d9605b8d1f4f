"""A run: from what is to be measured to a report, and its files."""

import contextlib
import dataclasses
import datetime
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from .._device import device_name
from .extras import needed
from .files import check_writable, write_text
from .measure import Measuring, Watch
from .plot import check_plot, draw
from .report import Report, Row
from .saving import check_table, save_table
from .settings import Settings
from .versions import versions


Path = str | os.PathLike[str]
_PACKAGES = ("jax", "jaxlib", "equinox", "eqx_attention", "tokamax", "torch")


class Files(NamedTuple):
    json: Path | None
    csv: Path | None
    plot: Path | None
    table: Path | None


def run_all(settings: Settings, files: Files, progress: bool) -> Report:
    """Measures; files are whole, and hold all rows that there are, at any time."""
    for name, path in zip(("json", "csv", "plot", "save_table"), files, strict=True):
        if path is not None:
            check_writable(name, path)
    if files.plot is not None:
        check_plot(files.plot)
    if files.table is not None:
        check_table(files.table, settings)
    rows: list[Row] = []
    machine = machine_of(settings)
    unwritten: dict[str, str] = {}

    def write(name: str, path: Path | None, write_to: Callable[[Path], None]) -> None:
        if path is None:
            return
        unwritten.pop(name, None)
        try:
            write_to(path)
        except (OSError, ValueError) as error:
            unwritten[name] = str(error)

    def write_rows(report: Report) -> None:
        write("json", files.json, lambda path: write_text(path, report.to_json()))
        write("csv", files.csv, lambda path: write_text(path, report.to_csv()))

    def report(interrupted: bool) -> Report:
        found = (settings.as_dict(), machine, measuring.matmul_tflops)
        return Report(*found, rows=tuple(rows), interrupted=interrupted)

    with _watched(progress) as watch:
        measuring = Measuring(settings, watch)
        try:
            for row in measuring.rows():
                rows.append(row)
                write_rows(report(False))
        except KeyboardInterrupt:  # between two cases
            measuring.interrupted = True
    found = report(measuring.interrupted)
    write_rows(found)
    write("plot", files.plot, lambda path: draw(found, path))
    write("save_table", files.table, lambda path: save_table(found, settings, path))
    return dataclasses.replace(found, unwritten=unwritten)


def machine_of(settings: Settings) -> dict[str, Any]:
    device = settings.places[0].devices[0]
    return {
        "date": datetime.date.today().isoformat(),
        "platform": device.platform,
        "device": device_name(device.platform),
        "devices": len(jax.devices()),
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
    }


@contextlib.contextmanager
def _watched(progress: bool) -> Iterator[Watch]:
    """A bar on the standard error, with what is being done."""
    if not progress:
        yield lambda steps, done, doing: None
        return
    progress_of, console_of = (
        needed(name, "progress") for name in ("rich.progress", "rich.console")
    )
    columns = (
        progress_of.BarColumn(30),
        progress_of.MofNCompleteColumn(),
        progress_of.TimeElapsedColumn(),
        progress_of.TextColumn("{task.description}"),
    )
    console = console_of.Console(stderr=True)
    options = {"console": console, "transient": True, "disable": not console.is_terminal}
    with progress_of.Progress(*columns, **options) as bar:
        task = bar.add_task("", total=None)
        yield lambda steps, done, doing: bar.update(
            task, total=steps, completed=done, description=doing
        )
