"""Times all that `TIMED` names: compiled by several processes at a time, as that takes
most of the time, and then timed in turn, while all others wait."""

import concurrent.futures as futures
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from . import peers
from .cases import TIMED
from .clock import Calls, ROUNDS, seconds


_PASSES = {"fwd": "forward", "fb": "both"}
# In the processes that time: what they have compiled.
_READY: dict[tuple[str, str], Calls] = {}


class _Portable:
    """What other libraries raise may not survive the way to another process: texts do."""

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if error is not None:
            raise RuntimeError(f"{kind.__name__}: {error}") from None


def _prepare(case: str, name: str, shrink: int) -> dict[str, Any]:
    """Compiles, and runs once; returns what the row is to tell besides."""
    with _Portable():
        if name == "flex":
            from .torch_calls import calls
        else:
            from .jax_calls import calls
        made = calls(name, TIMED[case], shrink)
        for part in _PASSES.values():
            made.wait(getattr(made, part)())
    _READY[case, name] = made
    return made.note


def _round(case: str, name: str, part: str) -> float:
    made = _READY[case, name]
    with _Portable():
        return seconds(getattr(made, _PASSES[part]), made.wait)


def _kernels(case: str, name: str) -> list[str]:
    from .jax_calls import kernels

    with _Portable():
        return kernels(_READY[case, name].both)


class Timings:
    """`rows` are what is timed, `failures` what could not be."""

    def __init__(self, only: str, peers_: set[str], workers: int, shrink: int):
        self.shrink = shrink
        self.failures: list[dict[str, Any]] = []
        self.jobs = [
            (case, name)
            for case, timed in TIMED.items()
            if only in case
            for name in peers.names(timed, peers_)
        ]
        self.folder = tempfile.TemporaryDirectory()
        # What the processes inherit: memory is shared, and each compiles by itself.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.folder.name
        os.environ["TRITON_CACHE_DIR"] = os.path.join(self.folder.name, "triton")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        self.pools = self._shared_out(workers)

    def _shared_out(self, workers: int) -> dict[tuple[str, str], Any]:
        """One process a pool: what a process compiled, it must time."""
        context = multiprocessing.get_context("spawn")
        found: dict[tuple[str, str], Any] = {}
        shares = {"jax": 2, "tokamax": 4, "flex": 3}
        for group, share in shares.items():
            jobs = [job for job in self.jobs if peers.group(job[1]) == group]
            count = min(len(jobs), max(1, workers // share))
            pools = [
                futures.ProcessPoolExecutor(1, mp_context=context) for _ in range(count)
            ]
            found |= {job: pools[n % count] for n, job in enumerate(jobs)}
        return found

    def _ask(self, job: tuple[str, str], what, *args) -> futures.Future:
        try:
            return self.pools[job].submit(what, *job, *args)
        except BrokenProcessPool as error:
            future: futures.Future = futures.Future()
            future.set_exception(error)
            return future

    def _failed(self, job: tuple[str, str], error: BaseException) -> None:
        text = " ".join(str(error).split())
        self.failures.append({"case": job[0], "mechanism": job[1], "error": text[:600]})
        print(f"not timed: {job[0]} {job[1]}: {text[:240]}", flush=True)

    def _prepared(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What the row of each is to tell besides times, of those that can be timed."""
        start, ready = time.perf_counter(), {}
        asked = {self._ask(job, _prepare, self.shrink): job for job in self.jobs}
        for n, future in enumerate(futures.as_completed(asked), 1):
            error = future.exception()
            if error is None:
                ready[asked[future]] = future.result()
            else:
                self._failed(asked[future], error)
            if n % 10 == 0 or n == len(asked):
                took = time.perf_counter() - start
                print(f"compiled {n} of {len(asked)} in {took:.0f} s", flush=True)
        return ready

    def rows(self, profile: bool) -> Iterator[dict[str, Any]]:
        notes = self._prepared()
        for case in TIMED:
            jobs = [job for job in self.jobs if job[0] == case and job in notes]
            for job, times in self._times(jobs).items():
                row = _row(job, times, self.shrink) | notes[job]
                if profile and peers.group(job[1]) == "jax":
                    row |= self._profiled(job)
                print(_line(row), flush=True)
                yield row
        for pool in set(self.pools.values()):
            pool.shutdown()
        self.folder.cleanup()

    def _times(self, jobs: list) -> dict[tuple[str, str], dict[str, list[float]]]:
        taken: dict[tuple, dict[str, list[float]]] = {
            job: {part: [] for part in _PASSES} for job in jobs
        }
        for part in _PASSES:
            for _ in range(ROUNDS):
                for job in list(taken):
                    future = self._ask(job, _round, part)
                    error = future.exception()
                    if error is None:
                        taken[job][part].append(future.result())
                    else:
                        del taken[job]
                        self._failed(job, error)
        return taken

    def _profiled(self, job: tuple[str, str]) -> dict[str, Any]:
        future = self._ask(job, _kernels)
        error = future.exception()
        return {"kernels": future.result() if error is None else [str(error)[:200]]}


def _row(
    job: tuple[str, str], times: dict[str, list[float]], shrink: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": job[0], "mechanism": job[1]}
    for part, rounds in times.items():
        median = statistics.median(rounds)
        row[f"{part}_ms"] = median * 1e3
        row[f"{part}_rounds_ms"] = [x * 1e3 for x in rounds]
        flops = TIMED[job[0]].flops(part == "fb", shrink)
        if flops is not None:
            row[f"{part}_tflops"] = flops / median / 1e12
    return row


def _line(row: dict[str, Any]) -> str:
    text = f"{row['case']:36s} {row['mechanism']:12s}"
    for part, title in (("fwd", "fwd"), ("fb", "f+b")):
        rate = row.get(f"{part}_tflops")
        rate = "" if rate is None else f" {rate:4.0f} TF/s"
        text += f" {title} {row[f'{part}_ms']:8.3f} ms{rate:10s}"
    return f"{text} {row.get('kernels', '')}".rstrip()
