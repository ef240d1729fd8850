"""Do threads and the memory check follow the limits of containers and of ulimit?"""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bincompress.inference.load import TooLittleMemoryError, check_memory
from bincompress.process import machine

FOUR = {"sched_getaffinity": lambda pid: {0, 1, 2, 3}}


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    memory = type("Memory", (), {"available": 8 << 30})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def system(root: Path, group: str, files: dict[str, str]) -> Path:
    """Write /proc/self/cgroup and files below /sys/fs/cgroup."""
    for name, content in {"proc/self/cgroup": group, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


@pytest.mark.parametrize(
    ("group", "files", "cpus"),
    [
        ("0::/", {}, 4),
        ("0::/", {"cpu.max": "max 100000"}, 4),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "900000 100000"}, 4),
        ("0::/", {"cpu.max": "rubbish"}, 4),
        ("0::/", {"cpu.max": "0 0"}, 4),
        # The tightest of all groups around the process counts.
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000", "cpu.max": "300000 100000"}, 1),
        # Without a namespace of its own, a container sees its group's path on the host, which is not mounted in it.
        ("0::/docker/0123/in", {"in/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
        ("0::/../../system.slice", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/k/p", {"cpu/k/p/cpu.cfs_quota_us": "200000", "cpu/k/p/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu:/docker/0123", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("3:memory:/\n0::/u", {"unified/u/cpu.max": "100000 100000"}, 1),
    ],
)
def test_cpus(tmp_path: Path, group: str, files: dict[str, str], cpus: int) -> None:
    assert machine.usable_cpus(system(tmp_path, group, files)) == cpus


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        ("0::/", {"memory.max": "max", "memory.current": "1000"}, 8 << 30),
        ("0::/", {"memory.max": "100000000", "memory.current": "60000000"}, 40_000_000),
        (
            "0::/",
            {
                "memory.max": "100000000",
                "memory.current": "60000000",
                "memory.stat": "anon 5\ninactive_file 1000000\nactive_file 9",
            },
            41_000_000,
        ),
        ("0::/", {"memory.max": "100", "memory.current": "200"}, 0),
        (
            "0::/a/b",
            {
                "a/memory.max": "5000000",
                "a/memory.current": "4000000",
                "a/b/memory.max": "max",
                "a/b/memory.current": "9",
            },
            1_000_000,
        ),
        (
            "4:memory:/docker/0123",
            {
                "memory/memory.limit_in_bytes": "9000000",
                "memory/memory.usage_in_bytes": "5000000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2000000",
            },
            6_000_000,
        ),
        (
            "4:memory:/",
            {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"},
            8 << 30,
        ),
    ],
)
def test_memory(tmp_path: Path, group: str, files: dict[str, str], free: int) -> None:
    assert machine.free_memory(system(tmp_path, group, files))[0] == free


def test_the_message_names_the_limit(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/", {"memory.max": "100000000", "memory.current": "60000000"})
    with pytest.raises(TooLittleMemoryError, match=r"^st: needs about 50 MB of memory, 40 MB are free \(the memory"):
        check_memory("st", 50_000_000, machine.free_memory(root))
    check_memory("st", 40_000_000, machine.free_memory(root))


def test_a_system_without_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(psutil.Process, "cpu_affinity", None)
    monkeypatch.delattr(psutil.Process, "cpu_affinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.usable_cpus(tmp_path) == 7


def test_ulimit_v_is_a_limit() -> None:
    pytest.importorskip("resource")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from bincompress.process.machine import free_memory; free, what = free_memory()\n"
        "assert 0 < free < 4 << 30, free; assert what == '`ulimit -v`', what"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
