"""What Rust code writes to standard error as it panics is kept from there: our own error says it in one line.

The library gives no way to ask for that, so standard error is a file of ours for as long as a call of it takes.
"""

import contextlib
import os
import re
import tempfile
import threading
from types import TracebackType

_STDERR = 2
_HEAD = rb"\n?thread '[^\n]*panicked at [^\n]*\n"
# A note follows only the first panic of a process, a trace where RUST_BACKTRACE is set.
_REST = rb"(?:stack backtrace:\n(?: [^\n]*\n)*)?(?:note: [^\n]*RUST_BACKTRACE=[^\n]*\n)?"


def is_panic(error: BaseException) -> bool:
    """Return whether Rust code panicked: no Exception, so that it ends a program of PyO3's own."""
    return type(error).__name__ == "PanicException"


class _Diverted:
    """Standard error while calls that may panic are under way, in however many threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0
        self.real = -1
        self.file = -1
        self.messages: list[bytes] = []

    def begin(self) -> None:
        with self.lock:
            if self.calls == 0:
                self.real = os.dup(_STDERR)
                if self.file < 0:
                    self.file = _unnamed_file()
                try:
                    os.dup2(self.file, _STDERR)
                    self.calls = 1
                except BaseException:  # Ctrl-C
                    self._restore()
                    raise
            else:
                self.calls += 1

    def end(self) -> None:
        with self.lock:
            self.calls -= 1
            if self.calls:
                return
            self._restore()
            if size := os.lseek(self.file, 0, os.SEEK_END):
                self._give_back(size)

    def _restore(self) -> None:
        self.calls = 0
        os.dup2(self.real, _STDERR)
        os.close(self.real)

    def _give_back(self, size: int) -> None:
        """Write what is no panic's to standard error, where other threads meant it to be."""
        os.lseek(self.file, 0, os.SEEK_SET)
        text = os.read(self.file, size)
        os.lseek(self.file, 0, os.SEEK_SET)
        os.ftruncate(self.file, 0)
        for message in self.messages:
            text = re.sub(_HEAD + re.escape(message) + rb"\n" + _REST, b"", text, count=1)
        self.messages.clear()
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(_STDERR, text) :]

    def after_fork(self) -> None:
        """Begin anew in a child, whose other threads are gone; the file is the parent's."""
        if self.calls:
            self._restore()
        if self.file >= 0:
            os.close(self.file)
        self.__init__()  # type: ignore[misc]


_diverted = _Diverted()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_diverted.after_fork)


class panics_unwritten:  # noqa: N801 - a context manager, quicker than one made of a generator: it is entered for each token
    """Within it a panic of Rust code writes no lines; it is raised as ever. RUST_BACKTRACE=full shows them."""

    def __enter__(self) -> None:
        self._begun = os.environ.get("RUST_BACKTRACE") != "full"
        if self._begun:
            try:
                _diverted.begin()
            except OSError:  # standard error is closed, or there are no more files
                self._begun = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun:
            if error is not None and is_panic(error):
                _diverted.messages.append(str(error).encode())
            _diverted.end()


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("bincompress-stderr")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
