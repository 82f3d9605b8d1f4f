"""Writes what `Auto` chooses by on a GPU, from the results of `gpu_check.py`.

python benchmarks/auto_table.py benchmarks/results/gpu.json
"""

import json
import pathlib
import sys

from eqx_attention._benchmark.files import write_text
from eqx_attention._mechanism.measured import TABLE
from gpu.cases import TIMED


def rows(report: dict) -> list[dict]:
    """Of each plain case: how long `Flash` and cuDNN took, forward and backward."""
    times: dict[str, dict[str, float]] = {}
    for row in report["timings"]:
        times.setdefault(row["case"], {})[row["mechanism"]] = row["fb_ms"]
    out = []
    for case, found in times.items():
        shape, kind, _ = TIMED[case]
        # Ours is called as `Auto` would; else jax.nn's, which is as fast or faster.
        peer = found.get("cudnn", found.get("jax.nn cudnn"))
        if kind in ("causal", "full") and shape[4] == shape[5] and peer is not None:
            ms = {"flash": round(found["flash"], 4), "cudnn": round(peer, 4)}
            out.append({"shape": shape[:5], "masked": kind == "causal", "ms": ms})
    return out


def main() -> None:
    report = json.loads(pathlib.Path(sys.argv[1]).read_text())
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows(report))
    text = f'{{\n "device": "{report["device"]}",\n "rows": [\n{lines}\n ]\n}}\n'
    write_text(TABLE, text)


if __name__ == "__main__":
    main()
