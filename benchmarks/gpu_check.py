"""Correctness, and then speed, of the mechanisms for GPUs, beside their peers.

    python benchmarks/gpu_check.py --out gpu.json

What is checked and what is timed is in `gpu/cases.py` and, of decoding, `gpu/decoding.py`.
Each case of correctness runs in a process of its own, several at a time, as most of it is
compiling: `gpu/correctness.py`. Then our kernels, cuDNN (through `jax.nn`) and, where they
can be imported, PyTorch's FlexAttention and tokamax are timed in turn, in rounds:
`gpu/timings.py`. The JSON is written anew after each row.
"""

import argparse
import functools as ft
import os
from typing import Any

import jax
from eqx_attention._benchmark.files import write_json
from eqx_attention._benchmark.versions import versions
from gpu.cases import TIMED
from gpu.correctness import correctness
from gpu.peers import importable, PEERS
from gpu.summary import lines, summary
from gpu.timings import Timings


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks and times GPUs.")
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--only", default="", help="a part of the names of cases")
    parser.add_argument("--skip", default="", help="'correctness' or 'timings'")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument(
        "--peers", help=f"of {','.join(PEERS)}; by default those that can be imported"
    )
    parser.add_argument(
        "--shrink", type=int, default=1, help="divides lengths, for a trial of the script"
    )
    args = parser.parse_args()
    unknown = set(filter(None, (args.peers or "").split(","))) - set(PEERS)
    if unknown:
        parser.error(f"--peers: no such peer as {', '.join(sorted(unknown))}")
    # Several processes share one GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "versions": versions([*(module for _, module in PEERS.values()), "triton"]),
        "dtype": "bfloat16",
        "cases": {
            case: {"shape": str(timed.shape), "kind": timed.kind}
            for case, timed in TIMED.items()
        },
        "correctness": [],
        "timings": [],
        "not timed": [],
    }

    write = ft.partial(write_json, args.out, report)
    if args.skip != "correctness":
        report["correctness"] = correctness(args.workers, args.only)
        write()
    if args.skip != "timings":
        peers = importable(args.peers)
        timings = Timings(args.only, peers, args.workers, args.shrink)
        report["not timed"] = timings.failures
        for row in timings.rows(not args.no_profile):
            report["timings"].append(row)
            report["summary"] = summary(report["timings"])
            write()
        write()
        if report["timings"]:
            print("\n".join(lines(report["summary"])))
    bad = [row["case"] for row in report["correctness"] if not row["good"]]
    print(f"{len(report['correctness'])} checked, bad: {bad or 'none'}")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
