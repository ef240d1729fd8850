"""Standard streams that are closed, full or of another encoding."""

import codecs
import contextlib
import os
import sys
from types import FrameType, TracebackType

from bincompress.errors import BincompressError

_WRITERS = (
    "click.utils",
    "click._compat",
    "click._termui_impl",
    "tqdm.std",
    "tqdm.utils",
    "bincompress.process.streams",
)
_told = False


def prepare() -> None:
    """Keep closed streams' numbers from files opened later, and let no character stop the program."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:  # the libraries that write progress expect one
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
    codecs.register_error("bincompress", _escaped)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="bincompress" if stream is sys.stdout else "backslashreplace")  # type: ignore[union-attr]


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write what an encoding lacks as \\uXXXX, and say so once."""
    global _told
    if not _told and isinstance(error, UnicodeEncodeError):
        _told = True
        print(
            f"note: standard output is {error.encoding}, which lacks some of the characters: they are written as "
            "\\uXXXX; PYTHONIOENCODING=utf-8 writes them all",
            file=sys.stderr,
        )
    return codecs.backslashreplace_errors(error)


def failed_to_write(error: BaseException) -> bool:
    """Return whether an error comes from writing to a standard stream."""
    if not isinstance(error, OSError | ValueError):
        return False
    frame: FrameType | None = None
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
    return frame is not None and frame.f_globals.get("__name__") in _WRITERS


def flush() -> None:
    """Write what is still held back, so that a full disk is told of before the exit code is decided."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def give_up() -> None:
    """Let the interpreter's last flush write into nothing: it would complain, and change the exit code."""
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.close(nothing)


def read_input(what: str) -> str:
    """Return standard input as text; raises BincompressError where it is closed or not UTF-8."""
    if sys.stdin is None:
        raise BincompressError(f"{what} is to come from standard input, which is closed; give it as an argument")
    return decoded(sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read(), what)


def read_line(what: str) -> str:
    """Return the next line of standard input, empty at its end; raises BincompressError as `read_input`."""
    if sys.stdin is None:
        raise BincompressError(f"{what} is to come from standard input, which is closed; run it in a terminal")
    return decoded(sys.stdin.buffer.readline() if hasattr(sys.stdin, "buffer") else sys.stdin.readline(), what)


def decoded(content: bytes | str, what: str) -> str:
    """Return UTF-8 text; raises BincompressError where it is none."""
    if isinstance(content, str):
        return content
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BincompressError(
            f"{what}: not UTF-8 text: byte {content[error.start]:#04x} at place {error.start}; convert it "
            "(iconv -t UTF-8)"
        ) from None
