"""Measures each case: all candidates are compiled and compared one by one, and then timed
in turn."""

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import UnsupportedError
from .clock import seconds
from .expected import Expected, expected_of
from .masks import ERRORS, MASK_ERRORS, num_pairs
from .memory import available_bytes
from .peers import of_peer
from .programs import Candidate, of_mechanism, Operands, Program
from .report import Row
from .settings import Case, cases, Settings


PASSES = ("forward", "both")
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "DefaultCPUAllocator")


class NeedsMemory(Exception):
    """A program was not run, as it would not have fit."""


# Called with how many steps there are, how many are done, and what is being done.
Watch = Callable[[int, int, str], None]


class Measuring:
    """Yields the rows of settings; `interrupted` says afterwards if it was stopped."""

    def __init__(self, settings: Settings, watch: Watch):
        self.settings, self.watch = settings, watch
        self.interrupted = False
        self.matmul_tflops: float | None = None
        self.cases = cases(settings)
        counts = [
            len(settings.names(case.place)) + len(settings.peers) for case in self.cases
        ]
        self.steps, self.done = 2 * sum(counts), 0

    def rows(self) -> Iterator[Row]:
        try:
            self.matmul_tflops = matmul_tflops(self.settings)
            for case in self.cases:
                group = _Group(case, self)
                try:
                    group.prepare()
                    group.time()
                except KeyboardInterrupt:
                    self.interrupted = True
                yield from group.rows()
                if self.interrupted:
                    return
        except KeyboardInterrupt:
            self.interrupted = True

    def step(self, case: Case, name: str, doing: str) -> None:
        on = f" on {case.place.name}" if case.place.name else ""
        self.watch(
            self.steps, self.done, f"{case.mask_name} {case.length:,}{on}: {doing} {name}"
        )
        self.done += 1


def matmul_tflops(settings: Settings) -> float:
    """Of a square matrix product on one device: large enough to be as fast as they get."""
    device = settings.places[0].devices[0]
    size = 1024 if device.platform == "cpu" else 8192
    x = jnp.ones((size, size), settings.dtype, device=device)
    product = jax.jit(lambda x: x @ x)
    product(x)
    rounds = [
        seconds(lambda: product(x), jax.block_until_ready) for _ in range(settings.rounds)
    ]
    return 2 * size**3 / statistics.median(rounds) / 1e12


class _Group:
    """The rows of a case, in the making."""

    def __init__(self, case: Case, measuring: Measuring):
        self.case, self.measuring = case, measuring
        self.found: dict[str, dict[str, Any]] = {}
        self.programs: dict[str, dict[str, Program]] = {}
        self.times: dict[tuple[str, str], list[float]] = {}
        self.pairs = 0

    def prepare(self) -> None:
        """Compiles all, and compares each with what is right."""
        case, names = self.case, self.case.settings.names(self.case.place)
        try:
            host = case.operands()
            arrays = tuple(case.place.put(x) for x in host)
            expected = expected_of(case, host)
            part = case.place.put(expected.part.alone(host[3]))
            operands = Operands(arrays, part)  # pyright: ignore[reportArgumentType]
            s = case.settings
            self.pairs = num_pairs(case.mask, s.batch, s.num_heads, case.length)
        except MASK_ERRORS as error:
            for name in (*names, *case.settings.peers):
                self._refuse(name, error)
            return
        for name in names:
            self.measuring.step(case, name, "compiling")
            try:
                candidate = of_mechanism(name, case, operands)
            except ERRORS as error:
                self._refuse(name, error)
            else:
                self._prepare(candidate, expected)
        for peer in case.settings.peers:
            self.measuring.step(case, peer, "compiling")
            try:
                candidates = of_peer(peer, case, operands)
            except ERRORS as error:
                self._refuse(peer, error)
            else:
                for candidate in candidates:
                    self._prepare(candidate, expected)

    def _prepare(self, candidate: Candidate, expected: Expected) -> None:
        row = self.found.setdefault(candidate.name, {})
        row["reference"] = expected.part.text
        try:
            row["explain"] = candidate.explain()
            for which in PASSES:
                program = candidate.program(which)
                if program.needs is not None:
                    row[f"{which}_mib"] = program.needs / 2**20
                self._check_fits(program, which)
                row |= _compared(program, which, expected)
                self.programs.setdefault(candidate.name, {})[which] = program
        except (NeedsMemory, *ERRORS) as error:
            self._refuse(candidate.name, error)

    def _check_fits(self, program: Program, which: str) -> None:
        """Where the system promises memory that it has not, it ends those that use it."""
        devices = self.case.place.devices
        available = available_bytes(devices[0])
        if program.needs is None or available is None:
            return
        # Arguments of ours are there already, and so are counted twice: few, and on the
        # safe side.
        needs = program.needs * (len(devices) if devices[0].platform == "cpu" else 1)
        if needs > available:
            passes = {"forward": "forward", "both": "forward and backward"}
            raise NeedsMemory(
                f"{passes[which]} needs {needs / 2**30:,.1f} GiB, and "
                f"{available / 2**30:,.1f} GiB are free"
            )

    def _refuse(self, name: str, error: Exception) -> None:
        status, reason = _status(error)
        self.found.setdefault(name, {}).update(status=status, reason=reason)

    def time(self) -> None:
        on_cpu = self.case.place.devices[0].platform == "cpu"
        # What comes after one that takes much memory may be slower for that: so each round
        # has an order of its own.
        rng = np.random.default_rng(0)
        for which in PASSES:
            for _ in range(self.case.settings.rounds):
                for name in map(str, rng.permutation(list(self.programs))):
                    program = self.programs[name].get(which)
                    if program is None:
                        continue
                    if (name, which) not in self.times and which == "both":
                        self.measuring.step(self.case, name, "timing")
                    try:
                        took = seconds(program.call, program.wait, each=on_cpu)
                    except ERRORS as error:
                        del self.programs[name]
                        self._refuse(name, error)
                    else:
                        self.times.setdefault((name, which), []).append(took)

    def rows(self) -> Iterator[Row]:
        case, s = self.case, self.case.settings
        for name, found in self.found.items():
            row = dict(found)
            for which, factor in zip(PASSES, (1.0, 3.5), strict=True):
                rounds = self.times.get((name, which))
                if rounds:
                    took = statistics.median(rounds)
                    rate = 4 * self.pairs * s.head_dim * factor / took / 1e12
                    row |= {f"{which}_ms": took * 1e3, f"{which}_tflops": rate}
                    if self.measuring.matmul_tflops:
                        most = self.measuring.matmul_tflops * case.place.units
                        row[f"{which}_share"] = rate / most
            if "status" not in row and "both_ms" not in row:
                if "error_out" not in row:
                    continue  # stopped before anything was measured
                row |= {"status": "interrupted", "reason": "stopped before all was timed"}
            yield Row(case.place.name, case.mask_name, case.length, name, **row)


def _compared(program: Program, which: str, expected: Expected) -> dict[str, Any]:
    """What a row says of the results of a program."""
    out, *gradients = program.results()
    if which == "forward":
        found = {"error_out": expected.error_of_out(out)}
    else:
        errors = expected.errors(out, gradients)
        names = ("error_dq", "error_dk", "error_dv")
        found = dict(zip(names, errors.gradients, strict=True))
        found |= {"grad_norm_ratio": errors.norm_ratio, "grad_max": errors.largest}
    odd = [name for name, x in found.items() if not math.isfinite(x)]
    row: dict[str, Any] = {name: x for name, x in found.items() if name not in odd}
    if odd:
        row |= {"status": "not finite", "reason": f"of {', '.join(odd)}"}
    return row


def _status(error: Exception) -> tuple[str, str]:
    text = " ".join(str(error).split())
    if isinstance(error, UnsupportedError):
        reasons = text.partition("does not support this call: ")[2]
        return "unsupported", reasons.partition(" Mechanisms that do:")[0] or text
    if isinstance(error, NotImplementedError):
        return "unsupported", text[:300]
    if isinstance(error, MemoryError | NeedsMemory) or any(x in text for x in _NO_MEMORY):
        return "out of memory", text[:300]
    if isinstance(error, ValueError):
        return "unsupported", text[:300]
    return "failed", f"{type(error).__name__}: {text}"[:300]
