"""Runs our kernels a known number of times, for Nsight Compute to look at one of them.

    ncu --clock-control none -k 'regex:.*eqx_attention_backward.*' \\
        --launch-skip 1 --launch-count 1 -f -o kernels \\
        --section LaunchStats --section Occupancy --section SpeedOfLight \\
        --section ComputeWorkloadAnalysis --section SchedulerStats \\
        --section WarpStateStats --section InstructionStats \\
        --section MemoryWorkloadAnalysis --section MemoryWorkloadAnalysis_Tables \\
        --section SourceCounters \\
        python benchmarks/profile_kernels.py --case causal --pass backward
    ncu -i kernels.ncu-rep --page details --print-details all > kernels.txt
    ncu -i kernels.ncu-rep --page source --csv > kernels_sass.csv

Each case is run once to warm up, and then all are once more: with n cases, what is to be
skipped is n, and what is to be counted is n. That is registers and spills (LaunchStats,
InstructionStats), occupancy, what warps wait for (WarpStateStats), how busy the matrix
units are (ComputeWorkloadAnalysis) and shared memory with its conflicts
(MemoryWorkloadAnalysis); and, instruction by instruction, where warps wait.
"""

import argparse
import functools as ft
import os
from collections.abc import Callable
from typing import Any

import eqx_attention as eqa
import jax
import jax.numpy as jnp
from gpu.cases import operands, options, TIMED


# Short names of some of `TIMED`, all of whose names will do, too.
CASES = {
    "causal": "(2, 8192, 16, 16, 128) causal=True",
    "full": "(2, 8192, 16, 16, 128) causal=False",
    "causal 64": "(4, 4096, 32, 32, 64) causal=True",
    "full 64": "(4, 4096, 32, 32, 64) causal=False",
    "causal 256": "(2, 4096, 8, 8, 256) causal=True",
    "wide keys": "head_dim 192, value_dim 128",
    "window": "window 1024",
    "documents": "8 documents",
}
PASSES = ("forward", "backward")


def prepared(case: str, which: str, shrink: int, mechanism: str) -> Callable[[], Any]:
    """A call that launches the kernel once, and waits. What the backward needs of the
    forward is computed here."""
    timed = TIMED[CASES.get(case, case)]
    _, length, _, heads, *_ = timed.sizes(shrink)
    attend = ft.partial(
        eqa.attend, mechanism=mechanism, **options(timed.kind, length, heads)
    )
    q, k, v, dout = operands(timed.sizes(shrink), jnp.bfloat16, 0)
    if which == "forward":
        call, args = jax.jit(attend), (q, k, v)
    else:
        _, pull = jax.jit(ft.partial(jax.vjp, attend))(q, k, v)
        call, args = jax.jit(lambda pull, dout: pull(dout)), (pull, dout)
    return lambda: jax.block_until_ready(call(*args))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Runs kernels, for a profiler to look at: see the file."
    )
    names = [*CASES, *TIMED]
    parser.add_argument("--case", nargs="+", default=["causal"], choices=names)
    parser.add_argument("--pass", dest="which", default="backward", choices=PASSES)
    parser.add_argument("--mechanism", default="flash")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divides lengths, for a trial of the script"
    )
    args = parser.parse_args()
    # One graph of several kernels would be one thing to the profiler; and choosing the
    # fastest of many other kernels takes long under it.
    more = "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {more}"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    calls = [prepared(case, args.which, args.shrink, args.mechanism) for case in args.case]
    for time in ("warm-up", "profiled"):
        for case, call in zip(args.case, calls, strict=True):
            call()
            print(f"{time}: {args.which} of {case}", flush=True)


if __name__ == "__main__":
    main()
