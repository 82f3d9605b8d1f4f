"""What GPUs ran, by a profile."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Event(NamedTuple):
    """A kernel or a copy, and from when to when it ran, in nanoseconds."""

    start: float
    end: float
    name: str


def profiled(run: Callable[[], Any], folder: str | None = None) -> dict[str, list[Event]]:
    """What each GPU did while `run` was called and what it returned was waited for. The
    profile stays in `folder`, if there is one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return profiled(run, made)
    with jax.profiler.trace(folder):
        jax.block_until_ready(run())
    paths = pathlib.Path(folder).rglob("*.xplane.pb")
    path = max(paths, key=lambda path: path.stat().st_mtime)
    profile = jax.profiler.ProfileData.from_file(str(path))
    return {
        plane.name: [
            Event(event.start_ns, event.start_ns + event.duration_ns, event.name)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
    }
