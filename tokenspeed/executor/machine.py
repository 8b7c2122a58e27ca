"""What this machine, or the container around us, has for us: processors and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 60
"""Version 1 of cgroups writes "no limit" as a number near 2^63."""


def available_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may use: its affinity, cut by the CPU quota of its cgroups."""
    count = float(len(os.sched_getaffinity(0)))
    for folder in _cgroups(root, "cpu"):
        quota = _words(folder / "cpu.max")
        if not quota:
            quota = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            count = min(count, int(quota[0]) / int(quota[1]))
    return max(1, int(count))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping or being killed: MemAvailable, cut by cgroup limits.

    A cgroup's usage counts its page cache; the part of it not used recently can be reclaimed, so it is free.
    """
    available = _meminfo(root)["MemAvailable"]
    for folder in _cgroups(root, "memory"):
        for limit_file, usage_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _words(folder / limit_file), _words(folder / usage_file)
            if limit and usage and limit[0] != "max" and int(limit[0]) < UNLIMITED:
                cache = _statistic(folder / "memory.stat", cache_key)
                available = min(available, int(limit[0]) - int(usage[0]) + cache)
    return max(0, available)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup folders for `controller`, of either version, and the folders above them.

    A container may see a path from outside of it; then only the mount's own top exists here.
    """
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top = mount
        elif controller in controllers.split(","):
            top = mount / controllers if (mount / controllers).is_dir() else mount / controller
        else:
            continue
        folder = top / path.lstrip("/")
        while folder != top:
            yield folder
            folder = folder.parent
        yield top


def _meminfo(root: Path) -> dict[str, int]:
    fields = (line.split() for line in _lines(root / "proc/meminfo"))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in fields}


def _statistic(path: Path, key: str) -> int:
    return next((int(line.split()[1]) for line in _lines(path) if line.split()[0] == key), 0)


def _lines(path: Path) -> list[str]:
    """The file's lines, none if there is no such file or it may not be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    lines = _lines(path)
    return lines[0].split() if lines else []
