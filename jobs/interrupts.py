"""Ctrl-C once asks for an orderly end, twice for an immediate one; SIGTERM ends a run on Ray as any other."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While entered (in the main thread), the first SIGINT sets `asked` and the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "Interrupts":
        # Python delivers signals to the main thread only; elsewhere Ctrl-C is its caller's business.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


@contextlib.contextmanager
def termination_kept() -> Iterator[None]:
    """Keep the caller's handler of SIGTERM while Ray is started, which sets one that ends with code 15 and no word."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    real, before = signal.signal, signal.getsignal(signal.SIGTERM)

    def set_others(number: int, handler: Any) -> Any:
        return before if number == signal.SIGTERM else real(number, handler)

    signal.signal = set_others  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = real
        if before is not None:
            real(signal.SIGTERM, before)  # Ray's library in C++ has set one, too: it writes a stack
