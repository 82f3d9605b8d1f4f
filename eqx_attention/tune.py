"""Measures which tiles `Flash` had better use on this machine's GPU, and writes them into
the table that it reads.

    python -m eqx_attention.tune
    python -m eqx_attention.tune --head-dim 128 --out tuning.json
"""

import argparse
import itertools as it
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._call import call_of
from ._device import compute_capability
from ._mask import Causal, Full
from ._mechanism.base import Request
from ._request import request_of


# (batch, length, heads, head_dim, value_dim): what is timed for each size of head.
SHAPES = (
    (4, 4096, 32, 64, 64),
    (2, 8192, 16, 128, 128),
    (1, 8192, 16, 192, 128),
    (2, 4096, 8, 256, 256),
)
_ROUNDS, _CALLS = 3, 10


def requests(shape: tuple[int, ...], masked: bool) -> tuple[Request, Array]:
    """A request on random numbers, and a cotangent of its output."""
    batch, length, heads, head_dim, value_dim = shape
    keys = jax.random.split(jax.random.key(0), 4)
    query, key_, value, dout = (
        jax.random.normal(k, (batch, length, heads, dim), jnp.bfloat16)
        for k, dim in zip(keys, (head_dim, head_dim, value_dim, value_dim), strict=True)
    )
    call = call_of(
        query,
        key_,
        value,
        mask=Causal() if masked else Full(),
        score=(),
        sinks=None,
        scale=None,
        q_positions="start",
        kv_positions=None,
        precision=None,
    )
    return request_of(call), dout


def candidates(sizes: Any) -> dict[str, list[Any]]:
    """The tiles to try, of each pass."""
    from ._kernel import backward, hopper_forward, tuning

    forward = [
        hopper_forward.Blocks(64, key, stages, warpgroups, overlap)
        for key, stages, warpgroups, overlap in it.product(
            (64, 128, 192, 256), (2, 3), (2, 3), (False, True)
        )
        if not (overlap and sizes.masked)
    ]
    query = 128 if max(sizes.head_dim, sizes.value_dim) <= 64 else 64
    back = [
        backward.Blocks(query, 64, stages, dout_stages)
        for stages, dout_stages in it.product((1, 2, 3), (1, 2, 3))
    ]
    return {
        "forward": [x for x in forward if tuning.forward_fits(sizes, x)],
        "backward": [x for x in back if tuning.backward_fits(sizes, x)],
    }


def calls(
    request: Request, dout: Array, sizes: Any
) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """`(pass, blocks, a call)` of each candidate, compiled."""
    from ._kernel import hopper_forward, tuning

    back = tuning.backward_kernels(sizes)
    default = tuning.forward_blocks(sizes)
    out, lse = jax.jit(lambda x: hopper_forward.forward(x, default))(request)
    delta = (out.astype(lse.dtype) * dout.astype(lse.dtype)).sum(-1)
    for which, tried in candidates(sizes).items():
        for blocks in tried:
            if which == "forward":
                fn = jax.jit(lambda x, blocks=blocks: hopper_forward.forward(x, blocks))
                arguments = (request,)
            else:
                fn = jax.jit(lambda *xs, blocks=blocks: back.backward(*xs, blocks))
                arguments = (request, lse, delta, dout)
            compiled = fn.lower(*arguments).compile()
            yield which, blocks, lambda fn=compiled, xs=arguments: fn(*xs)


def milliseconds(call: Callable[[], Any]) -> float:
    """The median of a few rounds."""
    jax.block_until_ready(call())
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            out = call()
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / _CALLS * 1e3)
    return statistics.median(rounds)


def measure(shape: tuple[int, ...], masked: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(pass, its row of the table)`: the fastest candidates."""
    from ._kernel import tuning

    request, dout = requests(shape, masked)
    sizes = tuning.sizes_of(request)
    times: dict[str, dict[Any, float]] = {}
    for which, blocks, call in calls(request, dout, sizes):
        took = milliseconds(call)
        times.setdefault(which, {})[blocks] = took
        print(f"{which} {shape} {'masked' if masked else ''} {blocks}: {took:.3f} ms")
    for which, found in times.items():
        best = min(found, key=lambda blocks: found[blocks])
        chosen = best._asdict()
        chosen.pop("in_order", None)
        row = {"sizes": sizes._asdict(), "shape": shape, "blocks": chosen}
        yield which, row | {"ms": round(found[best], 4)}


def write(path: pathlib.Path, table: dict[str, Any]) -> None:
    def lines(rows):
        return ",\n".join(f"  {json.dumps(row)}" for row in rows)

    parts = [f' "{k}": {json.dumps(x)}' for k, x in table.items() if isinstance(x, str)]
    parts += [f' "{k}": [\n{lines(table[k])}\n ]' for k in ("forward", "backward")]
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    os.replace(unfinished, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measures the tiles of Flash's kernels.")
    sizes = sorted({shape[3] for shape in SHAPES})
    parser.add_argument(
        "--head-dim", type=int, choices=sizes, help="only heads of this size"
    )
    parser.add_argument("--out", type=pathlib.Path, help="by default, the package's table")
    args = parser.parse_args(arguments)
    found = compute_capability() if jax.default_backend() == "gpu" else None
    if found != (9, 0):
        kind = jax.devices()[0].device_kind
        parser.error(f"expected a Hopper GPU (compute capability 9.0), found {kind}.")
    from ._kernel import tuning

    table = json.loads(tuning.TABLE.read_text())
    table |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for shape, masked in it.product(SHAPES, (True, False)):
        if args.head_dim in (None, shape[3]):
            for which, row in measure(shape, masked):
                kept = [x for x in table[which] if x["sizes"] != row["sizes"]]
                table[which] = [*kept, row]
                write(args.out or tuning.TABLE, table)


if __name__ == "__main__":
    main()
