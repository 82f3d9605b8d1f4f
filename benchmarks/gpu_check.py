"""Correctness, and then speed, of the mechanisms for GPUs.

    python benchmarks/gpu_check.py --out gpu.json

Each case runs in a process of its own, several at a time, as most of it is compiling. It is
compared with `Vanilla` in float32 at the highest precision, on fresh random data each time;
twice, so that a race shows; and on memory that held NaN before, so that what is not written
shows. Then the mechanisms are timed, one after the other in one process, and the kernels
that ran are read from a profile.
"""

import argparse
import concurrent.futures as futures
import functools as ft
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import eqx_attention as eqa
import jax
import jax.numpy as jnp
import numpy as np


FLASH, CUDNN = "flash", "cudnn"
BOTH = (FLASH, CUDNN)


def _ids(seed: int, batch: int, length: int):
    return jnp.sort(jax.random.randint(jax.random.key(seed), (batch, length), 0, 5))


def _score(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    distance = (q_pos - kv_pos).astype(logit.dtype)
    return logit + params["height"][head] * jnp.exp(-distance * distance / 100)


def _temperature(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit / q_feature


def _every_third(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return (q_pos - kv_pos) % 3 == head % 3


def _looked_up(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    return logit + params["t"][head, jnp.clip(q_pos - kv_pos, 0, 39)]


def _every_lookup(logit, q_pos, kv_pos, head, q_feature, kv_feature, params):
    """Lookups of every kind, most of them beyond the table too."""
    far, t, either = q_pos - kv_pos, params["t"], jnp.maximum(q_feature, kv_feature)
    narrow = t.astype(jnp.bfloat16)[0].at[far].get(mode="clip").astype(logit.dtype)
    filled = jnp.take(t[0], far, mode="fill", fill_value=2.0)
    outside = jnp.isnan(jnp.take(t[1], far))
    added = (
        t[head, far],
        narrow,
        filled,
        jnp.where(outside, 1.0, 0.0),
        t.T[kv_pos % 7, q_pos % 3],
        jnp.take(t[2], far, mode="wrap"),
        t.reshape(4, 5, 2)[head, far % 5, 1],
        t[0, either],
        params["whole"][far % 7].astype(logit.dtype),
        t[head][..., 3],
    )
    seen = (t[1] > 0)[q_pos % 4 + kv_pos % 4]
    return jnp.where(seen, sum(added, logit), logit * t[2][far - 5])


def _sees(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return params["t"][q_feature, kv_feature]


def _random(*shape, dtype=jnp.float32, seed=7):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _lookups(*lengths: int):
    params = {"t": _random(4, 10), "whole": jnp.arange(7, dtype=jnp.int16)}
    q_feature, kv_feature = (jnp.arange(n, dtype=jnp.int16) % 5 for n in lengths)
    return eqa.ScoreFn(_every_lookup, q_feature, kv_feature, params)


# What each mechanism is expected to support: name -> (mechanisms, shape, options). A shape
# is (batch, q_len, kv_len, q_heads, kv_heads, head_dim, value_dim).
_SHAPE = (2, 512, 512, 4, 2, 128, 128)
C = eqa.Causal
SUPPORT: dict[str, tuple[tuple[str, ...], tuple[int, ...], Any]] = {
    "full": (BOTH, _SHAPE, dict),
    "causal": (BOTH, _SHAPE, lambda: {"mask": C()}),
    "causal float16": (BOTH, _SHAPE, lambda: {"mask": C(), "dtype": "float16"}),
    "causal float32": ((), _SHAPE, lambda: {"mask": C(), "dtype": "float32"}),
    "causal lse": (BOTH, _SHAPE, lambda: {"mask": C(), "return_lse": True}),
    "causal ragged": (BOTH, (2, 1000, 777, 4, 2, 128, 128), lambda: {"mask": C()}),
    "prime": (BOTH, (1, 509, 257, 3, 3, 128, 128), lambda: {"mask": C()}),
    "one query": (BOTH, (2, 1, 300, 4, 1, 128, 128), dict),
    "one key": (BOTH, (2, 300, 1, 4, 1, 128, 128), dict),
    "causal head_dim 64": (BOTH, (2, 600, 600, 4, 2, 64, 64), lambda: {"mask": C()}),
    "causal head_dim 40": (BOTH, (2, 300, 300, 4, 2, 40, 40), lambda: {"mask": C()}),
    "causal head_dim 256": (BOTH, (2, 512, 512, 4, 2, 256, 256), lambda: {"mask": C()}),
    "head_dim 256, ragged": (BOTH, (1, 333, 505, 4, 2, 256, 256), dict),
    "causal head_dim 192, value_dim 128": (
        (FLASH,),
        (2, 512, 512, 4, 4, 192, 128),
        lambda: {"mask": C()},
    ),
    "head_dim 160, value_dim 200": (
        (FLASH,),
        (2, 300, 300, 4, 2, 160, 200),
        lambda: {"mask": C() & eqa.Segments(_ids(3, 2, 300)), "score": eqa.SoftCap(3.0)},
    ),
    "head_dim 256, dropout": (
        (FLASH,),
        (2, 300, 300, 4, 2, 256, 256),
        lambda: {"mask": C(), "dropout": 0.3, "key": jax.random.key(0)},
    ),
    "value_dim 64": ((FLASH,), (2, 512, 512, 4, 2, 128, 64), lambda: {"mask": C()}),
    "head_dim 64, value_dim 128": ((FLASH,), (2, 512, 512, 4, 2, 64, 128), dict),
    "score of NaN beyond the end": (
        (FLASH,),
        (2, 100, 300, 4, 2, 128, 128),
        lambda: {
            "score": eqa.ScoreFn(_temperature, q_features=1 + jnp.arange(100.0) / 100)
        },
    ),
    "window": (BOTH, _SHAPE, lambda: {"mask": C() & eqa.SlidingWindow(100)}),
    "window to both sides": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": eqa.SlidingWindow(50, right=20)},
    ),
    "not": ((FLASH,), (2, 77, 1003, 4, 2, 128, 128), lambda: {"mask": ~C()}),
    "chunked or prefix": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": eqa.Chunked(64) | eqa.Prefix(3)},
    ),
    "segments": ((FLASH,), _SHAPE, lambda: {"mask": C() & eqa.Segments(_ids(3, 2, 512))}),
    "padding": (BOTH, _SHAPE, lambda: {"mask": eqa.Padding(jnp.array([500, 3]))}),
    "padding of all": (BOTH, _SHAPE, lambda: {"mask": eqa.Padding(jnp.array([0, 512]))}),
    "keys": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": eqa.Keys(jax.random.bernoulli(jax.random.key(0), 0.5, (2, 512)))},
    ),
    "dense": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": jax.random.bernoulli(jax.random.key(0), 0.3, (4, 512, 512))},
    ),
    "predicate": ((FLASH,), _SHAPE, lambda: {"mask": eqa.Predicate(_every_third)}),
    "alibi": ((FLASH,), _SHAPE, lambda: {"mask": C(), "score": eqa.ALiBi.standard(4)}),
    "soft-cap": ((FLASH,), _SHAPE, lambda: {"mask": C(), "score": eqa.SoftCap(3.0)}),
    "score function": (
        (FLASH,),
        _SHAPE,
        lambda: {"score": eqa.ScoreFn(_score, params={"height": jnp.arange(4.0)})},
    ),
    "bias": ((FLASH,), _SHAPE, lambda: {"score": eqa.Bias(_random(4, 512, 512))}),
    "relative bias": (
        (FLASH,),
        _SHAPE,
        lambda: {"score": eqa.RelativeBias(_random(32, 4))},
    ),
    "relative bias, causal": (
        (FLASH,),
        (2, 1000, 777, 4, 2, 128, 128),
        lambda: {"mask": C(), "score": eqa.RelativeBias(_random(32, 4), False)},
    ),
    "relative bias, far": (
        (FLASH,),
        _SHAPE,
        lambda: {"score": eqa.RelativeBias(_random(32, 4), max_distance=10_000)},
    ),
    "lookup": (
        (FLASH,),
        _SHAPE,
        lambda: {"score": eqa.ScoreFn(_looked_up, params={"t": _random(4, 40)})},
    ),
    "lookup of every kind": (
        (FLASH,),
        (2, 1000, 777, 4, 2, 64, 64),
        lambda: {"mask": C(), "score": _lookups(1000, 777)},
    ),
    "lookup of two features": (
        (FLASH,),
        _SHAPE,
        lambda: {
            "mask": eqa.Predicate(
                _sees, _ids(3, 2, 512), _ids(4, 2, 512), {"t": _random(5, 5) > 0}
            )
        },
    ),
    "scale of each head": ((FLASH,), _SHAPE, lambda: {"scale": jnp.arange(1, 5.0) / 8}),
    "dropout": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": C(), "dropout": 0.3, "key": jax.random.key(0)},
    ),
    "sinks": (BOTH, _SHAPE, lambda: {"mask": C(), "sinks": _random(4)}),
    "end": (
        (FLASH,),
        (2, 100, 700, 4, 2, 128, 128),
        lambda: {"mask": C(), "q_positions": "end"},
    ),
    "positions": (
        (FLASH,),
        _SHAPE,
        lambda: {"mask": C(), "q_positions": jnp.arange(512)[::-1]},
    ),
    "nan behind the mask": (BOTH, _SHAPE, lambda: {"mask": C(), "nan": True}),
}


def _operands(shape, dtype, seed):
    batch, q_len, kv_len, heads, kv_heads, head_dim, value_dim = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    return (
        jax.random.normal(keys[0], (batch, q_len, heads, head_dim), dtype),
        jax.random.normal(keys[1], (batch, kv_len, kv_heads, head_dim), dtype),
        jax.random.normal(keys[2], (batch, kv_len, kv_heads, value_dim), dtype),
        jax.random.normal(keys[3], (batch, q_len, heads, value_dim), dtype),
    )


def _poison():
    """Leaves NaN in the memory that is given out next."""
    jax.block_until_ready([jnp.full((2**24,), jnp.nan) for _ in range(4)])


def _value_and_grads(mechanism, options, with_lse):
    @jax.jit
    def value(q, k, v, dout, dlse):
        def attend(q, k, v):
            return eqa.attend(q, k, v, mechanism=mechanism, return_lse=True, **options)

        (out, lse), pull = jax.vjp(attend, q, k, v)
        return out, lse, *pull((dout, dlse if with_lse else jnp.zeros_like(lse)))

    return value


def check(name: str, mechanism: str) -> dict[str, Any]:
    """One case on one mechanism: errors relative to `Vanilla` in float32."""
    _, shape, make = SUPPORT[name]
    options = make()
    dtype = jnp.dtype(options.pop("dtype", "bfloat16"))
    with_lse = options.pop("return_lse", False)
    hidden = options.pop("nan", False)
    seed = int.from_bytes(os.urandom(4), "little") >> 1
    q, k, v, dout = _operands(shape, dtype, seed)
    dlse = jax.random.normal(jax.random.key(seed), dout.shape[:-1], jnp.float32)
    if hidden:  # from the last query on, nothing is seen
        k, v = (jnp.concatenate([x, jnp.full_like(x, jnp.nan)], axis=1) for x in (k, v))
    run = _value_and_grads(mechanism, options, with_lse)
    _poison()
    got = jax.block_until_ready(run(q, k, v, dout, dlse))
    _poison()
    again = jax.block_until_ready(run(q, k, v, dout, dlse))
    wide = [x.astype(jnp.float32) for x in (q, k, v, dout)]
    with jax.default_matmul_precision("highest"):
        want = _value_and_grads("vanilla", options, with_lse)(*wide, dlse)
    errors = {}
    for part, a, b, w in zip(("out", "lse", "dq", "dk", "dv"), got, again, want):
        a, b, w = (np.asarray(x, np.float32) for x in (a, b, w))
        empty = np.isneginf(w)
        assert (np.isneginf(a) == empty).all(), part
        a, b, w = (np.where(empty, 0, x) for x in (a, b, w))
        norm = max(np.linalg.norm(w), 1e-1 * np.sqrt(w.size))  # 0 is no measure
        errors[part] = float(np.linalg.norm(a - w) / norm)
        errors[f"{part} twice"] = float(np.linalg.norm(a - b) / norm)
    limit = 8e-3 if dtype == jnp.bfloat16 else 2e-3
    exact = ("out", "lse", "dk", "dv")
    good = all(errors[x] <= limit for x in ("out", "lse", "dq", "dk", "dv"))
    good = good and all(errors[f"{x} twice"] == 0 for x in exact)
    good = good and errors["dq twice"] <= 1e-3
    return {"case": name, "mechanism": mechanism, "good": good, **errors}


def supported(name: str, mechanism: str) -> bool:
    _, shape, make = SUPPORT[name]
    options = make()
    dtype = options.pop("dtype", "bfloat16")
    options = {k: x for k, x in options.items() if k not in ("return_lse", "nan")}
    q, k, v, _ = _operands(shape, jnp.dtype(dtype), 0)
    try:
        jax.eval_shape(ft.partial(eqa.attend, mechanism=mechanism, **options), q, k, v)
    except eqa.UnsupportedError as error:
        print(f"refused  {mechanism:6s} {name}: {error}", flush=True)
        return False
    return True


def correctness(workers: int, only: str) -> list[dict[str, Any]]:
    rows, cases = [], []
    for name, (able, *_) in SUPPORT.items():
        if only not in name:
            continue
        for mechanism in BOTH:
            found = supported(name, mechanism)
            if found != (mechanism in able):
                rows.append({"case": name, "mechanism": mechanism, "good": False})
                print(f"BAD      {mechanism:6s} {name}: supported is {found}", flush=True)
            elif found:
                cases.append((name, mechanism))
    context = multiprocessing.get_context("spawn")
    # The processes inherit this. XLA would else try many kernels for each of the small
    # products of the reference, which takes minutes.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    )
    with futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {pool.submit(check, *case): case for case in cases}
        for job in futures.as_completed(jobs):
            error = job.exception()
            if error is None:
                row = job.result()
            else:
                name, mechanism = jobs[job]
                text = f"{type(error).__name__}: {str(error)[:300]}"
                row = {"case": name, "mechanism": mechanism, "good": False, "error": text}
            rows.append(row)
            parts = ("out", "lse", "dq", "dk", "dv", "dq twice")
            numbers = " ".join(f"{p} {row[p]:.1e}" for p in parts if p in row)
            verdict = "ok" if row["good"] else "BAD"
            numbers = row.get("error", numbers)
            print(
                f"{verdict:8s} {row['mechanism']:6s} {row['case']}: {numbers}", flush=True
            )
    return rows


def seconds(fn, *args) -> float:
    """The median of three rounds, each of as many calls as take 60 ms."""
    jax.block_until_ready(fn(*args))
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    count = max(3, min(200, int(0.06 / (time.perf_counter() - start))))
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count):
            out = fn(*args)
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / count)
    return statistics.median(rounds)


def kernels(fn, *args) -> list[str]:
    """The kernels that a call runs, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(fn(*args))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        total: dict[str, float] = {}
        for plane in profile.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        total[event.name] = total.get(event.name, 0) + event.duration_ns
    longest = sorted(total, key=lambda name: -total[name])[:4]
    return [f"{name[:60]} {total[name] / 1e6:.3f} ms" for name in longest]


# (batch, length, heads, key heads, head_dim), mask, score.
_LONG = (2, 8192, 16, 16, 128)
TIMED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    **{
        f"{shape} causal={causal}": (shape, {"mask": C()} if causal else {})
        for shape in (
            _LONG,
            (8, 2048, 16, 16, 128),
            (4, 4096, 32, 32, 64),
            (4, 4096, 32, 8, 128),
            (1, 32768, 16, 16, 128),
        )
        for causal in (True, False)
    },
    "soft-cap": (_LONG, {"mask": C(), "score": eqa.SoftCap(20.0)}),
    "window 1024": (_LONG, {"mask": C() & eqa.SlidingWindow(1023)}),
    "8 documents": (_LONG, {"mask": eqa.Segments}),
    "ALiBi": (_LONG, {"mask": C(), "score": eqa.ALiBi}),
    "131072 causal": ((1, 131072, 16, 16, 128), {"mask": C()}),
}


def timings(only: str, profile: bool) -> Iterator[dict[str, Any]]:
    for name, (shape, options) in TIMED.items():
        if only not in name:
            continue
        batch, length, heads, kv_heads, dim = shape
        options = dict(options)
        if options.get("score") is eqa.ALiBi:
            options["score"] = eqa.ALiBi.standard(heads)
        if options.get("mask") is eqa.Segments:
            ids = jnp.sort(jax.random.randint(jax.random.key(5), (length,), 0, 8))
            options["mask"] = C() & eqa.Segments(ids)
        masked = "mask" in options
        flops = 4 * batch * length**2 * heads * dim * (0.5 if masked else 1)
        sizes = (batch, length, length, heads, kv_heads, dim, dim)
        q, k, v, dout = _operands(sizes, jnp.bfloat16, 0)

        def cudnn(q, k, v):
            causal = isinstance(options.get("mask"), C)
            nn = jax.nn.dot_product_attention
            return nn(q, k, v, is_causal=causal, implementation="cudnn")

        names = BOTH if len(options) == 1 and options != {"mask": C()} else (FLASH,)
        candidates: dict[str, Any] = {
            m: ft.partial(eqa.attend, mechanism=m, **options) for m in names
        }
        if options in ({}, {"mask": C()}):
            candidates["jax.nn cudnn"] = cudnn
        for mechanism, attend in candidates.items():
            forward = jax.jit(attend)

            def both(q, k, v, dout, attend=attend):
                out, pull = jax.vjp(attend, q, k, v)
                return out, pull(dout)

            row: dict[str, Any] = {"case": name, "mechanism": mechanism}
            try:
                once = seconds(forward, q, k, v)
                gradient = jax.jit(both)
                twice = seconds(gradient, q, k, v, dout)
            except eqa.UnsupportedError as error:
                print(f"{name:36s} {mechanism:12s} {error}", flush=True)
                continue
            row |= {"fwd_ms": once * 1e3, "fb_ms": twice * 1e3}
            row |= {"fwd_tflops": flops / once / 1e12}
            row |= {"fb_tflops": 3.5 * flops / twice / 1e12}
            if profile:
                row["kernels"] = kernels(gradient, q, k, v, dout)
            yield row
            text = f"{name:36s} {mechanism:12s} fwd {row['fwd_ms']:8.3f} ms"
            text += f" {row['fwd_tflops']:5.0f} TF/s  f+b {row['fb_ms']:8.3f} ms"
            text += f" {row['fb_tflops']:5.0f} TF/s {row.get('kernels', '')}"
            print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks and times GPUs.")
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--only", default="", help="a part of the names of cases")
    parser.add_argument("--skip", default="", help="'correctness' or 'timings'")
    parser.add_argument("--no-profile", action="store_true")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "correctness": [],
        "timings": [],
    }

    def write():
        temporary = pathlib.Path(f"{args.out}.part")
        temporary.write_text(json.dumps(report, indent=1))
        temporary.replace(args.out)

    if args.skip != "correctness":
        report["correctness"] = correctness(args.workers, args.only)
        write()
    if args.skip != "timings":
        for row in timings(args.only, not args.no_profile):
            report["timings"].append(row)
            write()
    bad = [row["case"] for row in report["correctness"] if not row["good"]]
    print(f"{len(report['correctness'])} checked, bad: {bad or 'none'}")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
