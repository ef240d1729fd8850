"""Who ends a cluster that this process began, when this process is killed? A watcher: run as a file, it waits for that.

Ray's own head processes end with the driver, but not what these start: two agents live on for ten seconds and workers
that are just beginning for half a minute, hold the pipes of the driver, and may write. All of them inherit a variable.
"""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import psutil

_MARK = "BINCOMPRESS_CLUSTER"
_SWEEP_SECONDS = 15.0  # in which even what a dying process still starts is found
_LOOK_SECONDS = 0.1
_CLOSE_SECONDS = 5.0


class _Watcher:
    """A process that ends whatever bears its mark, once this process has ended or has closed its standard input."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        # A session of its own: what kills or interrupts the group of this process must not reach it.
        self.process = subprocess.Popen(
            [sys.executable, "-I", __file__, self.mark], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
        )  # fmt: skip


_watchers: list[_Watcher] = []  # a file that is collected is closed


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Begin a watcher: whatever is started within this block, and what that starts, ends with this process."""
    watcher = _Watcher()
    _watchers.append(watcher)
    before = os.environ.get(_MARK)
    os.environ[_MARK] = watcher.mark
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MARK]
        else:
            os.environ[_MARK] = before


def end_watched() -> None:
    """End what is left of all that was started within `watched`, and the watchers."""
    while _watchers:
        process = _watchers.pop().process
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CLOSE_SECONDS)


def _left(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _sweep(mark: str) -> None:
    """Kill what bears the mark until nothing does."""
    end = time.monotonic() + _SWEEP_SECONDS
    while (left := _left(mark)) and time.monotonic() < end:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # ends when the process at the other end has
    _sweep(sys.argv[1])
