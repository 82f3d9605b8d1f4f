"""How fast caches are read: `python benchmarks/decode.py --out decode.json`.

One query token attends to a full cache, of each kind, with each mechanism that can. What is
counted are the bytes of the cache (keys, values, and scales) a second, against those that
the device reads when it does nothing else: a sum over a large array, in the same run. Each
result is first compared with float32. Times are medians, taken in turn; a line of the JSON
is written after each. `--step` adds whole steps of a model, and how much of them is spent
in kernels that attend.

On a CPU, or with `--quick`, shapes are small.
"""

import argparse
import dataclasses
import pathlib
import re
import statistics
from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
from eqx_attention._benchmark.files import write_json
from gpu.clock import in_turn, seconds
from gpu.step import step


HEADS, KV_HEADS, DIM, PAGE, ROUNDS = 32, 8, 128, 64, 5
SHAPES = ((16, 32768), (1, 131072), (64, 4096))
SMALL = ((2, 2048), (1, 4096))
STEPS, SMALL_STEPS = ((16, 32768), (1, 32768)), ((2, 512),)
KINDS = ("static", "rolling", "paged", "int8", "fp8", "int8 paged")
MECHANISMS = ("auto", "cudnn", "flash", "decode", "blockwise", "vanilla")
# The largest difference, relative to the largest number of the result.
TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True)
class Variant:
    score: Any
    sinks: bool


VARIANTS = {
    "plain": Variant((), False),
    "soft-cap": Variant(eqa.SoftCap(20.0), False),
    "sinks": Variant((), True),
}


def full_cache(kind: str, batch: int, length: int, dtype: Any) -> eqa.AbstractCache:
    """A cache without a free slot; pages are in no order."""
    first, second, third = jr.split(jr.key(0), 3)
    *stored, slots = kind.split() if kind not in ("int8", "fp8") else (kind, "static")
    lengths = jnp.full(batch, length, jnp.int32)
    if slots == "paged":
        blocks = length // PAGE
        pages = batch * blocks
        shape = (pages, PAGE, KV_HEADS, DIM)
        table = jr.permutation(third, pages).reshape(batch, blocks).astype(jnp.int32)
        references = jnp.ones(pages, jnp.int32)
        k, v = (jr.normal(key, shape, dtype) for key in (first, second))
        cache = eqa.PagedCache(k, v, table, lengths, references)
    else:
        shape = (batch, length, KV_HEADS, DIM)
        k, v = (jr.normal(key, shape, dtype) for key in (first, second))
        if slots == "static":
            cache = eqa.StaticCache(k, v, lengths)
        else:  # It has come round one and a half times.
            cache = eqa.RollingCache(k, v, lengths + length // 2, 0, 1)
    if stored:
        eight = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[stored[0]]
        cache = eqa.QuantizedCache(cache, eight)
    return cache


def cache_bytes(cache: eqa.AbstractCache) -> int:
    return sum(x.nbytes for x in jax.tree.leaves((cache.key_, cache.value)))


def reference(query, cache, variant: Variant, sinks):
    """In float32, one sequence at a time, by nothing of the library but the blocks."""
    keys, values, *_ = cache.keys_values()

    def block(x, row):
        if eqx.is_array(x):
            return x[row].astype(jnp.float32)
        return x.block((row, 0, 0), (1, *x.shape[1:3]))[0].astype(jnp.float32)

    def one(row):
        k, v = block(keys, row), block(values, row)
        q = query[row, 0].astype(jnp.float32).reshape(KV_HEADS, -1, DIM)
        logits = jnp.einsum("hgd,nhd->hgn", q, k, precision="highest") * DIM**-0.5
        if variant.score:
            logits = 20 * jnp.tanh(logits / 20)
        if variant.sinks:
            more = sinks.reshape(KV_HEADS, -1, 1)
            logits = jnp.concatenate([logits, more], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1)[..., : k.shape[0]]
        out = jnp.einsum("hgn,nhd->hgd", weights, v, precision="highest")
        return out.reshape(1, HEADS, DIM)

    return jax.lax.map(one, jnp.arange(query.shape[0]))


def readable(dtype: Any, num_bytes: int) -> float:
    """Bytes a second of a sum over a large array."""
    x = jnp.ones(num_bytes // jnp.dtype(dtype).itemsize, dtype)
    total = jax.jit(lambda x: x.sum(dtype=jnp.float32))
    rounds = [seconds(lambda: total(x), jax.block_until_ready) for _ in range(ROUNDS)]
    return x.nbytes / min(rounds)


def made(
    kind: str,
    variant: Variant,
    batch: int,
    length: int,
    dtype: Any,
    mechanisms: list[str],
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any], int]:
    """What is timed, by mechanism; errors by mechanism; the bytes of the cache."""
    cache = full_cache(kind, batch, length, dtype)
    query = jr.normal(jr.key(1), (batch, 1, HEADS, DIM), dtype)
    sinks = jr.normal(jr.key(2), (HEADS,)) if variant.sinks else None
    expected = jax.jit(lambda q, c: reference(q, c, variant, sinks))(query, cache)
    top = float(jnp.abs(expected).max())
    calls, notes = {}, {}
    for name in mechanisms:

        def attend(query, cache, name=name):
            options = dict(score=variant.score, sinks=sinks, mechanism=name)
            return cache.attend(query, mask=eqa.Causal(), **options)

        call = jax.jit(attend)
        try:
            out = call(query, cache)
        except eqa.UnsupportedError:
            continue
        error = float(jnp.abs(out.astype(jnp.float32) - expected).max()) / top
        notes[name] = error
        if error <= TOLERANCE:
            calls[name] = lambda call=call: call(query, cache)
    return calls, notes, cache_bytes(cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("decode.json"))
    parser.add_argument("--quick", action="store_true", help="small shapes")
    more = "a regular expression of cache and variant, such as '^(static|paged) plain$'"
    parser.add_argument("--only", default="", help=more)
    parser.add_argument("--mechanisms", nargs="+", choices=MECHANISMS, default=MECHANISMS)
    more = "steps of a model too (alone, with --only none)"
    parser.add_argument("--step", action="store_true", help=more)
    args = parser.parse_args()
    device = jax.devices()[0]
    small = args.quick or device.platform == "cpu"
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    limit = readable(dtype, 2**28 if small else 2**32)
    report: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "dtype": jnp.dtype(dtype).name,
        "heads": [HEADS, KV_HEADS, DIM],
        "page_size": PAGE,
        "readable_gb_s": limit / 1e9,
        "rows": [],
    }
    print(f"{device.device_kind}: reads {limit / 1e9:.0f} GB/s", flush=True)
    if args.step:
        report["steps"] = []
        heads = (4, 2, 16) if small else (HEADS, KV_HEADS, DIM)
        for batch, length in SMALL_STEPS if small else STEPS:
            row = step(batch, length, heads, dtype)
            report["steps"].append(row)
            write_json(args.out, report)
            text = f"step of ({batch}, {length}): {row['step_us']:.0f} us, of which"
            shares = f"{row['kernels_of_step']:.1%}, those that attend {row['of_step']:.1%}"
            print(f"{text} kernels {shares}", flush=True)
    for batch, length in SMALL if small else SHAPES:
        for title, variant in VARIANTS.items():
            for kind in KINDS:
                if not re.search(args.only, f"{kind} {title}"):
                    continue
                case = (kind, variant, batch, length, dtype, args.mechanisms)
                calls, notes, size = made(*case)
                rounds = in_turn(calls, jax.block_until_ready, ROUNDS)
                for name, error in notes.items():
                    row = {"batch": batch, "length": length, "cache": kind}
                    row |= {"variant": title, "mechanism": name, "error": error}
                    if name in rounds:
                        median = statistics.median(rounds[name])
                        row |= {"us": median * 1e6, "gb_s": size / median / 1e9}
                        row |= {"of_readable": size / median / limit}
                        row |= {"tokens_s": batch / median}
                        row |= {"rounds_us": [x * 1e6 for x in rounds[name]]}
                    report["rows"].append(row)
                    write_json(args.out, report)
                    print(_line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    text = f"({row['batch']}, {row['length']}) {row['cache']:11s} {row['variant']:9s}"
    text += f"{row['mechanism']:10s} error {row['error']:.1e}"
    if "us" not in row:
        return f"{text}  WRONG: not timed"
    return f"{text} {row['us']:9.0f} us {row['gb_s']:8.1f} GB/s {row['of_readable']:6.1%}"


if __name__ == "__main__":
    main()
