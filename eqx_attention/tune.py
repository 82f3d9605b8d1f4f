"""Measures which tiles `Flash` had better use on this machine's GPU, and writes them into
the table that it reads.

    python -m eqx_attention.tune
    python -m eqx_attention.tune --head-dim 128 --out tuning.json
"""

import argparse
import functools as ft
import itertools as it
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._benchmark.clock import in_turn
from ._benchmark.files import write_text
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
# Rounds, and seconds of each in which a candidate is called.
_ROUNDS, _AT_LEAST = 7, 0.01


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
            (64, 128, 192), (2, 3), (2, 3), (False, True)
        )
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
) -> dict[str, dict[Any, Callable[[], Any]]]:
    """For each pass, a compiled call of each candidate."""
    from ._kernel import hopper_forward, tuning

    back = tuning.backward_kernels(sizes)
    default = tuning.forward_blocks(sizes)
    out, lse = jax.jit(lambda x: hopper_forward.forward(x, default))(request)
    delta = (out.astype(lse.dtype) * dout.astype(lse.dtype)).sum(-1)
    passes = {
        "forward": (hopper_forward.forward, (request,)),
        "backward": (back.backward, (request, lse, delta, dout)),
    }
    found: dict[str, dict[Any, Callable[[], Any]]] = {}
    # Most of the time that compiling takes is not Python's.
    with ThreadPoolExecutor() as pool:
        for which, tried in candidates(sizes).items():
            kernel, arguments = passes[which]
            used = tried
            if which == "backward":
                in_order = tuning.faster_in_order(request)
                used = [blocks._replace(in_order=in_order) for blocks in tried]
            lowered = [
                jax.jit(lambda *xs, fn=kernel, blocks=blocks: fn(*xs, blocks)).lower(
                    *arguments
                )
                for blocks in used
            ]
            compiled = pool.map(lambda x: x.compile(), lowered)
            found[which] = {
                blocks: ft.partial(fn, *arguments)
                for blocks, fn in zip(tried, compiled, strict=True)
            }
    return found


def milliseconds(calls: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """The medians of a few rounds, in each of which all are timed in turn."""
    times = in_turn(calls, jax.block_until_ready, _ROUNDS, _AT_LEAST)
    return {name: 1e3 * statistics.median(took) for name, took in times.items()}


def measure(shape: tuple[int, ...], masked: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(pass, its row of the table)`: the fastest candidates."""
    from ._kernel import tuning

    request, dout = requests(shape, masked)
    sizes = tuning.sizes_of(request)
    for which, tried in calls(request, dout, sizes).items():
        found = milliseconds(tried)
        for blocks, took in found.items():
            print(f"{which} {shape} {'masked' if masked else ''} {blocks}: {took:.3f} ms")
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
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


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
