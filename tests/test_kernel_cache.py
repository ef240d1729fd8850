"""Where compiled kernels are kept, whose folders are trusted, what changes their key, and what happens without them."""

import logging
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest

from cpu_kernels.jit import kernel_cache, numba_settings
from cpu_kernels.jit.numba_settings import code_settings

ROOT = Path(__file__).parents[1]
NOBODY = 54321
as_root = pytest.mark.skipif(getattr(os, "getuid", lambda: 1)() != 0, reason="needs root, to give files to others")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home and a folder for temporary files of this test; what was found before is forgotten."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("BINCOMPRESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(kernel_cache, "_said", set())
    kernel_cache.cache_folder.cache_clear()
    yield tmp_path
    kernel_cache.cache_folder.cache_clear()


def found(name: str, places: Path) -> bool:
    kernel_cache.cache_folder.cache_clear()
    folder = kernel_cache.cache_folder()
    return folder is not None and folder.is_relative_to(places / name)


def shared(places: Path) -> Path:
    return places / "tmp" / f"bincompress-{os.getuid()}"


def test_the_users_cache_folder_comes_first_and_is_private(places: Path) -> None:
    assert found("home/.cache/bincompress", places)
    folder = kernel_cache.cache_folder()
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_a_home_that_is_no_folder_leaves_the_temporary_one(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null/home")
    assert found("tmp", places)
    assert stat.S_IMODE(shared(places).stat().st_mode) == 0o700


def test_a_home_that_is_no_whole_path_is_not_used(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    monkeypatch.setenv("HOME", "relative")
    assert found("tmp", places)
    assert not (places / "relative").exists()


def test_neither_home_nor_an_entry_for_the_user(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert found("tmp", places)


def test_no_folder_at_all_is_said_once(
    places: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with caplog.at_level(logging.WARNING, "cpu_kernels"):
        assert not kernel_cache.cache_is_kept()
        kernel_cache.cache_folder.cache_clear()
        assert kernel_cache.kernel_folder("some-kernel") is None
    (record,) = caplog.records
    assert "/dev/null/home/.cache/bincompress (Not a directory)" in record.getMessage()


@pytest.mark.parametrize("rights", [0o777, 0o1777, 0o770, 0o755])
def test_a_temporary_folder_that_others_may_enter_is_not_used(
    places: Path, monkeypatch: pytest.MonkeyPatch, rights: int
) -> None:
    monkeypatch.setenv("HOME", "/dev/null/home")
    shared(places).mkdir()
    shared(places).chmod(rights)
    assert not found("tmp", places)
    shared(places).chmod(0o700)
    assert found("tmp", places)


def test_a_link_in_the_place_of_the_temporary_folder_is_not_followed(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/dev/null/home")
    (places / "elsewhere").mkdir(mode=0o700)
    shared(places).symlink_to(places / "elsewhere")
    assert not kernel_cache.cache_is_kept()


@as_root
@pytest.mark.parametrize("below", ["", "kernels"])
def test_a_temporary_folder_of_another_user_is_not_used(
    places: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    monkeypatch.setenv("HOME", "/dev/null/home")
    assert found("tmp", places)
    folder = kernel_cache.cache_folder()
    assert folder is not None
    os.chown(folder if below else folder.parent, NOBODY, NOBODY)
    assert not found("tmp", places)


@as_root
def test_a_home_with_another_users_cache_leaves_the_temporary_folder(places: Path) -> None:
    assert found("home", places)
    os.chown(places / "home" / ".cache" / "bincompress", NOBODY, NOBODY)
    assert found("tmp", places)


def test_kernels_that_others_could_write_are_not_loaded(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BINCOMPRESS_CACHE", str(places / "chosen"))
    assert found("chosen", places)
    folder = kernel_cache.cache_folder()
    assert folder is not None
    folder.chmod(0o722)
    kernel_cache.cache_folder.cache_clear()
    assert not kernel_cache.cache_is_kept()


def test_a_folder_that_cannot_be_locked_stops_nothing(
    places: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = kernel_cache.kernel_folder("some-kernel")
    assert folder is not None
    (folder / "lock").mkdir()  # no file can be opened under this name
    with kernel_cache.kernel_lock(folder) as lock:
        lock()
    assert "compiled kernels are not kept in" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "changes"),
    [
        ("OPT", 0, True), ("BOUNDSCHECK", 1, True), ("LOOP_VECTORIZE", 0, True), ("ENABLE_AVX", 0, True),
        ("DEBUGINFO_DEFAULT", 1, True), ("LLVM_REFPRUNE_PASS", 0, True), ("CPU_NAME", "generic", True),
        ("A_SETTING_OF_LATER", 1, True), ("NUMBA_NUM_THREADS", 77, False), ("CACHE_DIR", "/x", False),
        ("THREADING_LAYER", "omp", False), ("DUMP_LLVM", 1, False), ("COLOR_SCHEME", "dark_bg", False),
    ],
)  # fmt: skip
def test_the_key_covers_the_settings_that_change_code(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, changes: bool
) -> None:
    before = kernel_cache._identity.__wrapped__()
    told = code_settings()
    monkeypatch.setattr(numba.config, name, value, raising=False)
    assert (code_settings() != told) is changes
    assert (kernel_cache._identity.__wrapped__() != before) is changes


USE = """
import numpy as np
from cpu_kernels.errors import KernelError
from cpu_kernels.jit.compiler import announce
from cpu_kernels.matmul.dense import multiply_bfloat16
from cpu_kernels.parallel.workers import Workers
try:
    with announce(print):
        print(multiply_bfloat16(np.full((1, 2), 0x3F80, np.uint16), np.ones((1, 2), np.float32), Workers(1))[0, 0])
except KernelError as error:
    print("error:", error)
"""


def used(tmp_path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BINCOMPRESS_CACHE": str(tmp_path / "cache"), **settings}
    return subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"NUMBA_DISABLE_JIT": "1"}, "error: NUMBA_DISABLE_JIT is set"),
        ({"NUMBA_OPT": "7"}, "error: Environment variable 'NUMBA_OPT' is defined"),
        ({"NUMBA_CPU_NAME": "pentium", "NUMBA_CPU_FEATURES": ""}, "error: NUMBA_CPU_NAME=pentium"),
        ({"NUMBA_CPU_FEATURES": "+amx-tile,+prefetchi,+sm4,+xop"}, "error: NUMBA_CPU_NAME= NUMBA_CPU_FEATURES="),
    ],
)
def test_settings_that_cannot_work_get_one_line(tmp_path: Path, settings: dict[str, str], told: str) -> None:
    done = used(tmp_path, **settings)
    assert done.returncode == 0
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert line.startswith(told)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"NUMBA_ENABLE_AVX": "0"}, {"NUMBA_OPT": "0"}, {"NUMBA_NUM_THREADS": "999"}])
def test_other_settings_work_and_say_nothing(tmp_path: Path, settings: dict[str, str]) -> None:
    done = used(tmp_path, **settings)
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", ["bfloat16_rows", "2.0"])


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_a_compilation_and_a_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    for _ in range(2):
        done = used(tmp_path)
        assert (done.returncode, done.stdout.split()) == (0, ["bfloat16_rows", "2.0"])
        (line,) = done.stderr.splitlines()
        assert line.startswith("kernels are compiled anew by every process")
        assert str(tmp_path / "cache") in line


def test_optimized_bytecode_has_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told = code_settings()
    monkeypatch.setattr(numba_settings, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    assert code_settings() == ["PYTHONOPTIMIZE=2", *told]
