"""What a compiled program needs, and what there is."""

import pathlib
from typing import Any


def planned_bytes(compiled: Any) -> int | None:
    """Of one device, by XLA's plan of a compiled program: arguments, results and
    temporaries. None if the backend does not tell."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    sizes = (stats.argument_size_in_bytes, stats.output_size_in_bytes)
    return sum(sizes) + stats.temp_size_in_bytes - stats.alias_size_in_bytes


def available_bytes(device: Any) -> int | None:
    """What a device has left; of a CPU, what the machine has, which all devices share.
    None if nothing tells."""
    if device.platform == "cpu":
        return _of_machine()
    stats = device.memory_stats()
    if stats is None or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _of_machine() -> int | None:
    found = [x for x in (_of_system(), _of_container()) if x is not None]
    return min(found, default=None)


def _of_system() -> int | None:
    info = pathlib.Path("/proc/meminfo")
    if not info.exists():
        return None
    for line in info.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _of_container() -> int | None:
    """Of Linux's control group, in both of its versions. What it holds of files can be
    dropped."""
    for folder, most, now, files in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "/sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        group = pathlib.Path(folder)
        paths = [group / name for name in (most, now, "memory.stat")]
        if all(path.exists() for path in paths):
            limit, used, stat = (path.read_text().strip() for path in paths)
            known = dict(line.split()[:2] for line in stat.splitlines())
            if limit.isdigit() and used.isdigit():
                return max(0, int(limit) - int(used) + int(known.get(files, 0)))
    return None
