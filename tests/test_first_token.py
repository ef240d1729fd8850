"""Is only what the first token needs imported and compiled, and is it compiled by more than one process?"""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.inference import warmup
from bincompress.inference.warmup import compiling_ahead
from bincompress.sources.checkpoint import open_checkpoint
from tests.conftest import DEMO_MODEL

GENERATE = """
import gc, sys
sys.argv = ["bincompress", "generate", {store!r}, "The scheduler", "--max-tokens", "2"]
from bincompress.cli import main
main()
frozen = gc.get_freeze_count()
gc.unfreeze()
from bincompress.inference.warmup import first_token_kernels
from cpu_kernels.jit.compiler import Kernel
used = [kernel for kernel in gc.get_objects() if isinstance(kernel, Kernel) and kernel._compiled]
others = [kernel.__name__ for kernel in used if kernel not in first_token_kernels()]
heavy = {{"zarr", "fsspec", "jinja2", "huggingface_hub", "safetensors", "tqdm"}}
compiling = {{"numba.np.arrayobj", "numba.np.linalg", "numba.cpython.unicode", "numba.typed.typedlist"}}
print()
print("used:", len(used))
print("frozen:", frozen > len(gc.get_objects()) / 2)
print("others:", *others)
print("imported:", *sorted(heavy & set(sys.modules)))
print("to compile:", *sorted(compiling & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("demo") / "store"
    recipe = load_recipe(None, {"groups": 8, "block": "matrix", "embeddings": "8bit"})
    assert compress(make_plan(open_checkpoint(DEMO_MODEL), recipe), str(store)).complete
    return store


@pytest.mark.slow
def test_generate_from_a_local_store_imports_no_zarr_and_uses_the_kernels_compiled_ahead(demo: Path) -> None:
    found = generated(demo)
    assert found["others"] == found["imported"] == ""
    assert int(found["used"]) > 10


@pytest.mark.slow
def test_kernels_are_loaded_without_what_compiling_them_takes(demo: Path) -> None:
    generated(demo)  # whatever is not in the cache yet is compiled here
    assert generated(demo)["to compile"] == ""


@pytest.mark.slow
def test_no_garbage_is_looked_for_among_modules_when_the_process_ends(demo: Path) -> None:
    assert generated(demo)["frozen"] == "True"


def generated(store: Path) -> dict[str, str]:
    """Return what a process that has run the model in a store tells about itself."""
    done = subprocess.run(
        [sys.executable, "-c", GENERATE.format(store=str(store))], capture_output=True, text=True, check=True
    )
    return {key: value.strip() for key, value in (line.split(":") for line in done.stdout.splitlines()[-5:])}


def test_the_process_that_compiles_ahead_ends_with_the_block() -> None:
    before = psutil.Process().children()
    with compiling_ahead() as start:
        start()
        start()
        started = [process for process in psutil.Process().children() if process not in before]
        assert len(started) == (1 if len(psutil.Process().cpu_affinity()) > 1 else 0)
    assert not [process for process in started if process.is_running()]


def test_nothing_is_compiled_ahead_where_no_cache_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "cache_is_kept", lambda: False)
    before = psutil.Process().children()
    with compiling_ahead() as start:
        start()
        assert psutil.Process().children() == before


@pytest.mark.slow
def test_what_compiles_ahead_finds_its_modules_anywhere(tmp_path: Path) -> None:
    # A file in the user's folder must not take the place of a library.
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported from the current folder')")
    script = """
import os, subprocess, sys
from bincompress.inference import warmup as ahead
from tests.conftest import DEMO_MODEL
os.chdir({folder!r})
with ahead.compiling_ahead() as start:
    start()
    for child in [c for c in __import__("psutil").Process().children()]:
        print(child.wait(), file=sys.stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", script.format(folder=str(tmp_path))], capture_output=True, text=True, check=True
    )
    assert "current folder" not in done.stderr
    assert done.stdout.split() in (["0"], ["None"], [])
