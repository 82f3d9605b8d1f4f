"""Damaged files and texts, given to `load` and `from_json`.

    python -m tests.fuzz_load --count 10000

makes that many under a limit of 1 GiB of address space beyond what the process has when it
starts, prints what became of each kind, and fails if anything but a `SerialisationError`
or a `ValueError` was raised.
"""

import argparse
import collections
import copy
import hashlib
import json
import pathlib
import random
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqx_attention as eqa
import jax.numpy as jnp
import jax.random as jr
import numpy as np


_UNKNOWN = "0" * 64
# What is counted and shown, of all that must not come. Anything else ends the run.
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
)


def _even(q_pos, kv_pos, head, q_feature, kv_feature, params):
    return (q_pos + kv_pos) % 2 == 0


FUNCTIONS = {"_even": _even}


def modules() -> list[Any]:
    """Small ones, of every kind of thing that is in a file."""
    key = jr.key(0)
    config = eqa.AttentionConfig(mask=eqa.Causal(), precision="highest")
    return [
        eqa.Attention(
            mask=eqa.Causal() & eqa.Predicate(_even, jnp.arange(3)) | ~eqa.Chunked(4),
            score=(eqa.ALiBi.standard(2), eqa.SoftCap(30.0)),
            scale=jnp.array([0.1, 0.2]),
            sharding=eqa.Sharding(batch=("dp", "fsdp"), heads="tp"),
        ),
        eqa.MultiheadAttention(
            2, 4, num_kv_heads=1, qk_norm="l2", attention=config, key=key
        ),
        eqa.block_mask(eqa.Causal(), 5, 7, block_q=2, block_k=2),
        (eqa.Dense(np.eye(3, dtype=bool)), eqa.Bias(jnp.ones((2, 3), jnp.bfloat16))),
        {"a": [1, (2.5, None), {3: "c"}], "b": np.arange(3), "d": key},
        (np.float32(3), np.bool_(True), float("inf"), jnp.array(1.0), jnp.asarray(1.0)),
        eqa.StaticCache.init(4, 2, 3, batch=(2,), dtype=jnp.bfloat16),
        eqx.nn.MLP(2, 2, 4, 1, key=key),
        eqa.Ulysses(inner=eqa.AllGather("blockwise")),
    ]


def configs() -> list[str]:
    mask = eqa.Causal() & eqa.SlidingWindow(3, None) | ~eqa.Prefix(2)
    score = (eqa.SoftCap(30.0),)
    sharding = eqa.Sharding(sequence="sp", heads=("a", "b"))
    every = [
        eqa.AttentionConfig(),
        eqa.AttentionConfig("ring", mask, score, 0.5, 0.1, "highest", "bfloat16", sharding),
        eqa.AttentionConfig(eqa.Blockwise(16, 32), score=(eqa.SoftCap(2.0),) * 3),
    ]
    return [config.to_json() for config in every]


class File:
    """A good file, in its parts."""

    def __init__(self, data: bytes):
        line, _, self.payload = data.partition(b"\n")
        self.header = json.loads(line)

    def bytes(self) -> bytes:
        """With checksums that are right."""
        header = self.header | {
            "payload_sha256": hashlib.sha256(self.payload).hexdigest(),
            "header_sha256": _UNKNOWN,
        }
        digest = hashlib.sha256(_line(header)).hexdigest()
        return _line(header | {"header_sha256": digest}) + self.payload


def _line(header: Any) -> bytes:
    return json.dumps(header).encode() + b"\n"


_ODD = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**40, 2**63, -(2**70), 10**400),
    *(0.5, -0.0, 1e300, 1e-320, float("inf"), float("nan")),
    *("", "a", "\0", "\ud800", "float32", "Causal", "x" * 3000, "__class__", "nan"),
    *([], {}, [[]], [None] * 40, {"type": "Full"}, {"type": "Not"}, {"leaf": 0}),
    *({"static": 3}, {"static": None}, {"float": "nan"}, {"list": []}, {"dict": [[1, 2]]}),
    *({"dtype": "int8"}, {"mesh": ["dp"]}, {"function": "_even"}, {"list": {}}),
    *({"function": "os.system"}, {"type": "Causal", "offset": {"leaf": 1}}),
]


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every `(container, key)` within JSON."""
    keys = data.keys() if isinstance(data, dict) else range(len(data))
    found = []
    for key in keys:
        found.append((data, key))
        if isinstance(data[key], dict | list):
            found += _places(data[key])
    return found


def _mutate(rng: random.Random, data: Any) -> None:
    """Changes JSON in place, in one to three places."""
    for _ in range(rng.randint(1, 3)):
        if not (places := _places(data)):
            return
        parent, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                other, other_key = rng.choice(places)
                parent[key] = copy.deepcopy(other[other_key])
            case 1:
                del parent[key]
            case 2 if isinstance(parent, dict):
                parent[rng.choice(["type", "x", "leaf", str(key) + "s"])] = parent.pop(key)
            case 3 if type(parent[key]) is int:
                parent[key] += rng.choice([-1, 1, 2 ** rng.randrange(64)])
            case 4:
                parent[key] = rng.choice([[parent[key]], {"list": [parent[key]]}])
            case _:
                parent[key] = copy.deepcopy(rng.choice(_ODD))


def _damage(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, repeats or inserts bytes."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(damaged) + 1)
        j = min(len(damaged), i + rng.choice([1, 2, 8, 100]))
        match rng.randrange(5):
            case 0:
                del damaged[i:]
            case 1:
                del damaged[i:j]
            case 2:
                damaged[i:i] = damaged[i:j]
            case 3:
                damaged[i:j] = rng.randbytes(j - i)
            case _ if i < len(damaged):
                damaged[i] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _anywhere(rng: random.Random, file: File) -> bytes:
    return _damage(rng, file.bytes())


def _structure(rng: random.Random, file: File) -> bytes:
    _mutate(rng, file.header)
    return file.bytes()


def _shapes(rng: random.Random, file: File) -> bytes:
    sizes = (0, 1, 2, 3, 5, -1, 2**20, 2**39, 2**40, 2**63, 2.0, True, "2", None)
    for leaf in file.header["leaves"]:
        match rng.randrange(4):
            case 0:
                leaf["shape"] = [rng.choice(sizes) for _ in range(rng.randrange(4))]
            case 1:
                leaf["shape"] = leaf["shape"][::-1]
            case 2:
                leaf["shape"].insert(0, rng.choice((0, 1)))
            case _:
                _mutate(rng, leaf["shape"])
    if rng.random() < 0.5:  # of the length that the shapes say, if they say one
        try:
            sizes = [
                int(np.prod(leaf["shape"], dtype=object))
                * jnp.dtype(leaf["dtype"]).itemsize
                for leaf in file.header["leaves"]
            ]
        except (OverflowError, TypeError, ValueError):
            return file.bytes()
        file.header["payload_bytes"] = sum(sizes)
        if 0 <= sum(sizes) < 2**20:
            file.payload = file.payload[: sum(sizes)].ljust(sum(sizes), b"\1")
    return file.bytes()


def _dtypes(rng: random.Random, file: File) -> bytes:
    dtypes = ("float32", "int32", "uint32", "bool", "int8", "bfloat16", "float64", "int4")
    dtypes += ("float8_e4m3fn", "complex64", "object", "str", "V8", "", ">f4", None, 3)
    kinds = ("jax", "weak", "numpy", "scalar", "threefry2x32", "rbg", "pickle", None, [])
    for leaf in file.header["leaves"]:
        if rng.random() < 0.7:
            leaf["dtype"] = rng.choice(dtypes)
        if rng.random() < 0.4:
            leaf["kind"] = rng.choice(kinds)
    if rng.random() < 0.5:
        known = [x for x in file.header["leaves"] if x["dtype"] in dtypes[:10]]
        if len(known) == len(file.header["leaves"]):
            size = sum(
                int(np.prod(x["shape"], dtype=int)) * jnp.dtype(x["dtype"]).itemsize
                for x in known
            )
            file.header["payload_bytes"] = size
            file.payload = file.payload[:size].ljust(size, b"\1")
    return file.bytes()


def _checksums(rng: random.Random, file: File) -> bytes:
    line, _, payload = file.bytes().partition(b"\n")
    header = json.loads(line)
    other = hashlib.sha256(rng.randbytes(4)).hexdigest()
    odd = ("", "0" * 64, other, header["header_sha256"], other[:63], None, 3, [], -1)
    for name in ("header_sha256", "payload_sha256", "payload_bytes"):
        if rng.random() < 0.6:
            header[name] = rng.choice((*odd, len(payload) + 1, 2**41, 2**62))
    if rng.random() < 0.5:  # all else agrees with the checksum of the header
        before = _line(header | {"header_sha256": _UNKNOWN})
        header["header_sha256"] = hashlib.sha256(before).hexdigest()
    return _line(header) + payload


def _payload(rng: random.Random, file: File) -> bytes:
    file.payload = rng.choice([_damage, lambda r, x: r.randbytes(len(x))])(
        rng, file.payload or b"\0"
    )
    return file.bytes()


FILES: dict[str, Callable[[random.Random, File], bytes]] = {
    "bytes": _anywhere,
    "header": _structure,
    "shapes": _shapes,
    "dtypes": _dtypes,
    "checksums": _checksums,
    "payload": _payload,
}


def _config(rng: random.Random, text: str) -> str:
    if rng.random() < 0.3:
        return _damage(rng, text.encode()).decode(errors="replace")
    data = json.loads(text)
    _mutate(rng, data)
    return json.dumps(data)


class Results:
    """How often each thing came of each kind of damage, and what should not have come."""

    def __init__(self):
        self.counts = collections.defaultdict(collections.Counter)
        self.failures: list[str] = []

    def of(self, kind: str, number: int, fn: Callable[[], Any]) -> None:
        try:
            fn()
            outcome = "loaded"
        except eqa.SerialisationError:
            outcome = "SerialisationError"
        except ValueError:
            outcome = "ValueError"
        except _ERRORS:
            outcome = "FAILED"
            self.failures.append(f"{kind} {number}:\n{traceback.format_exc()}")
        self.counts[kind][outcome] += 1

    def __str__(self) -> str:
        columns = ("loaded", "SerialisationError", "ValueError", "FAILED")
        rows = [f"{'':10}" + "".join(f"{name:>20}" for name in columns)]
        for kind, counts in self.counts.items():
            rows.append(f"{kind:10}" + "".join(f"{counts[name]:20,}" for name in columns))
        return "\n".join(rows)


def fuzz(count: int, seed: int, folder: pathlib.Path) -> Results:
    """Each kind of file in turn, and a config after them."""
    results, path = Results(), folder / "damaged.eqx"
    good = []
    for module in modules():
        eqa.save(path, module)
        eqa.load(path, functions=FUNCTIONS)
        good.append(path.read_bytes())
    texts = configs()
    kinds = [*FILES, "config"]
    for number in range(count):
        rng = random.Random(f"{seed} {number}")  # so that one can be had again alone
        kind = kinds[number % len(kinds)]
        if kind == "config":
            text = _config(rng, rng.choice(texts))
            results.of(kind, number, lambda: eqa.AttentionConfig.from_json(text))
        else:
            path.write_bytes(FILES[kind](rng, File(rng.choice(good))))
            results.of(kind, number, lambda: eqa.load(path, functions=FUNCTIONS))
    return results


def _status(name: str) -> int:
    """Bytes, of `/proc/self/status`."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    jnp.zeros(()).block_until_ready()  # so that the backend's threads are there
    limit = _status("VmSize") + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = _status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        results = fuzz(flags.count, flags.seed, pathlib.Path(folder))
    print(results)
    grown = (_status("VmHWM") - before) / 2**20
    print(f"{flags.count:,} in all; {grown:.0f} MiB more memory than at the start, at most")
    print(*results.failures[:5], sep="\n")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
