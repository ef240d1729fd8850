"""Does everything that was started end with its parent, however that ends, and with a true word and exit code?"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from tests.conftest import Run
from tests.gates import end_at_once, wait_for

pytestmark = pytest.mark.slow  # processes that start others

ROOT = Path(__file__).parents[1]
BOUND = 30  # seconds in which everything has to have ended
KEPT = "completed work is kept: run the same command again to resume"


class Command:
    """`compress --workers 2` whose jobs wait, in a process of its own."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.folder = folder / "held"
        self.folder.mkdir()
        self.store = folder / "store"
        code = "import sys; from tests.gates import held_command; held_command(*sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, self.folder, "compress", model, self.store, *options],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def wait_until_two_work(self) -> list[psutil.Process]:
        wait_for(lambda: len(list(self.folder.glob("*.pid"))) == 2)
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def wait_until_told(self, expected: str) -> None:
        """Read standard error until it says this; fail where it ends before."""
        told = ""
        while expected not in told:
            line = self.process.stderr.readline()  # type: ignore[union-attr]
            assert line, f"ended without saying {expected!r}, but:\n{told}"
            told += line

    def release(self) -> None:
        (self.folder / "release").touch()

    def end(self) -> tuple[int, str]:
        """Return the exit code and what is on standard error, which ends when nobody holds it open any more."""
        _, errors = self.process.communicate(timeout=BOUND)
        lines = [line for line in errors.splitlines(keepends=True) if not line.startswith("compiling kernels")]
        return self.process.returncode, "".join(lines)


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path) -> Iterator[Command]:
    started = Command(tiny_model, tmp_path, "--workers", "2")
    yield started
    started.release()
    started.process.kill()
    started.process.wait()


def gone(processes: list[psutil.Process]) -> bool:
    return not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, f"ended by SIGTERM; {KEPT}"),
        (signal.SIGHUP, 129, f"ended by SIGHUP; {KEPT}"),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_no_process_outlives_its_parent(command: Command, number: int, code: int, line: str) -> None:
    started = command.wait_until_two_work()
    assert len(started) >= 2
    command.process.send_signal(number)
    found, errors = command.end()
    assert found == code
    if line:
        assert errors.strip() == line
    wait_for(lambda: gone(started))


def test_the_first_interrupt_waits_for_what_runs(command: Command, tiny_model: Path) -> None:
    started = command.wait_until_two_work()
    command.process.send_signal(signal.SIGINT)
    command.wait_until_told("interrupt again to end at once")
    command.release()
    code, errors = command.end()
    assert (code, errors.strip()) == (130, f"interrupted; {KEPT}")
    wait_for(lambda: gone(started))
    assert len(list((command.store / "tensors").iterdir())) >= 2


def test_the_second_interrupt_ends_at_once(command: Command) -> None:
    started = command.wait_until_two_work()
    command.process.send_signal(signal.SIGINT)
    command.wait_until_told("interrupt again to end at once")
    command.process.send_signal(signal.SIGINT)
    code, errors = command.end()
    assert (code, errors.strip()) == (130, f"interrupted; {KEPT}")
    wait_for(lambda: gone(started))


SCRIPT = """
from pathlib import Path
import functools, sys
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.compression.runner import run_local
from bincompress.sources.checkpoint import open_checkpoint
print("begun")
plan = make_plan(open_checkpoint(Path(sys.argv[1])), load_recipe(None, {}))
print(compress(plan, sys.argv[2], runner=functools.partial(run_local, workers=2)).complete)
"""


def test_a_script_that_does_not_ask_for_main(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tiny_model, tmp_path / "store"], cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=BOUND * 2, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("begun\nTrue\n", "", 0)


def test_processes_that_cannot_begin_are_no_tensors_fault(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bincompress.compression.runner._begin", end_at_once)
    code, _, errors = run("compress", tiny_model, tmp_path / "store", "--workers", 2)
    assert (code, errors.count("\n")) == (2, 1)
    assert "error: the worker processes end as soon as they begin" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_compiling_helper_ends_with_its_parent(tmp_path: Path, number: int) -> None:
    code = (
        "import sys\nfrom bincompress.inference.warmup import compiling_ahead\n"
        "with compiling_ahead() as ahead:\n    ahead(); print('begun', flush=True); sys.stdin.read()"
    )
    parent: subprocess.Popen[Any] = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "BINCOMPRESS_CACHE": str(tmp_path)},
    )  # fmt: skip
    output: IO[bytes] = parent.stdout  # type: ignore[assignment]
    assert output.readline() == b"begun\n"
    helpers = psutil.Process(parent.pid).children()
    assert len(helpers) == (1 if (os.cpu_count() or 1) > 1 else 0)
    parent.send_signal(number)
    parent.communicate(timeout=BOUND)  # which ends when nobody holds the pipes
    wait_for(lambda: gone(helpers))
