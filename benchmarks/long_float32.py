"""Float32 through `Auto` where the weights of all pairs would not fit: no kernel for GPUs
is in float32, so that this is what everyone gets there.

    python benchmarks/long_float32.py --out long_float32.json

Prints what was chosen, the temporaries of the compiled program at half the length and at
the whole (linear is twice), how long a call takes, and the largest difference to `Vanilla`:
of a few queries, or of all where the gradient is taken. All of it at the highest precision.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import eqx_attention as eqa
import jax
import jax.numpy as jnp
import jax.random as jr
from eqx_attention._benchmark.files import write_json


class Case(NamedTuple):
    """`(batch, length, heads, head_dim)`, the options at a length, and what is taken."""

    shape: tuple[int, int, int, int]
    options: Callable[[int], dict[str, Any]]
    gradient: bool = False


def _random_keys(length: int) -> dict[str, Any]:
    return {"mask": eqa.Keys(jr.bernoulli(jr.key(1), 0.5, (length,)))}


def _causal(length: int) -> dict[str, Any]:
    return {"mask": eqa.Causal()}


def _causal_bias(length: int) -> dict[str, Any]:
    index = jnp.arange(length)
    bias = jr.normal(jr.key(2), (length, length))
    return {"score": eqa.Bias(jnp.where(index[:, None] >= index, bias, -jnp.inf))}


CASES = {
    "random mask of keys": Case((1, 131072, 2, 512), _random_keys),
    "causal": Case((1, 131072, 1, 512), _causal),
    "additive causal bias": Case((1, 8192, 32, 256), _causal_bias, gradient=True),
}
LIMIT = 2e-4
_FEW = 64  # queries that are compared
_HEADS = 8  # that are compared at a time


def _operands(case: Case, length: int) -> list[jax.Array]:
    """`query, key_, value`, and `dout` for the gradient."""
    batch, _, heads, dim = case.shape
    keys = jr.split(jr.key(0), 4 if case.gradient else 3)
    return [jr.normal(key, (batch, length, heads, dim)) for key in keys]


def _calls(case: Case, mechanism, options) -> dict[str, Callable]:
    """Of operands and of the arrays in `options`, forward first."""
    _, static = eqx.partition(options, eqx.is_array)

    def forward(arrays, q, k, v, dout=None, **more):
        more |= eqx.combine(arrays, static)
        return eqa.attend(q, k, v, mechanism=mechanism, precision="highest", **more)

    def both(arrays, q, k, v, dout):
        out, pull = jax.vjp(lambda q, k, v: forward(arrays, q, k, v), q, k, v)
        return out, *pull(dout)

    made = {"forward": forward}
    return made | {"forward and backward": both} if case.gradient else made


def _compiled(case: Case, mechanism, which: str, length: int):
    options = jax.eval_shape(lambda: _arrays(case, length))
    operands = jax.eval_shape(lambda: _operands(case, length))
    call = _calls(case, mechanism, case.options(length))[which]
    compiled = jax.jit(call).lower(options, *operands).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not tell"
    return compiled, memory.temp_size_in_bytes


def _arrays(case: Case, length: int):
    return eqx.filter(case.options(length), eqx.is_array)


def _seconds(call, args) -> tuple[Any, float]:
    """The result, and the median of three calls: of one alone if it takes long."""
    start = time.perf_counter()
    out = jax.block_until_ready(call(*args))
    took = time.perf_counter() - start
    if took > 2:
        return out, took
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        times.append(time.perf_counter() - start)
    return out, statistics.median(times)


def _largest(got, want) -> float:
    """The largest difference; of numbers that are small, relative to the largest."""
    return float(jnp.abs(got - want).max() / jnp.minimum(1, jnp.abs(want).max()))


def _difference(case: Case, got, args) -> float:
    """To `Vanilla`: of a few queries of a forward pass, of everything of a gradient."""
    arrays, q, k, v, *dout = args
    options = eqx.combine(arrays, case.options(q.shape[1]))
    calls = _calls(case, "vanilla", options)
    if not case.gradient:
        few = jnp.sort(jr.choice(jr.key(3), q.shape[1], (min(_FEW, q.shape[1]),), False))
        call = jax.jit(lambda *xs: calls["forward"](*xs, q_positions=few))
        return _largest(got[:, few], call(arrays, q[:, few], k, v))
    call, largest = jax.jit(calls["forward and backward"]), 0.0
    for n in range(0, q.shape[2], _HEADS):
        some = slice(n, n + _HEADS)
        want = call(arrays, *(x[:, :, some] for x in (q, k, v, *dout)))
        for a, b in zip(got, want, strict=True):
            largest = max(largest, _largest(a[:, :, some], b))
    return largest


def rows(name: str, mechanism, length: int):
    case = CASES[name]
    batch, _, heads, dim = case.shape
    args = (_arrays(case, length), *_operands(case, length))
    options = case.options(length)
    attention = eqa.Attention(mechanism=mechanism, precision="highest", **options)
    chosen, *_ = attention.explain(*args[1:4]).split("\nmechanisms:")
    print(f"{name}: {(batch, length, heads, dim)}\n  {chosen}", flush=True)
    for which in _calls(case, mechanism, options):
        start = time.perf_counter()
        _, half = _compiled(case, mechanism, which, length // 2)
        call, whole = _compiled(case, mechanism, which, length)
        took = time.perf_counter() - start
        print(f"  {which}: two compiled in {took:.1f} s", flush=True)
        got, seconds = _seconds(call, args)
        row = {"case": name, "shape": (batch, length, heads, dim), "pass": which}
        row |= {"explain": chosen, "seconds": seconds}
        row |= {"temporary_bytes": whole, "temporary_bytes_of_half_the_length": half}
        row["bytes_of_all_weights"] = 4 * batch * heads * length**2
        if which != "forward" or not case.gradient:
            row["largest_difference"] = _difference(case, got, args)
        yield row
        difference = row.get("largest_difference")
        text = "" if difference is None else f", difference to vanilla {difference:.1e}"
        weights = row["bytes_of_all_weights"] / 2**20
        print(
            f"  {which}: {seconds:.3f} s, temporaries {half / 2**20:,.0f} MiB at half the "
            f"length, {whole / 2**20:,.0f} MiB (all weights: {weights:,.0f} MiB){text}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Long sequences in float32.")
    parser.add_argument("--out", type=pathlib.Path, default="long_float32.json")
    parser.add_argument("--only", default="", help="a part of the names of cases")
    parser.add_argument("--block", type=int, help="time `Blockwise` of such tiles, too")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divides lengths, for a trial of the script"
    )
    args = parser.parse_args()
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": "float32",
        "precision": "highest",
        "rows": [],
    }
    mechanisms: list[Any] = ["auto"]
    if args.block is not None:
        mechanisms.append(eqa.Blockwise(args.block, args.block))
    bad = []
    for name in (name for name in CASES if args.only in name):
        for mechanism in mechanisms:
            for row in rows(name, mechanism, CASES[name].shape[1] // args.shrink):
                report["rows"].append(row)
                write_json(args.out, report)
                if row.get("largest_difference", 0) > LIMIT:
                    bad.append(name)
    print(f"more than {LIMIT:.0e} from vanilla: {', '.join(bad) or 'none'}")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
