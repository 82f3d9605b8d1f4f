"""Attention whose sequence is split over the GPUs of one host:
`python benchmarks/context_parallel.py --json results.json`.

Batch 1, 16 heads of 128, bfloat16, causal (and a window). Times each strategy, in turn, and
on one of the GPUs the fastest mechanism at the same length: efficiency is the time of that
over the number of GPUs times the strategy's. First checks the strategies, at a small
length, against one device. The file is written anew after each row.

`--trace` also profiles what it times over several devices.

`--flags` names a set of XLA's flags, which are recorded. `xla_gpu_enable_pipelined_p2p` and
the pipeline parallelism levels of XLA are in none of them: they decompose cycles of
permutes, of which a mesh of two axes has several, and give wrong results.
"""

import argparse
import concurrent.futures as futures
import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
from typing import Any

from gpu.over_devices import Benchmark, Case, DIM, HEADS, Prepared


_HIDING = ("--xla_gpu_enable_latency_hiding_scheduler=true",)
_LIMIT = "collective_overlap_limit=2"
FLAGS = {
    "none": (),
    # What the documentation tells users to set.
    "hiding": _HIDING,
    # The second one is there from jax 0.11 on.
    "two at once": (
        *_HIDING,
        f"--xla_gpu_experimental_parallel_{_LIMIT}",
        f"--xla_gpu_experimental_parallel_scale_up_{_LIMIT}",
    ),
    "double buffering": (*_HIDING, "--xla_gpu_enable_while_loop_double_buffering=true"),
    "copy engines": (*_HIDING, "--xla_gpu_use_memcpy_local_p2p=true"),
}
WINDOW = 4096
PASSES = {"forward": 1.0, "forward+backward": 3.5}
# Seconds of each round: so many calls that how the first one starts does not count.
_AT_LEAST = 0.3
# Longer ones are not timed on one device.
LONGEST_ALONE = 131072
# By default, and with `--quick`; the most important first.
STRATEGIES = [
    "ring zigzag",
    "ring auto",
    "ulysses",
    "auto",
    "ring zigzag unrolled",
    "ring auto unrolled",
    "ring zigzag flash",
    "ring zigzag cudnn",
    "all_gather",
    "ring contiguous",
]
QUICK = STRATEGIES[:5]


class Results:
    """What was measured, in a file that is whole at any time."""

    def __init__(self, path: pathlib.Path, head: dict[str, Any]):
        self.path, self.found = path, {**head, "errors": [], "rows": []}
        self.found |= {"timelines": [], "failures": []}

    def add(self, kind: str, row: dict[str, Any]) -> None:
        from eqx_attention._benchmark.files import write_json

        self.found[kind].append(row)
        write_json(self.path, self.found)

    def failed(self, error: Exception, **row: Any) -> None:
        text = " ".join(str(error).split())[:600]
        print(f"failed: {row}: {text[:200]}", flush=True)
        self.add("failures", {**row, "error": f"{type(error).__name__}: {text}"})


def check_all(bench: Benchmark, results: Results, strategies: list[str], shrink: int):
    n = len(bench.devices)
    for case in (Case(n * 512 // shrink), Case(n * 512 // shrink, 384 // shrink)):
        for strategy in strategies:
            at = {"strategy": strategy, "mask": case.name, "length": case.length}
            try:
                ratios = bench.errors(strategy, case)
            except (RuntimeError, TypeError, ValueError) as error:
                results.failed(error, **at)
                continue
            results.add("errors", {**at, "ratio to plain bfloat16": ratios})
            text = " ".join(f"{name} {x:.2f}" for name, x in ratios.items())
            print(f"errors of {strategy}, {case.name}: {text}", flush=True)


def time_case(
    bench: Benchmark,
    results: Results,
    case: Case,
    which: str,
    compiled: dict[str, futures.Future],
    trace: pathlib.Path | None,
) -> None:
    """Of what is compiled of each strategy, and of each mechanism for one device."""
    import jax
    from gpu.clock import in_turn, ROUNDS

    made: dict[str, Prepared] = {}
    at = {"mask": case.name, "length": case.length, "pass": which}
    for strategy, future in compiled.items():
        try:
            prepared = bench.prepared(strategy, case, which, future.result())
            jax.block_until_ready(prepared.call())
            made[strategy] = prepared
        except (RuntimeError, TypeError, ValueError) as error:
            results.failed(error, strategy=strategy, **at)
    alone = [name for name in bench.alone() if name in made]
    rounds = ROUNDS if case.length <= LONGEST_ALONE else 1
    calls = {name: prepared.call for name, prepared in made.items()}
    times = in_turn(calls, jax.block_until_ready, rounds, _AT_LEAST)
    medians = {name: statistics.median(x) for name, x in times.items()}
    best = min((medians[name], name) for name in alone) if alone and medians else None
    flops = 4 * case.pairs * HEADS * DIM * PASSES[which]
    for name, median in medians.items():
        count = 1 if name in alone else len(bench.devices)
        row = {"strategy": name, "devices": count, **at, "ms": median * 1e3}
        row |= {"rounds_ms": [x * 1e3 for x in times[name]]}
        row |= {"tflops_a_device": flops / count / median / 1e12, **made[name].note}
        text = ""
        if count > 1:
            row |= bench.explained(name, case)
            if best is not None:
                row["efficiency"] = best[0] / (count * median)
                row["against"] = best[1]
                text = f"  {row['efficiency']:.3f} of {count} times {best[1]}"
        results.add("rows", row)
        print(
            f"{case.length:>8} {case.name:<12} {which:<17} {name:<22} "
            f"{row['ms']:>10.3f} ms {row['tflops_a_device']:>6.0f} TF/s a device{text}",
            flush=True,
        )
        if trace is not None and count > 1 and case.length <= LONGEST_ALONE:
            add_timeline(results, name, made[name], at, trace)


def add_timeline(
    results: Results, name: str, prepared: Prepared, at: dict[str, Any], trace: pathlib.Path
) -> None:
    from gpu.timeline import timeline

    folder = trace / "_".join(map(str, (name, *at.values()))).replace(" ", "_")
    found = timeline(prepared.call, folder)
    results.add("timelines", {"strategy": name, **at, **found})
    print(f"  {name}: {json.dumps(found['summary'])}", flush=True)


def cases_of(lengths: list[int], window_lengths: list[int]) -> list[tuple[Case, str]]:
    """The long ones last, and of these the backward pass first."""
    short = [Case(x) for x in lengths if x <= LONGEST_ALONE]
    short += [Case(x, WINDOW) for x in window_lengths]
    out = [(case, which) for case in short for which in PASSES]
    long = [Case(x) for x in lengths if x > LONGEST_ALONE]
    return out + [(case, which) for case in long for which in reversed(PASSES)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Attention over the GPUs of one host.")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--devices", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--count", type=int, help="how many devices; default: all (cpu: 4)")
    lengths = [32768, 131072, 1048576]
    parser.add_argument("--lengths", type=int, nargs="*", default=lengths)
    parser.add_argument("--window-lengths", type=int, nargs="*", default=[131072])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES)
    parser.add_argument(
        "--window-strategies", nargs="+", choices=STRATEGIES, help="default: the same"
    )
    parser.add_argument(
        "--long-strategies",
        nargs="+",
        choices=STRATEGIES,
        help=f"beyond {LONGEST_ALONE} tokens, forward and backward; default: the same, and "
        "forward too",
    )
    parser.add_argument("--flags", choices=list(FLAGS), default="hiding")
    parser.add_argument("--quick", action="store_true", help="fewer strategies")
    parser.add_argument("--no-check", action="store_true", help="only times")
    more = f"also profiles GPUs, there, up to {LONGEST_ALONE} tokens"
    parser.add_argument("--trace", type=pathlib.Path, help=more)
    args = parser.parse_args()
    if args.trace is not None and args.devices == "cpu":
        parser.error("--trace: expected GPUs")
    return args


def main() -> None:
    args = arguments()
    flags = [os.environ.get("XLA_FLAGS", "")]
    if args.devices == "gpu":
        flags += FLAGS[args.flags]
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags += [f"--xla_force_host_platform_device_count={args.count or 4}"]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    import jax

    devices = jax.devices(args.devices)[: args.count]
    strategies = args.strategies or (QUICK if args.quick else STRATEGIES)
    if args.devices == "cpu":
        strategies = [s for s in strategies if not s.endswith(("flash", "cudnn"))]
    head = {
        "date": datetime.date.today().isoformat(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "shape": {"batch": 1, "heads": HEADS, "dim": DIM, "dtype": "bfloat16"},
        "flags": args.flags,
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
        "versions": {x: importlib.metadata.version(x) for x in ("jax", "jaxlib")},
    }
    bench, results = Benchmark(devices), Results(args.json, head)
    if not args.no_check:
        more = (args.window_strategies or []) + (args.long_strategies or [])
        every = list(dict.fromkeys([*strategies, *more]))
        check_all(bench, results, every, 8 if args.devices == "cpu" else 1)
    jobs = []
    for case, which in cases_of(args.lengths, args.window_lengths):
        names = strategies
        if case.window is not None:
            names = args.window_strategies or strategies
        if case.length <= LONGEST_ALONE:
            names = [*bench.alone(), *names]
        elif args.long_strategies:
            names = args.long_strategies if "backward" in which else []
        jobs += [(case, which, name) for name in names]
    with futures.ThreadPoolExecutor() as pool:
        # All at once: that takes longer than to time them.
        of: dict[Any, dict[str, futures.Future]] = {}
        for case, which, name in jobs:
            future = pool.submit(bench.compiled, name, case, which)
            of.setdefault((case, which), {})[name] = future
    # Not beside what is timed.
    for (case, which), compiled in of.items():
        time_case(bench, results, case, which, compiled, args.trace)
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
