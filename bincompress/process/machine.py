"""How many CPUs and how much memory may this process use? What the machine has, less what containers and limits leave.

Read are control groups of versions 1 and 2 with all groups around this process's own, and its resource limits.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_NO_LIMIT = 1 << 60  # version 1 says about 2**63 where there is none
_VERSION_2 = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_VERSION_1 = "sys/fs/cgroup"


def usable_cpus(root: Path = Path("/")) -> int:
    """Return the number of threads that can run at once, at least 1: CPUs allowed to us, within the CPU quota.

    A quota of 1.5 CPUs is 2 threads, which together get all of it. root: where /proc and /sys lie.
    """
    allowed = allowed_cpus()
    quota = cpu_quota(root)
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def allowed_cpus() -> int:
    """Return the number of CPUs that the system lets this process use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    with contextlib.suppress(AttributeError, psutil.Error):
        return len(psutil.Process().cpu_affinity())
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPUs' worth of time that the tightest group around this process may use, None without a limit."""
    found = []
    for folder in _groups(root, "cpu"):
        words = (_text(folder / "cpu.max") or "max").split()
        quota, period = (words[0], words[1]) if len(words) == 2 else ("max", "")
        if quota == "max":
            quota, period = _text(folder / "cpu.cfs_quota_us") or "-1", _text(folder / "cpu.cfs_period_us") or "0"
        with contextlib.suppress(ValueError):
            if int(quota) > 0 and int(period) > 0:
                found.append(int(quota) / int(period))
    return min(found, default=None)


def free_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Return the bytes that this process can still take, and what sets that limit, for a message."""
    free = [(int(psutil.virtual_memory().available), "this machine")]
    for folder in _groups(root, "memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None and most < _NO_LIMIT:
                # Files that are cached count as used, and are given up when memory is needed.
                reclaimed = _statistic(folder / "memory.stat", cached)
                free.append((max(0, most - now + reclaimed), "the memory limit of its container (control group)"))
    free += [(left, f"`ulimit {option}`") for left, _, option in resource_limits()]
    return min(free)


def resource_limits() -> list[tuple[int, int, str]]:
    """Return for each memory limit that is set the bytes that it leaves, those it allows, and its option of ulimit."""
    try:
        import resource
    except ImportError:  # on Windows
        return []
    memory = psutil.Process().memory_info()
    found = []
    for name, option, used in (("RLIMIT_AS", "-v", memory.vms), ("RLIMIT_DATA", "-d", getattr(memory, "data", 0))):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY and used:
            found.append((max(0, limit - used), limit, option))
    return found


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those around it, of both versions, as far as they are there."""
    lines = (_text(root / "proc/self/cgroup") or "").splitlines()
    if not any(line.startswith("0::") for line in lines):
        lines.append("0::/")
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            places = [root / place for place in _VERSION_2]
        elif controller in controllers.split(","):
            places = [root / _VERSION_1 / name for name in dict.fromkeys((controller, controllers))]
        else:
            continue
        for place in places:
            yield from _inside_out(place, path)


def _inside_out(place: Path, path: str) -> Iterator[Path]:
    """Yield place/path and its parents down to `place`; in a container, `path` may begin outside of what is mounted."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for start in range(len(parts) + 1):
        inner = parts[start:]
        if place.joinpath(*inner).is_dir():
            for end in range(len(inner), -1, -1):
                yield place.joinpath(*inner[:end])
            return


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    return _as_number(_text(path) or "")


def _statistic(path: Path, name: str) -> int:
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _as_number(value) or 0
    return 0


def _as_number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def size_text(nbytes: float) -> str:
    """Return a number of bytes for a message: whole MB, below one of them whole KB."""
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e6 or not nbytes else f"{max(1.0, nbytes / 1e3):,.0f} KB"
