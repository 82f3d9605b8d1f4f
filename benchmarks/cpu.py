"""Attention on a CPU, side by side: `python benchmarks/cpu.py`.

Times `blockwise`, `vanilla`, `jax.nn.dot_product_attention` and, where it is importable,
PyTorch's `scaled_dot_product_attention`, in turn and in one process, so that whatever else
the machine does falls on all of them alike. Prints a table and writes JSON.

Float32, batch 1, 8 heads of 64. GFLOP/s count `4 * seq^2 * heads * dim`, halved if causal,
times 3.5 for forward and backward.
"""

import argparse
import collections
import datetime
import functools
import importlib.util
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np
from eqx_attention._benchmark import clock
from eqx_attention._benchmark.files import write_json
from eqx_attention._benchmark.versions import versions
from eqx_attention._device import processor


HEADS, DIM = 8, 64
RESULTS = pathlib.Path(__file__).parent / "results" / "cpu.json"
PASSES = {"forward": 1.0, "forward+backward": 3.5}


def numpy_inputs(seq: int, heads: int = HEADS, dim: int = DIM) -> list[np.ndarray]:
    """`query, key_, value, dout`."""
    rng = np.random.default_rng(0)
    shape = (1, seq, heads, dim)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]


def jax_runner(attention: Callable, seq: int, both: bool) -> Callable[[], None]:
    arrays = [jnp.asarray(x) for x in numpy_inputs(seq)]
    if both:

        def fn(q, k, v, dout):
            return jax.vjp(attention, q, k, v)[1](dout)

        compiled = jax.jit(fn)
    else:
        compiled, arrays = jax.jit(attention), arrays[:3]
    return lambda: jax.block_until_ready(compiled(*arrays))


def torch_runner(seq: int, both: bool) -> Callable[[], None]:
    import torch  # pyright: ignore[reportMissingImports]

    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v, dout = (
        torch.from_numpy(x).transpose(1, 2).contiguous() for x in numpy_inputs(seq)
    )
    for x in (q, k, v):
        x.requires_grad_(both)

    def run():
        out = attention(q, k, v, is_causal=True)
        if both:
            torch.autograd.grad(out, (q, k, v), dout)

    return run


def ours(mechanism: str, mask: eqa.AbstractMask) -> Callable:
    return lambda q, k, v: eqa.attend(q, k, v, mask=mask, mechanism=mechanism)


def runners(seq: int, both: bool) -> dict[str, Callable[[], Callable[[], None]]]:
    """Each competitor at causal attention, made when it is needed."""
    causal = eqa.Causal()
    jax_nn = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    out = {
        "blockwise": lambda: jax_runner(ours("blockwise", causal), seq, both),
        "vanilla": lambda: jax_runner(ours("vanilla", causal), seq, both),
        "jax.nn": lambda: jax_runner(jax_nn, seq, both),
    }
    if importlib.util.find_spec("torch") is not None:
        out["torch"] = lambda: torch_runner(seq, both)
    return out


def in_turn(made: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, one after another, round after round."""
    for run in made.values():
        run()
    times = clock.in_turn(made, lambda out: out, repeats, at_least=0)
    return {name: [1e3 * x for x in took] for name, took in times.items()}


def time_causal(seq: int, repeats: int) -> list[dict]:
    rows = []
    for which, factor in PASSES.items():
        made = {name: make() for name, make in runners(seq, factor > 1).items()}
        flops = 2 * seq**2 * HEADS * DIM * factor
        for name, times in in_turn(made, repeats).items():
            median = statistics.median(times)
            row = {"seq": seq, "mask": "causal", "pass": which, "name": name}
            row |= {"ms": median, "gflops": flops / median / 1e6, "all_ms": times}
            rows.append(row)
            print(
                f"{seq:>6}  {which:<17} {name:<10} {median:>9.1f} ms "
                f"{row['gflops']:>7.1f} GFLOP/s",
                flush=True,
            )
    return rows


_COUNT = collections.Counter()


def _counting(logit, *_):
    jax.debug.callback(lambda: _COUNT.update(tiles=1))
    return logit


def executed_tiles(seq: int) -> dict[str, int]:
    """How many tiles of 512 by 512 tokens and one head the forward pass computes, counted
    as they run, of `(seq / 512) ** 2`."""
    mechanism, count = eqa.Blockwise(512, 512), {}
    index = jnp.arange(seq, dtype=jnp.int32)
    x = jnp.zeros((seq, 1, 8))

    def attend(mask, positions=None):
        return eqa.attend(
            x,
            x,
            x,
            mask=mask,
            score=eqa.ScoreFn(_counting),
            mechanism=mechanism,
            q_positions="start" if positions is None else positions,
            kv_positions=positions,
        )

    def examples(ids):
        return jax.vmap(lambda ids: attend(eqa.Causal() & eqa.Segments(ids)))(ids)

    ids = jnp.stack([index * n // seq for n in (2, 8, 32)])
    cases: dict[str, Callable[[], jax.Array]] = {
        name: functools.partial(attend, mask(seq)) for name, mask in MASKS.items()
    }
    cases["2, 8 and 32 segments, mapped over"] = lambda: jax.jit(examples)(ids)
    cases["window 256, traced positions"] = lambda: jax.jit(
        lambda p: attend(MASKS["window 256"](seq), p)
    )(index + 7)
    for name, run in cases.items():
        _COUNT.clear()
        jax.block_until_ready(run())
        jax.effects_barrier()
        count[name] = _COUNT["tiles"]
        print(f"{seq:>6}  {name:<34} {count[name]:>6} of {(seq // 512) ** 2} tiles")
    return count


MASKS = {
    "causal": lambda seq: eqa.Causal(),
    "window 256": lambda seq: eqa.Causal() & eqa.SlidingWindow(255),
    "8 segments": lambda seq: eqa.Causal() & eqa.Segments(jnp.arange(seq) * 8 // seq),
}


def time_masks(seq: int, repeats: int) -> list[dict]:
    """Blockwise alone: what is skipped is time saved."""
    rows = []
    for which, factor in PASSES.items():
        made = {
            name: jax_runner(ours("blockwise", mask(seq)), seq, factor > 1)
            for name, mask in MASKS.items()
        }
        times = in_turn(made, repeats)
        causal = statistics.median(times["causal"])
        for name in MASKS:
            median = statistics.median(times[name])
            row = {"seq": seq, "mask": name, "pass": which, "name": "blockwise"}
            rows.append(row | {"ms": median, "times_faster": causal / median})
            print(
                f"{seq:>6}  {which:<17} {name:<10} {median:>9.1f} ms "
                f"{causal / median:>7.1f} x causal",
                flush=True,
            )
    return rows


def time_eager(repeats: int = 20) -> dict:
    """The second and later calls of (1, 64, 4, 16), outside of `jit`."""
    q, k, v, _ = (jnp.asarray(x) for x in numpy_inputs(64, 4, 16))
    run = lambda: jax.block_until_ready(eqa.attend(q, k, v, mask=eqa.Causal()))  # noqa: E731
    times = in_turn({"eager": run}, repeats)["eager"]
    print(f"eager call of (1, 64, 4, 16): {times[0]:.2f} ms", flush=True)
    return {"second_ms": times[0], "median_ms": statistics.median(times)}


def peak_memory(seq: int) -> float:
    """Peak resident GB of a fresh process that runs forward and backward, blockwise.

    From Linux's `VmHWM`: `ru_maxrss` would count what the parent held before `exec`.
    """
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import cpu; "
        "import eqx_attention as eqa; "
        f"cpu.jax_runner(cpu.ours('blockwise', eqa.Causal()), {seq}, True)(); "
        "status = open('/proc/self/status').read(); "
        "print(status.split('VmHWM:')[1].split()[0])"
    )
    folder = str(pathlib.Path(__file__).parent)
    command = [sys.executable, "-c", code, folder]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = int(out) * 1024 / 1e9
    print(f"{seq:>6}  forward+backward  peak memory of a process: {peak:.2f} GB")
    return peak


def ratios(rows: list[dict]) -> list[dict]:
    """How much faster blockwise is than each other, at each length and pass."""
    found = {(r["seq"], r["pass"], r["name"]): r["ms"] for r in rows}
    out = []
    for (seq, which, name), ms in found.items():
        if name == "blockwise":
            continue
        ratio = ms / found[seq, which, "blockwise"]
        out.append({"seq": seq, "pass": which, "against": name, "ratio": ratio})
        print(f"{seq:>6}  {which:<17} blockwise is {ratio:5.2f} x {name}")
    return out


def machine() -> dict:
    packages = ["jax", "jaxlib", "equinox", "eqx_attention", "numpy", "torch"]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions(packages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention on a CPU, side by side.")
    parser.add_argument("--seq", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--masks-seq", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    rows = [row for seq in args.seq for row in time_causal(seq, args.repeats)]
    results = {
        "machine": machine(),
        "shape": {"batch": 1, "heads": HEADS, "dim": DIM, "dtype": "float32"},
        "causal": rows,
        "ratios": ratios(rows),
        "masks": time_masks(args.masks_seq, min(args.repeats, 3)),
        "executed_tiles": executed_tiles(args.masks_seq),
        "eager": time_eager(),
        "peak_memory_gb": {str(seq): peak_memory(seq) for seq in args.seq},
    }
    write_json(args.json, results)
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
