"""`python -m eqx_attention.benchmark`."""

import os
import pathlib
from typing import Annotated, Any

import rich.box
import rich.console
import rich.markup
import rich.table
import typer

from .._mechanism.saved_table import VARIABLE
from .masks import MASKS
from .places import AXIS_NAMES
from .report import Report
from .settings import PEERS
from .tables import heading, notes, Table, tables


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_masks = "; ".join(f"{name}: {mask.says}" for name, mask in MASKS.items())
_Path = pathlib.Path | None


def _option(*text: str, **more: Any) -> Any:
    return typer.Option(help=" ".join(text), show_default=False, **more)


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [x.strip() for x in text.split(",") if x.strip()]


def _numbers(name: str, text: str | None) -> list[int] | None:
    parts = _split(text)
    if parts is None:
        return None
    if not parts or not all(x.removeprefix("-").isdecimal() for x in parts):
        raise ValueError(f"{name}: expected numbers with commas between, got {text!r}.")
    return [int(x) for x in parts]


@app.command()
def benchmark(
    sequence_length: Annotated[str | None, _option("Lengths, with commas between.")] = None,
    masks: Annotated[
        str, _option(f"Masks, with commas between ({_masks}; or as in window:1023).")
    ] = "full,causal,window",
    mechanisms: Annotated[str | None, _option("Mechanisms; default: all.")] = None,
    num_attention_heads: Annotated[
        int | None, _option("The number of query heads.")
    ] = None,
    num_key_value_heads: Annotated[int | None, _option("The number of key heads.")] = None,
    head_dim: Annotated[int | None, _option("The channels of a head.")] = None,
    batch: Annotated[
        int | None, _option("The batch size; default: the least that the meshes can split.")
    ] = None,
    dtype: Annotated[str | None, _option("The dtype of the operands.")] = None,
    chunk_size: Annotated[int | None, _option("The size of Blockwise's tiles.")] = None,
    compare: Annotated[
        str, _option(f"Libraries to measure beside: {', '.join(PEERS)}.")
    ] = "",
    axis_dims: Annotated[
        list[str] | None,
        _option("The sizes of a mesh, such as 1,1,1,-1; several times, to rank meshes."),
    ] = None,
    axis_names: Annotated[
        str, _option("The names of its axes; default: dp,fsdp,tp,sp.")
    ] = ",".join(AXIS_NAMES),
    mesh: Annotated[
        list[str] | None,
        _option("The same in one: dp=2,sp=4."),
    ] = None,
    rounds: Annotated[int, _option("How often all are timed in turn; default 5.")] = 5,
    json: Annotated[_Path, _option("A file for all that is measured.")] = None,
    csv: Annotated[_Path, _option("A file for the rows.")] = None,
    plot: Annotated[_Path, _option("A picture of speed and memory over length.")] = None,
    save_table: Annotated[
        _Path, _option(f"A table for Auto, which {VARIABLE} is to name.")
    ] = None,
):
    """Measures attention on this machine: speed, memory and errors of all mechanisms."""
    from ..benchmark import run

    try:
        report = run(
            axis_dims=_meshes(axis_dims),
            axis_names=tuple(_split(axis_names) or ()),
            sequence_length=_numbers("sequence_length", sequence_length),
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            batch=batch,
            dtype=dtype,
            chunk_size=chunk_size,
            masks=_split(masks) or (),
            mechanisms=_split(mechanisms),
            compare=_split(compare) or (),
            mesh=list(mesh) if mesh else None,
            rounds=rounds,
            json=json,
            csv=csv,
            plot=plot,
            save_table=save_table,
            progress=True,
        )
    except (TypeError, ValueError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    show(report)
    for name, path in (("json", json), ("csv", csv), ("plot", plot)):
        if path is not None and name not in report.unwritten:
            typer.echo(f"{name}: {path}")
    written = "save_table" not in report.unwritten
    if save_table is not None and written and save_table.exists():
        typer.echo(f"Auto chooses by it with {VARIABLE}={os.path.abspath(save_table)}")
    if report.interrupted:
        raise typer.Exit(130)
    if report.unwritten:
        raise typer.Exit(1)
    if not any(row.status == "ok" for row in report.rows):
        typer.echo("Error: nothing could be measured.", err=True)
        raise typer.Exit(1)


def _meshes(texts: list[str] | None) -> list[list[int]] | None:
    if not texts:
        return None
    return [_numbers("axis_dims", text) or [] for text in texts]


def show(report: Report) -> None:
    """Prints a report."""
    console = rich.console.Console()
    console.print(heading(report), markup=False, highlight=False, soft_wrap=True)
    for table in tables(report):
        columns = zip(table.header, *table.lines, strict=True)
        wanted = 6 + sum(1 + max(map(len, column)) for column in columns)
        if not console.is_terminal:
            console.width = max(console.width, wanted)
        parts = [table] if wanted <= console.width else table.halves()
        for part in parts if table.lines else ():
            console.print(_rich_table(part))
    for note in notes(report):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _rich_table(table: Table) -> rich.table.Table:
    made = rich.table.Table(
        title=rich.markup.escape(table.title),
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 0, 0, 0),
        pad_edge=False,
    )
    for title in table.header:
        left = title == "mechanism"
        made.add_column(title, justify="left" if left else "right", no_wrap=True)
    for number, line in enumerate(table.lines):
        best = number in table.best
        length, name, *rest = (rich.markup.escape(text) for text in line)
        made.add_row(
            length, f"{name} *" if best else name, *rest, style="bold green" if best else ""
        )
    return made


def main() -> None:
    app(prog_name="python -m eqx_attention.benchmark")
