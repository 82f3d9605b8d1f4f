"""What was measured."""

import csv
import dataclasses
import io
import json
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one mechanism, at one length, with one mask, on one mesh.

    **Fields:**

    - `mesh`: its axes of more than one device, such as `"dp=2,sp=4"`; empty for a single
        device without a mesh.
    - `mask`, `sequence_length`, `mechanism`: what was measured. Peers are `"jax.nn"`,
        `"tokamax"` and `"torch"`.
    - `status`: `"ok"`, `"unsupported"`, `"out of memory"`, `"not finite"` (a result is NaN
        or infinite), `"failed"` or `"interrupted"`.
    - `reason`: why, if it is not `"ok"`. What was measured before that is kept.
    - `explain`: how it was computed, in a line.
    - `forward_ms`, `both_ms`: medians of the time of the forward pass, and of the forward
        and backward pass together.
    - `forward_tflops`, `both_tflops`: operations a second on the pairs that the mask sees:
        `4 * pairs * head_dim`, and 3.5 times that with the backward pass.
    - `forward_share`, `both_share`: of those of a matrix product in the same run; of as
        many as there are devices.
    - `forward_mib`, `both_mib`: peak memory of a device, by the compiler's plan:
        arguments, results and temporaries.
    - `error_out`, `error_dq`, `error_dk`, `error_dv`: the largest difference from float64,
        relative to the largest number.
    - `grad_norm_ratio`: the norm of the gradients over that of the right ones.
    - `grad_max`: the largest gradient.
    - `reference`: `"all"`, or of which part of the call the errors and gradients are. The
        cotangent of the output then is zero elsewhere.

    What was not measured is `None`.
    """

    mesh: str
    mask: str
    sequence_length: int
    mechanism: str
    status: str = "ok"
    reason: str = ""
    explain: str = ""
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_tflops: float | None = None
    both_tflops: float | None = None
    forward_share: float | None = None
    both_share: float | None = None
    forward_mib: float | None = None
    both_mib: float | None = None
    error_out: float | None = None
    error_dq: float | None = None
    error_dk: float | None = None
    error_dv: float | None = None
    grad_norm_ratio: float | None = None
    grad_max: float | None = None
    reference: str = ""

    @property
    def error_grad(self) -> float | None:
        """The largest error of a gradient."""
        errors = [self.error_dq, self.error_dk, self.error_dv]
        return max((x for x in errors if x is not None), default=None)


_FIELDS = tuple(field.name for field in dataclasses.fields(Row))
_FORMAT, _VERSION = "eqx_attention benchmark", 1


@dataclasses.dataclass(frozen=True)
class Report:
    """What [`eqx_attention.benchmark.run`][] returns. `print(report)` shows it as tables.

    **Fields:**

    - `settings`: what was asked for, with all defaults.
    - `machine`: the device, the versions, and the date.
    - `matmul_tflops`: of a matrix product in the same dtype, on one device.
    - `rows`: a tuple of [`eqx_attention.benchmark.Row`][].
    - `interrupted`: whether it was stopped before its end.
    - `unwritten`: of each file that was asked for and could not be written in the end, by
        the name of its argument, why. This is not in files.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    matmul_tflops: float | None
    rows: tuple[Row, ...]
    interrupted: bool = False
    unwritten: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        from .tables import plain

        return plain(self)

    def to_json(self) -> str:
        """All of it, as JSON."""
        head = {"format": _FORMAT, "version": _VERSION}
        content = dataclasses.asdict(self)
        del content["unwritten"]
        return json.dumps(head | content, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Report":
        """Reads what `to_json` wrote.

        **Raises:** `ValueError` if it is something else.
        """
        found = json.loads(text)
        kind = (found.pop("format", None), found.pop("version", None))
        if kind != (_FORMAT, _VERSION):
            raise ValueError(
                f"text: expected the format {_FORMAT!r}, version {_VERSION}; got {kind}."
            )
        rows = tuple(Row(**row) for row in found.pop("rows"))
        return Report(**found, rows=rows)

    def to_csv(self) -> str:
        """The rows, under a line of the names of their fields."""
        out = io.StringIO()
        writer = csv.DictWriter(out, _FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in self.rows)
        return out.getvalue()

    def meshes(self) -> list[tuple[str, float]]:
        """The meshes, from the fastest to the slowest, each with how many times as long as
        the fastest it takes: forward and backward, with the mechanism that is the fastest
        there, and in the geometric mean over all masks and lengths. One on which some of
        these were not measured is infinite."""
        best: dict[str, dict[tuple[str, int], float]] = {}
        for row in self.rows:
            times = best.setdefault(row.mesh, {})
            if row.both_ms is not None:
                case = (row.mask, row.sequence_length)
                times[case] = min(row.both_ms, times.get(case, math.inf))
        cases = {case for times in best.values() for case in times}

        def mean(times: dict[tuple[str, int], float]) -> float:
            if not cases or cases - set(times):
                return math.inf
            return math.exp(sum(math.log(x) for x in times.values()) / len(times))

        means = {mesh: mean(times) for mesh, times in best.items()}
        least = min((x for x in means.values() if math.isfinite(x)), default=1.0)
        ranked = sorted(means, key=lambda mesh: means[mesh])
        return [(mesh, means[mesh] / least) for mesh in ranked]
