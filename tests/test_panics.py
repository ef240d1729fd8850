"""Does a panic of the tokenizers library leave our one line alone on standard error, and others' lines as they are?"""

import os
import threading
from typing import Any

import pytest

from bincompress.model.errors import TokenizerError
from bincompress.model.tokenizer import load_tokenizer
from bincompress.process.panics import panics_unwritten
from tests.test_fuzz_findings import tokenizer

# Its regular expressions give up after so many tries, with a panic.
PANICS: dict[str, Any] = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
Captured = pytest.CaptureFixture[str]


class PanicException(BaseException):
    """As the library raises it."""


HEAD = "thread '<unnamed>' panicked at src/lib.rs:1:2:"
NOTE = "note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n"
TRACE = """stack backtrace:
   0: core::panicking::panic_fmt
             at ./csu/libc-start.c:360:3
note: Some details are omitted, run with `RUST_BACKTRACE=full` for a verbose backtrace.
"""


def panic(message: str, head: str = HEAD, rest: str = NOTE, before: str = "") -> None:
    os.write(2, f"{before}\n{head}\n{message}\n{rest}".encode())
    raise PanicException(message)


def test_a_panic_of_the_library_writes_nothing(capfd: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUST_BACKTRACE", "0")  # a trace takes seconds
    found = load_tokenizer(tokenizer(pre_tokenizer=PANICS))
    for _ in range(2):  # the library's note follows the first panic of a process alone
        with pytest.raises(TokenizerError, match="limit"):
            found.encode("x" * 40)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("RUST_BACKTRACE", "full")
    with pytest.raises(PanicException), panics_unwritten():
        panic("mine")
    assert "panicked at" in capfd.readouterr().err


@pytest.mark.parametrize("head", [HEAD, "thread 'main' (7) panicked at a b.rs:"])
@pytest.mark.parametrize("rest", [NOTE, "", TRACE])
def test_the_lines_of_others_are_kept(capfd: Captured, monkeypatch: pytest.MonkeyPatch, head: str, rest: str) -> None:
    monkeypatch.setenv("RUST_BACKTRACE", "1")
    with pytest.raises(PanicException), panics_unwritten():
        panic("two\nlines [of it]", head, rest, before="before\n")
    with panics_unwritten():
        os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_calls_in_several_threads(capfd: Captured) -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with panics_unwritten():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    with pytest.raises(PanicException), panics_unwritten():
        panic("mine")
    os.write(2, b"while another call is under way\n")
    if (child := os.fork()) == 0:
        os.write(2, b"a child's\n")  # which has no such call
        os._exit(0)
    os.waitpid(child, 0)
    leave.set()
    thread.join()
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "a child's\nwhile another call is under way\nlater\n"


def test_standard_error_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(number: int) -> int:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("os.dup", no)
    with pytest.raises(ZeroDivisionError), panics_unwritten():
        _ = 1 / 0
