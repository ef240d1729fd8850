"""Do the examples do what they say, on the small model that ships with the package?"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import DEMO_MODEL
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
_LONGEST = 40


Example = Callable[..., str]


@pytest.fixture(scope="module")
def run(forked: Forked) -> Example:
    """Returns a function that runs an example as a user does, and returns what it prints."""

    def call(name: str, *arguments: object) -> str:
        done = forked(*arguments, code=(ROOT / "examples" / name).read_text("utf-8"), cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_every_example_is_short_and_tested_here() -> None:
    assert EXAMPLES == ["calibrate_and_choose_bits.py", "compress_and_write.py", "evaluate_store.py"]
    for name in EXAMPLES:
        lines = (ROOT / "examples" / name).read_text("utf-8").splitlines()
        assert len(lines) < _LONGEST, f"{name} has {len(lines)} lines"


@pytest.fixture(scope="module")
def written(run: Example, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the first example prints, and its store."""
    store = tmp_path_factory.mktemp("examples") / "store"
    return run("compress_and_write.py", DEMO_MODEL, store), store


@pytest.mark.slow
def test_compress_and_write(run: Example, written: tuple[str, Path]) -> None:
    out, store = written
    assert f"{store}: 38 tensors done, 0 already complete" in out
    text = out.split("already complete\n")[1]
    assert len(text.split()) > 10
    assert "38 already complete" in run("compress_and_write.py", DEMO_MODEL, store)


@pytest.mark.slow
def test_evaluate_store(run: Example, written: tuple[str, Path]) -> None:
    out = run("evaluate_store.py", written[1], DEMO_MODEL, ROOT / "docs" / "format.md")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["8 bits", "6 bits"]
    for row in rows[2:]:
        unquantized, packed, ratio = map(float, row[1:4])
        assert 1 < unquantized < packed
        assert ratio == pytest.approx(packed / unquantized, rel=1e-2)
    assert float(rows[2][3]) < float(rows[3][3])  # eight bits of activations predict better than six


@pytest.mark.slow
def test_calibrate_and_choose_bits(run: Example, tmp_path: Path) -> None:
    out = run("calibrate_and_choose_bits.py", DEMO_MODEL, ROOT / "docs" / "methods.md", tmp_path, 8)
    found = re.search(r"38 tensors done, ([\d.]+) stored bits", out)
    assert found is not None
    assert 2.0 < float(found[1]) <= 2.25
