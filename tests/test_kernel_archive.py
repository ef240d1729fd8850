"""Kernels in a file: loaded elsewhere without compiling, and refused where anything about them is not right."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpu_kernels.errors import KernelError
from cpu_kernels.jit import kernel_archive
from tests.conftest import Run

ROOT = Path(__file__).parents[1]

# Two small kernels; prints which of them were compiled.
_COMPILE = (
    "import json\nfrom cpu_kernels.jit.compiler import announce\nfrom cpu_kernels.decoder.norms import gate\n"
    "from cpu_kernels.parallel.spin_wait import stop_workers\nfound = []\n"
    "with announce(found.append):\n    gate.compile(); stop_workers.compile()\nprint(json.dumps(found))\n"
)


def compiled(cache: Path, sources: Path = ROOT) -> list[str]:
    environment = {**os.environ, "BINCOMPRESS_CACHE": str(cache), "PYTHONPATH": str(sources)}
    done = subprocess.run([sys.executable, "-c", _COMPILE], capture_output=True, text=True, env=environment, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    assert compiled(folder) == ["gate", "stop_workers"]
    return next(folder.glob("kernels-*"))


@pytest.fixture
def exported(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    monkeypatch.setattr(kernel_archive, "cache_folder", lambda: cache)
    count, digest = kernel_archive.export_kernels(tmp_path / "kernels.zip")
    assert count == 2
    return tmp_path / "kernels.zip", digest


def into(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir()
    monkeypatch.setattr(kernel_archive, "cache_folder", lambda: folder)
    return folder


@pytest.mark.slow
def test_an_import_saves_compiling_in_another_place(
    cache: Path, exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    here = into(tmp_path / "other" / cache.name, monkeypatch)
    assert kernel_archive.import_kernels(*exported) == (2, 0)
    assert kernel_archive.import_kernels(*exported) == (0, 2)
    assert not list(here.rglob("*.partial"))
    # The same sources in another folder, of another time: as on another machine.
    shutil.copytree(ROOT / "cpu_kernels", tmp_path / "moved" / "cpu_kernels", copy_function=shutil.copyfile)
    assert compiled(tmp_path / "other", tmp_path / "moved") == []


def test_the_same_kernels_are_the_same_file(exported: tuple[Path, str], tmp_path: Path) -> None:
    file, digest = exported
    assert kernel_archive.export_kernels(tmp_path / "again.zip") == (2, digest)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    with zipfile.ZipFile(file) as archive:
        assert all(name == "kernels.json" or name.endswith((".nbi", ".nbc")) for name in archive.namelist())


def rewritten(file: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> str:
    with zipfile.ZipFile(file) as archive:
        entries = [change(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def told(**changes: Any) -> Callable[[str, bytes], tuple[str, bytes]]:
    def change(name: str, content: bytes) -> tuple[str, bytes]:
        return name, json.dumps({**json.loads(content), **changes}).encode() if name == "kernels.json" else content

    return change


OTHERS = {
    "CPU": "znver1 +avx2", "Python": "3.9", "Numba": "0.1", "llvmlite": "0.1", "NumPy": "1.0",
    "kernel sources": "0" * 64, "Numba settings": [],
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_kernels_of_another_kind_of_machine_are_refused_by_name(
    what: str, exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(OTHERS) == set(kernel_archive.machine())
    here = into(tmp_path / "here", monkeypatch)
    digest = rewritten(exported[0], told(**{what: OTHERS[what]}))
    with pytest.raises(KernelError, match=f"made for another {what}: "):
        kernel_archive.import_kernels(exported[0], digest)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda name, content: (f"../{name}", content), "it has an entry '../"),
        (lambda name, content: (f"/{name}", content), "it has an entry '/"),
        (lambda name, content: (name.replace(".nbi", ".py"), content), "it has an entry"),
        (lambda name, content: (name.replace("kernels.json", "gate-0123456789ab/a.nbi"), content), "expected one"),
        (lambda name, content: (name, b"[]" if name == "kernels.json" else content), "not a file of kernels that this"),
        (told(version=2), "not a file of kernels that this version reads"),
        (told(format="other"), "not a file of kernels that this version reads"),
    ],
)
def test_another_kind_of_file_is_refused(
    change: Callable[[str, bytes], tuple[str, bytes]],
    problem: str,
    exported: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = into(tmp_path / "here", monkeypatch)
    digest = rewritten(exported[0], change)
    with pytest.raises(KernelError, match=problem):
        kernel_archive.import_kernels(exported[0], digest)
    assert not list(tmp_path.glob("*.nb?"))
    assert not list(here.iterdir())


def test_one_byte_that_is_not_as_exported_is_refused(
    exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, digest = exported
    here = into(tmp_path / "here", monkeypatch)
    content = bytearray(file.read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        content[place] ^= 1
        file.write_bytes(content)
        with pytest.raises(KernelError, match=f"expected {digest}: another file than was exported"):
            kernel_archive.import_kernels(file, digest)
        content[place] ^= 1
    file.write_bytes(content[:-10])
    with pytest.raises(KernelError, match="no file of kernels"):
        kernel_archive.import_kernels(file, hashlib.sha256(content[:-10]).hexdigest())
    assert not list(here.iterdir())


def test_too_much_is_refused_before_it_is_unpacked(
    exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into(tmp_path / "here", monkeypatch)
    monkeypatch.setattr(kernel_archive, "_MOST_BYTES", 100)
    with pytest.raises(KernelError, match="more than 0 MB"):
        kernel_archive.import_kernels(*exported)


def test_commands(exported: tuple[Path, str], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    file, digest = tmp_path / "mine.zip", exported[1]
    code, output, _ = run("kernels", "export", file)
    assert (code, digest in output) == (0, True)
    into(tmp_path / "here", monkeypatch)
    # Nobody is there to say that the file is trusted.
    code, _, errors = run("kernels", "import", file)
    assert code == 2
    assert "give --sha256, as `bincompress kernels export` printed it" in errors
    code, _, errors = run("kernels", "import", file, "--sha256", "0" * 64)
    assert (code, "another file than was exported" in errors) == (2, True)
    assert not list((tmp_path / "here").iterdir())
    code, output, _ = run("kernels", "import", file, "--sha256", digest.upper(), "--json")
    assert (code, json.loads(output)["imported"]) == (0, 2)


def test_a_cache_without_kernels_is_not_exported(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    into(tmp_path / "here", monkeypatch)
    code, _, errors = run("kernels", "export", tmp_path / "kernels.zip")
    assert (code, "no kernels are compiled yet; `bincompress warmup`" in errors) == (2, True)
    assert not list(tmp_path.glob("kernels.zip"))


_WARM_THEN_RUN = """
import sys
from bincompress import cli
from cpu_kernels.jit import compiler
readied = []
ready = compiler._dispatcher
compiler._dispatcher = lambda wanted: readied.append(wanted.name()) or ready(wanted)
store, text = sys.argv[1:]
def run(*arguments):
    sys.argv = ["bincompress", "--debug", *arguments]
    cli.main()
run("warmup", store)
warm = set(readied)
run("generate", store, "ab", "--max-tokens", "3")
run("evaluate", store, "--text", text, "--context", "16")
print("LATER", sorted(set(readied) - warm))
"""


@pytest.mark.slow
def test_after_a_warmup_nothing_is_left_to_compile(letters_model: Path, tmp_path: Path, run: Run) -> None:
    assert run("compress", letters_model, tmp_path / "store")[0] == 0
    (tmp_path / "text").write_text("the kernel writes a page " * 4)
    command = [sys.executable, "-c", _WARM_THEN_RUN, str(tmp_path / "store"), str(tmp_path / "text")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "LATER []" in done.stdout, done.stdout + done.stderr
    assert "kernels compiled here, kept in" in done.stdout
