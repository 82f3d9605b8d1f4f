"""Prints a chart of what was measured, drawn from the results that are committed.

`_hooks.py` puts them where pages have `<!-- plot NAME -->`: `python docs/_plots.py NAME`.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from _charts import bars, figure, lines


_RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
# How `gpu.json` calls them -> how a chart does.
_PEERS = {
    "flash": "Flash",
    "jax.nn cudnn": "cuDNN",
    "tokamax": "tokamax",
    "flex": "FlexAttention",
}
_SHAPE = ("batch", "length", "heads", "key heads", "head_dim")


def _read(name: str) -> dict[str, Any]:
    return json.loads((_RESULTS / name).read_text())


def cpu() -> str:
    report = _read("cpu.json")
    names = {"blockwise": "Blockwise", "vanilla": "Vanilla", "jax.nn": "jax.nn"}
    names |= {"torch": "PyTorch SDPA"}
    groups: dict[str, dict[str, float]] = {}
    for row in report["causal"]:
        group = f"{row['seq']:,} tokens, {row['pass'].replace('+', ' and ')}"
        groups.setdefault(group, {})[names[row["name"]]] = row["gflops"]
    shape, machine = report["shape"], report["machine"]
    caption = (
        f"{machine['cores']} cores of an {machine['processor']}, {shape['dtype']}, batch "
        f"{shape['batch']}, {shape['heads']} heads of {shape['dim']}. Longer is faster."
    )
    title = "On a CPU, causal"
    return figure(bars(title, groups, tuple(names.values()), "GFLOP/s"), caption)


def gpu() -> str:
    report = _read("gpu.json")
    charts = []
    for key, title in (("fwd_tflops", "Forward"), ("fb_tflops", "Forward and backward")):
        groups: dict[str, dict[str, float]] = {}
        for row in report["timings"]:
            case = report["cases"][row["case"]]
            if case["kind"] == "causal" and row["mechanism"] in _PEERS and key in row:
                group = groups.setdefault(_shape(case["shape"]), {})
                group[_PEERS[row["mechanism"]]] = row[key]
        groups = {name: of for name, of in groups.items() if len(of) > 1}
        charts.append(bars(title, groups, tuple(_PEERS.values()), "TFLOP/s"))
    caption = (
        f"One {report['device']}, {report['dtype']}, causal: ({', '.join(_SHAPE)}). "
        "Longer is faster."
    )
    return figure("\n".join(charts), caption)


def masks_and_scores() -> str:
    """What is more than a causal mask; in ms, as pairs that are skipped do not count."""
    report = _read("gpu.json")
    groups: dict[str, dict[str, float]] = {}
    for row in report["timings"]:
        case = report["cases"][row["case"]]
        if case["kind"] not in ("causal", "full") and row["mechanism"] in _PEERS:
            group = groups.setdefault(row["case"], {})
            group[_PEERS[row["mechanism"]]] = row["fb_ms"]
    groups = {name: of for name, of in groups.items() if len(of) > 1}
    shape = next(x["shape"] for x in report["cases"].values() if x["kind"] == "window")
    caption = (
        f"One {report['device']}, {report['dtype']}, {_shape(shape)}. Shorter is faster; "
        "what was not timed has no bar."
    )
    title = "Masks and scores, forward and backward"
    return figure(bars(title, groups, tuple(_PEERS.values()), "ms"), caption)


def memory() -> str:
    report = _read("memory_cpu.json")
    names = {
        "both": "blockwise attention and feed-forward",
        "attention only": "blockwise attention",
        "neither": "materialised weights",
    }
    series = {
        name: [(row["seq"], row["temporary_bytes"][key] / 2**20) for row in report["rows"]]
        for key, name in names.items()
    }
    caption = (
        f"Temporaries of the gradient of one transformer layer of size {report['size']}, "
        f"{report['num_heads']} heads, {report['dtype']}, {report['mask']}, as compiled."
    )
    return figure(lines("Memory, in MiB", series, "tokens", log=True), caption)


def decode() -> str:
    report = _read("decode.json")
    groups: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        if row["mechanism"] == "auto" and row["variant"] == "plain":
            group = f"batch {row['batch']}, {row['length']:,} tokens"
            groups.setdefault(group, {})[row["cache"]] = row["tokens_s"]
    series = list(dict.fromkeys(name for of in groups.values() for name in of))
    relative = {
        group: {name: value / of[series[0]] for name, value in of.items()}
        for group, of in groups.items()
    }
    heads, kv_heads, dim = report["heads"]
    caption = (
        f"One {report['device']}, {report['dtype']}, {heads} heads over {kv_heads} of "
        f"{dim}, one query token, through Auto. Longer is faster."
    )
    title, unit = "Tokens a second", f"times those of a {series[0]} cache"
    return figure(bars(title, relative, series, unit), caption)


def context_parallel() -> str:
    """Efficiency, over length where several were measured: a chart for each mask, number of
    GPUs and pass; else as bars."""
    names = sorted(path.name for path in _RESULTS.glob("context_parallel*.json"))
    reports = [_read(name) for name in names]
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in (row for report in reports for row in report["rows"]):
        if "efficiency" in row:
            both = row["pass"].replace("+", " and ")
            of = f"{row['mask']}, {row['devices']} GPUs, {both}"
            strategies = found.setdefault(of, {})
            strategies.setdefault(row["strategy"], {})[row["length"]] = row["efficiency"]
    series = list(dict.fromkeys(name for of in found.values() for name in of))
    charts, single = [], {}
    for title, of in sorted(found.items()):
        lengths = sorted({length for points in of.values() for length in points})
        if len(lengths) > 1:
            points = {name: list(of[name].items()) for name in series if name in of}
            title = title[0].upper() + title[1:]
            charts.append(lines(title, points, "tokens", top=1.0))
        else:
            group = f"{lengths[0]:,} tokens, {title}"
            single[group] = {name: points[lengths[0]] for name, points in of.items()}
    if single:
        charts.append(bars("Efficiency", single, series, "", top=1.0))
    shape = reports[0]["shape"]
    caption = (
        f"Efficiency: the time of the faster kernel on one GPU, over that of the strategy "
        f"times the number of GPUs. {reports[0]['device']}, batch {shape['batch']}, "
        f"{shape['heads']} heads of {shape['dim']}, {shape['dtype']}."
    )
    return figure("\n".join(charts), caption)


def _shape(text: str) -> str:
    """Without `value_dim`, where that is `head_dim`."""
    sizes = text.strip("()").split(", ")
    return f"({', '.join(sizes[:-1] if sizes[-1] == sizes[-2] else sizes)})"


PLOTS: dict[str, Callable[[], str]] = {
    "context-parallel": context_parallel,
    "cpu": cpu,
    "decode": decode,
    "gpu": gpu,
    "masks-and-scores": masks_and_scores,
    "memory": memory,
}


if __name__ == "__main__":
    print(PLOTS[sys.argv[1]]())
