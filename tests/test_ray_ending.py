"""Does everything that a run on a cluster of its own started end with it, however it ends?"""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from bincompress.process.interrupts import Terminated, terminations_raised
from jobs.interrupts import termination_kept
from tests.gates import wait_for
from tests.test_ending import BOUND, ROOT, gone

MARK = "RAY_ENDING_TEST"  # in the environment of a run and of all that it starts

# A process that starts one which starts another and ends, and then waits to be killed.
BEGINS_OTHERS = """
import subprocess, sys, time
from jobs.ending import end_watched, watched
with watched():
    middle = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    subprocess.run([sys.executable, "-S", "-c", middle], check=True)
print("begun", flush=True)
sys.stdin.read()
end_watched()
print("ended", flush=True)
sys.stdin.buffer.raw.read()
"""


def started_by(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.parametrize("killed", [True, False])
def test_what_children_started_ends_with_the_process(killed: bool) -> None:
    mark = uuid.uuid4().hex
    with subprocess.Popen(
        [sys.executable, "-c", BEGINS_OTHERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, MARK: mark}, cwd=ROOT,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == "begun\n"
        started: list[psutil.Process] = []

        def both() -> bool:  # a process that has just begun its program has no environment for a moment
            started[:] = [process for process in started_by(mark) if process.pid != parent.pid]
            return len(started) == 2  # the watcher is the other one

        wait_for(both)
        assert "sleep" in {process.name() for process in started}
        if killed:
            parent.kill()
        else:
            parent.stdin.close()
            assert parent.stdout.readline() == "ended\n"
            parent.kill()
    wait_for(lambda: gone(started))


def test_starting_ray_leaves_the_callers_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with termination_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init does
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


def test_an_interrupt_in_place_of_ours_is_the_signal_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray, waiting in C++, clears what a handler raises and raises KeyboardInterrupt."""
    monkeypatch.setattr("bincompress.process.interrupts.end_soon", lambda code: None)

    def wait_in_c() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        except Terminated:
            raise KeyboardInterrupt from None

    with pytest.raises(Terminated, match="SIGHUP"), terminations_raised():
        wait_in_c()
    with pytest.raises(KeyboardInterrupt) as found, terminations_raised():
        raise KeyboardInterrupt
    assert not isinstance(found.value, Terminated)


@pytest.mark.slow  # begins a cluster
def test_a_cluster_ends_with_the_killed_run_that_began_it(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    mark = uuid.uuid4().hex
    command = [
        "compress",
        tiny_model,
        tmp_path / "store",
        "--runner",
        "ray",
        "--address",
        "local",
        "--events",
        "events",
    ]
    driver = subprocess.Popen(
        [sys.executable, "-m", "bincompress", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env={**os.environ, MARK: mark, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "events").exists() and "submitted" in (tmp_path / "events").read_text())
    names = " ".join(" ".join(process.cmdline()) for process in started_by(mark))
    # The last two are not Ray's to end with the driver.
    assert all(name in names for name in ("raylet", "gcs_server", "dashboard_agent", "runtime_env_agent"))
    driver.kill()
    _, errors = driver.communicate(timeout=BOUND)
    assert (driver.returncode, errors) == (-signal.SIGKILL, "")
    begun = time.monotonic()
    wait_for(lambda: not started_by(mark))
    assert time.monotonic() - begun < 8  # without the watcher eleven seconds at least
