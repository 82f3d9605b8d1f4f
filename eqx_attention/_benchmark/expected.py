"""What is right, in float64: of all of a call, or of a part of it that is small enough."""

import contextlib
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from ..testing._reference import gradients_of
from ..testing._visible import pairs_of
from .masks import visible_rows
from .settings import Case


# So many weights, at most, are in memory at a time; several times, in float64.
_WEIGHTS = 2**22


class Part(NamedTuple):
    """The first batch elements, the first key heads (and the query heads that read them),
    and some queries, which see all keys."""

    batch: int
    kv_heads: int
    heads: int
    rows: np.ndarray
    text: str

    def of_queries(self, x: np.ndarray) -> np.ndarray:
        return x[: self.batch, self.rows, : self.heads]

    def of_keys(self, x: np.ndarray) -> np.ndarray:
        return x[: self.batch, :, : self.kv_heads]

    def alone(self, dout: np.ndarray) -> np.ndarray:
        """A cotangent that is zero elsewhere, so that nothing else has a part in the
        gradients."""
        out = np.zeros_like(dout)
        rows = np.isin(np.arange(dout.shape[1]), self.rows)
        some = (slice(self.batch), slice(None), slice(self.heads))
        out[some] = dout[some] * rows[:, None, None].astype(dout.dtype)
        return out


class Errors(NamedTuple):
    """Largest differences, relative to the largest number of what is right. `norm_ratio` is
    the norm of all gradients over that of the right ones, and `largest` the largest
    gradient. All are NaN or infinite if something is;
    `norm_ratio` is infinite if the right gradients alone are zero."""

    out: float
    gradients: tuple[float, float, float]
    norm_ratio: float
    largest: float


class Expected(NamedTuple):
    part: Part
    out: np.ndarray
    gradients: tuple[np.ndarray, np.ndarray, np.ndarray]

    def error_of_out(self, out: np.ndarray) -> float:
        return _error(self.part.of_queries(out), self.out, out)

    def errors(self, out: np.ndarray, gradients: list[np.ndarray]) -> Errors:
        """`out` and `gradients` are those of the whole call."""
        dq, dk, dv = gradients
        parts = (
            self.part.of_queries(dq),
            self.part.of_keys(dk),
            self.part.of_keys(dv),
        )
        got = [np.asarray(x, np.float64) for x in parts]
        each = zip(got, self.gradients, gradients, strict=True)
        norms = [
            math.sqrt(sum(float(np.square(x).sum()) for x in xs))
            for xs in (got, self.gradients)
        ]
        return Errors(
            self.error_of_out(out),
            tuple(_error(g, want, whole) for g, want, whole in each),  # pyright: ignore
            _ratio(*norms),
            max(_largest(x) for x in gradients),
        )


def _ratio(got: float, want: float) -> float:
    """Of norms. Where nothing is visible, all gradients are zero."""
    if want > 0:
        return got / want
    return 1.0 if got == 0 else math.inf


def _error(got: np.ndarray, want: np.ndarray, whole: np.ndarray) -> float:
    if not math.isfinite(_largest(whole)):
        return math.nan
    difference = np.abs(np.asarray(got, np.float64) - want).max()
    return float(difference / max(np.abs(want).max(), np.finfo(np.float32).tiny))


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def part_of(case: Case) -> Part:
    s, length = case.settings, case.length
    group = s.num_heads // s.num_kv_heads
    batch, kv_heads, rows = s.batch, s.num_kv_heads, length
    if batch * kv_heads * group * length**2 > _WEIGHTS:
        batch = 1
    if kv_heads * group * length**2 > _WEIGHTS:
        kv_heads = 1
    if group * length**2 > _WEIGHTS:
        rows = max(1, _WEIGHTS // (group * length))
    whole = (batch, kv_heads, rows) == (s.batch, s.num_kv_heads, length)
    text = (
        f"{rows:,} of {length:,} queries, {kv_heads * group} of {s.num_heads} heads, "
        f"{batch} of {s.batch} batch elements"
    )
    index = np.linspace(0, length - 1, rows).round().astype(np.int64)
    return Part(batch, kv_heads, kv_heads * group, index, "all" if whole else text)


def expected_of(case: Case, operands: list[np.ndarray]) -> Expected:
    """On a CPU, if jax has one here."""
    part, s = part_of(case), case.settings
    query, key_, value, dout = operands
    seen = visible_rows(case.mask, s.batch, s.num_heads, case.length, part.rows)
    shape = (part.batch, part.heads, len(part.rows), case.length)
    seen = np.broadcast_to(seen[: part.batch, : part.heads], shape)
    at = pairs_of(
        (part.batch,), part.heads, case.length, case.length, "start", None, part.rows
    )
    arguments = dict(query=part.of_queries(query), score=())
    arguments |= dict(key_=part.of_keys(key_), value=part.of_keys(value))
    prepared = dict(at=at, visible=np.asarray(seen), kept=np.ones((1, 1, 1, 1)))
    with _on_cpu():
        found = gradients_of(arguments, prepared, part.of_queries(dout))
    gradients = tuple(found.arguments[name] for name in ("query", "key_", "value"))
    return Expected(part, found.out, gradients)  # pyright: ignore[reportArgumentType]


def _on_cpu() -> Any:
    try:
        return jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:  # Such as where JAX_PLATFORMS names another alone.
        return contextlib.nullcontext()
