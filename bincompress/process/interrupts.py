"""How does the program end when it is asked to? By SIGTERM or SIGHUP as by Ctrl-C, and never with processes left."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_GRACE_SECONDS = 5.0  # from a signal to the end, whatever is still being tidied up


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


_came: int | None = None  # the signal


def termination_came() -> bool:
    """Return whether the process was told to end, so that nothing is to be waited for."""
    return _came is not None


@contextlib.contextmanager
def terminations_raised() -> Iterator[None]:
    """Raise Terminated in the main thread on SIGTERM and SIGHUP, unless the caller has set them to something else."""
    global _came
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        mine = []
    for number in mine:
        signal.signal(number, _raise)
    try:
        yield
    except KeyboardInterrupt as error:
        # A library that waits in C, as Ray does, may raise a plain interrupt in place of ours.
        if _came is not None and not isinstance(error, Terminated):
            raise Terminated(_came) from None
        raise
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
        _came = None


def _raise(number: int, frame: FrameType | None) -> None:
    global _came
    _came = number
    end_soon(128 + number)
    raise Terminated(number)


def end_soon(code: int) -> None:
    """End the process with this exit code in a few seconds if it has not ended: a thread may be in long work.

    Only where it was told to terminate or is ending already; a caller of main() that goes on is left alone.
    """

    def end() -> None:
        if termination_came() or getattr(threading, "_SHUTTING_DOWN", False):
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    timer = threading.Timer(_GRACE_SECONDS, end)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no more threads: then it ends when it does
        timer.start()


def end_with(parent: Any) -> None:
    """End this process once its parent process has ended; parent: has a `join` that returns then."""

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
