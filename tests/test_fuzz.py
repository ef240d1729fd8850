"""Does a short run of the fuzzer find nothing, and would it find something?"""

import multiprocessing
import time
from pathlib import Path

import pytest

from tests import fuzz
from tests.fuzz_mutations import Files
from tests.fuzz_targets import KINDS, Kind, change, try_one

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", list(KINDS))
def test_two_hundred_inputs(kind: str) -> None:
    found = fuzz.fuzz(kind, 200, seed=7)
    assert found.findings == []
    assert found.inputs == 200
    assert found.outcomes["refused"] > 20  # else the changes would change nothing


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_not_changed_is_used(kind: str, tmp_path: Path) -> None:
    """A check that refuses what is sound would make every change look soundly refused."""
    for number, files in enumerate(KINDS[kind].seeds(tmp_path / "seeds")):
        assert try_one(kind, files, tmp_path / str(number)) == "accepted"


@pytest.mark.parametrize("kind", ["tokenizer", "template"])
def test_the_same_seed_gives_the_same_inputs(kind: str, tmp_path: Path) -> None:
    seeds = KINDS[kind].seeds(tmp_path)
    made = [change(kind, seeds, 3, number) for number in range(20)]
    assert made == [change(kind, seeds, 3, number) for number in range(20)]
    assert made != [change(kind, seeds, 4, number) for number in range(20)]


def test_what_is_no_refusal_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def use(files: Files, folder: Path) -> None:
        raise ZeroDivisionError("of a test")

    monkeypatch.setitem(KINDS, "template", Kind(KINDS["template"].seeds, KINDS["template"].change, use))
    outcome, _ = fuzz._tried("template", {}, tmp_path, None)
    assert outcome.startswith("ZeroDivisionError: of a test (")


def test_crashes_and_hangs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(fuzz.Worker):
        """A worker whose process ends, or goes on, without a word."""

        def __init__(self, ends: bool) -> None:
            super().__init__("template", [], 0, [])
            self.process.join()
            self.pipe, self._other = multiprocessing.Pipe(duplex=False)
            self._other.send(("begin", 5, 0.0, 0))
            if ends:
                self._other.close()

    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    monkeypatch.setattr(fuzz, "WAITING", 0.2)
    begin = time.monotonic()
    [(hang, number, _, _)] = Silent(ends=False).answers()
    assert (hang, number) == ("hang: more than 0.1 s", 5)
    [(crash, number, _, _)] = Silent(ends=True).answers()
    assert (crash.startswith("crash: exit code "), number) == (True, 5)
    assert time.monotonic() - begin < 60
