"""How many threads does BLAS use in our calls? One; afterwards it is as the program around us had set it."""

import functools
import os
import threading
from types import TracebackType
from typing import Any

import threadpoolctl


class _OneThread:
    """Counts who is inside, as the setting is the whole process's: the first changes it, the last restores it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before: list[tuple[Any, int]] = []

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = [(library, library.num_threads) for library in _libraries()]
                for library, _ in self.before:
                    library.set_num_threads(1)
            self.inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.restore()

    def restore(self) -> None:
        """Set every library to what it was."""
        for library, threads in self.before:
            library.set_num_threads(threads)

    def after_fork(self) -> None:
        """Leave what threads are in that exist in the parent process alone."""
        self.lock = threading.Lock()
        if self.inside:
            self.inside = 0
            self.restore()


@functools.cache
def _libraries() -> list[Any]:
    """Return the BLAS libraries that are loaded when this is first called: NumPy's at least."""
    return list(threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers)


_ONE_THREAD = _OneThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ONE_THREAD.after_fork)


def one_blas_thread() -> _OneThread:
    """Return a context in which BLAS uses one thread: it sums in another order with more, and we share work ourselves.

    Several threads may be in it, and one thread several times.
    """
    return _ONE_THREAD
