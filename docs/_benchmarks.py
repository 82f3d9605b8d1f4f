"""Prints the tables of what was timed on a GPU, from the results that are committed.

`_hooks.py` puts them where pages have `<!-- gpu -->`, `<!-- gpus -->`, `<!-- decode -->`
or `<!-- nsight -->`.
"""

import json
import pathlib
import re
from typing import Any


_RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
# How results call them -> how the page does.
_NAMES = {
    "flash": "`Flash`",
    "flash, reproducible": "`Flash(reproducible=True)`",
    "jax.nn cudnn": "cuDNN",
    "tokamax": "tokamax",
    "flex": "FlexAttention",
}
_DOT = "\u00a0·\u00a0"  # at which no line is broken
_MASKS = {"full": "none", "causal": "causal"}


def _cells(rows: dict[str, dict[str, Any]], unit: str) -> list[str]:
    """Forward · forward and backward, of each of `_NAMES`."""
    cells = []
    for name in _NAMES:
        row = rows.get(name)
        digits = ".0f" if unit == "tflops" else ".2f"
        both = None if row is None else (row[f"fwd_{unit}"], row[f"fb_{unit}"])
        cells.append("" if both is None else _DOT.join(f"{x:{digits}}" for x in both))
    return cells


def _table(first: str, rows: list[list[str]]) -> list[str]:
    """Without columns that are empty."""
    titles = [first, *_NAMES.values()]
    kept = [n for n in range(len(titles)) if any(row[n] for row in rows)]
    lines = [[titles[n] for n in kept], ["---"] * len(kept)]
    lines += [[row[n] for n in kept] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _means(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, of in report["summary"]["means of causal, 64 and 128"].items():
        if name in _NAMES and "flash" not in name and of["fwd"] is not None:
            times = f"{of['fwd']:.2f} · {of['fb']:.2f} times as fast as {_NAMES[name]}"
            lines.append(times)
    return lines


def markdown(report: dict[str, Any]) -> str:
    """Of a report of `benchmarks/gpu_check.py`."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["timings"]:
        rows.setdefault(row["case"], {})[row["mechanism"]] = row
    plain, others = [], []
    for case, found in rows.items():
        shape, kind = (report["cases"][case][x] for x in ("shape", "kind"))
        if kind in _MASKS:
            plain.append([f"{shape} {_MASKS[kind]}", *_cells(found, "tflops")])
        if kind not in _MASKS or "flex" in found:
            label = "causal" if kind == "causal" else case
            others.append([f"{label} {shape}", *_cells(found, "ms")])
    versions = ", ".join(f"{name} {x}" for name, x in report["versions"].items())
    lines = [f"On one {report['device']}, in {report['dtype']}; {versions}."]
    title = "(batch, length, heads, key heads, head_dim, value_dim)"
    lines += ["", "TFLOP/s, forward · forward and backward:", ""]
    lines += _table(f"{title}, mask", plain)
    lines += ["", "What is more than a causal mask, in ms, likewise:", ""]
    lines += _table(title, others)
    means = ", ".join(_means(report))
    if means:
        over = "geometric means over causal masks and heads of 64 and 128"
        lines += ["", f"`Flash` is {means}: {over}."]
    failed = report["not timed"]
    if failed:
        lines += ["", "Not timed:", ""]
        lines += [
            f"- {_NAMES.get(x['mechanism'], x['mechanism'])}, {x['case']}: {x['error']}"
            for x in failed
        ]
    return "\n".join(lines)


def markdown_of_results() -> str:
    return markdown(json.loads((_RESULTS / "gpu.json").read_text()))


def markdown_of_decoding() -> str:
    """Of what `benchmarks/decode.py` wrote: what `Auto` took, for each cache and shape."""
    report = json.loads((_RESULTS / "decode.json").read_text())
    rows = [row for row in report["rows"] if row["mechanism"] == "auto"]
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    found: dict[str, dict[tuple[int, int], str]] = {}
    for row in rows:
        name = f"{row['cache']}, {row['variant']}"
        text = f"{row['of_readable']:.0%}{_DOT}{row['tokens_s']:,.0f}"
        found.setdefault(name, {})[row["batch"], row["length"]] = text
    heads, kv_heads, dim = report["heads"]
    speed = report["readable_gb_s"] / 1e3
    lines = [
        f"On one {report['device']}, in {report['dtype']}, {heads} heads over {kv_heads} "
        f"of {dim} channels, pages of {report['page_size']} tokens: the share of "
        f"{speed:.2f} TB/s, which is what a sum over a large array reads there, and tokens "
        "per second.",
        "",
        f"| cache, score | {' | '.join(f'batch {b}, {n:,}' for b, n in shapes)} |",
        "| --- " * (1 + len(shapes)) + "|",
    ]
    lines += [
        f"| {name} | {' | '.join(cells.get(shape, '') for shape in shapes)} |"
        for name, cells in found.items()
    ]
    return "\n".join(lines)


def markdown_of_gpus() -> str:
    """Of what `benchmarks/context_parallel.py` wrote, in several runs."""
    paths = sorted(_RESULTS.glob("context_parallel*.json"))
    reports = [json.loads(path.read_text()) for path in paths]
    first = reports[0]
    shape = first["shape"]
    flags = {report["flags"]: report["XLA_FLAGS"] for report in reports}
    counts = " and ".join(dict.fromkeys(str(report["devices"]) for report in reports))
    lines = [
        f"{counts} × {first['device']}, batch {shape['batch']}, "
        f"{shape['heads']} heads of {shape['dim']}, {shape['dtype']}; XLA's flags are "
        + "; ".join(f"{name}: `{text}`" for name, text in flags.items())
        + ".",
        "",
        "| length, mask | flags | pass | strategy | GPUs | ms | TFLOP/s | efficiency |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for report, row in ((report, row) for report in reports for row in report["rows"]):
        cells = [f"{row['length']:,} {row['mask']}", report["flags"], row["pass"]]
        picked = row["strategy"]
        if picked == "auto":
            picked += f", which takes {row['explain'].partition(':')[0]}"
        cells += [picked, str(row["devices"]), f"{row['ms']:.2f}"]
        cells += [f"{row['tflops_a_device']:.0f}"]
        cells += [f"{row['efficiency']:.2f}" if "efficiency" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Rows of Nsight Compute's report -> what the page calls them.
_NSIGHT = {
    "Duration": "time",
    "SM: Pipe Tensor Cycles Active": "matrix units busy",
    "L1: Data Pipe Lsu Wavefronts": "shared memory busy",
    "DRAM Throughput": "memory busy",
    "Registers Per Thread": "registers a thread",
}


def markdown_of_nsight() -> str:
    """Of what `benchmarks/profile_kernels.py` showed: the first of each of its rows."""
    text = (_RESULTS / "nsight.txt").read_text()
    titles = ["kernel", *_NSIGHT.values()]
    lines = [titles, ["---"] * len(titles)]
    for section in text.split("\n== ")[1:]:
        name, _, report = section.partition("\n")
        cells = [name]
        for row in _NSIGHT:
            found = re.search(rf"^ *{re.escape(row)} +(\S+) +([\d.]+)$", report, re.M)
            unit = "" if found is None or "register" in found[1] else f" {found[1]}"
            cells.append("" if found is None else found[2] + unit)
        if any(cells[1:]):
            lines.append(cells)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{' '.join(text.split(chr(10) * 2)[0].split())}\n\n{table}"


if __name__ == "__main__":
    print(markdown_of_results())
    print(markdown_of_gpus())
    print(markdown_of_decoding())
    print(markdown_of_nsight())
