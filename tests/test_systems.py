"""macOS and Windows, simulated by removing what they lack: the same commands give the same bytes and answers."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.inference import constraint, grammar_trial
from bincompress.inference.json_schema import SchemaError
from bincompress.process import systems
from tests import other_systems, system_commands
from tests.conftest import DEMO_MODEL

ROOT = Path(__file__).parents[1]
SYSTEMS = ("macos", "windows")

# What has no times in it.
_TOLD = ("evaluate", "generate", "serve")


def _start(system: str, model: Path, folder: Path) -> subprocess.Popen[str]:
    """Start the commands in a process that has what a system has."""
    (folder / "start").mkdir(parents=True)
    paths = [str(folder / "start"), str(ROOT / "tests"), str(ROOT)]
    start = f"import other_systems\nother_systems.become({system!r})\n"
    (folder / "start" / "sitecustomize.py").write_text(start)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    code = [sys.executable, str(ROOT / "tests" / "system_commands.py"), str(model), str(folder)]
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("here")
    found = system_commands.run_all(DEMO_MODEL, folder)
    assert [(name, code) for name, code, _ in found if code] == []
    return folder, found


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_commands_give_the_same_bytes_and_answers(
    system: str,
    here: tuple[Path, list[Any]],
    tree: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    folder, expected = here
    with _start(system, DEMO_MODEL, tmp_path / system) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    found = json.loads(output.splitlines()[-1])
    assert [(name, code) for name, code, _ in found] == [(name, 0) for name, _, _ in expected], errors
    there = tmp_path / system
    told = [_told(commands, place) for commands, place in ((found, there), (expected, folder))]
    assert told[0] == told[1]
    for part in ("store", "back", "exported"):
        kept = tree(folder / part)
        assert tree(there / part) == kept
        forbidden = set('<>:"|?*\\')
        assert not [name for name in kept if forbidden & set(name) or name.endswith((" ", "."))]
    for file in ("answers.jsonl", "model.gguf"):
        assert (there / file).read_bytes() == (folder / file).read_bytes()
    left = [name for name in tree(there) if "partial" in name or name.endswith(".tmp")]
    assert not left


def _told(commands: list[Any], place: Path) -> list[tuple[str, str]]:
    lines = [(name, text.replace(str(place), "").splitlines()) for name, _, text in commands if name in _TOLD]
    return [(name, "\n".join(line for line in text if "seconds" not in line)) for name, text in lines]


def test_names_that_a_system_lacks_are_used_where_they_are_looked_for() -> None:
    """Everywhere else such a name would end the program on that system, perhaps in a command that no test runs."""
    one_place = {ROOT / "bincompress" / "process" / "systems.py", *_LOOKED_FOR}
    lacks = [part for system in SYSTEMS for part in other_systems.LACKS[system].items()]
    lacked = {f"{part}.{name}" for part, names in lacks for name in names}
    absent = set.union(*other_systems.ABSENT.values())
    found = []
    for package in ("bincompress", "cpu_kernels", "jobs"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if file in one_place:
                continue
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                names: list[str] = []
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    names = [f"{node.value.id}.{node.attr}"]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [str(node.module)]
                found += [f"{file.relative_to(ROOT)}: {name}" for name in names if name in lacked | absent]
    assert not found


# Which ask whether the name is there before they use it, and say beside it where it is not.
_LOOKED_FOR = [
    ROOT / "bincompress" / name
    for name in ("process/machine.py", "process/interrupts.py", "process/blas.py", "inference/grammar_trial.py")
] + [ROOT / "cpu_kernels" / name for name in ("jit/kernel_cache.py", "matmul/aligned_memory.py", "parallel/workers.py")]


@pytest.mark.parametrize("missing", [None, "pread"])
def test_parts_of_a_file_are_read_with_and_without_pread(
    missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing:
        monkeypatch.delattr(os, missing)
    file = tmp_path / "file"
    file.write_bytes(bytes(range(100)))
    descriptor = systems.open_to_read(file)
    try:
        assert systems.read_at(descriptor, 10, 90) == bytes(range(90, 100))
        assert systems.read_at(descriptor, 10, 95) == bytes(range(95, 100))
        assert systems.read_at(descriptor, 4, 0) == bytes(range(4))
    finally:
        os.close(descriptor)


def test_a_grammar_that_takes_memory_is_stopped_where_the_system_bounds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_trial, "MEMORY_BYTES", 1)
    monkeypatch.setattr(constraint, "_LOOK_SECONDS", 0.01)
    with pytest.raises(SchemaError, match="too much time, memory or depth"):
        constraint._try_out("start: /a/")


def test_only_pages_of_libraries_that_can_be_read_again_are_forgotten() -> None:
    def mapping(begin: int, rights: str, anonymous: int, name: str) -> str:
        return f"{begin:x}-{begin + 4096:x} {rights} 00000000 08:01 7 {name}\nRss: 4 kB\nAnonymous: {anonymous} kB\n"

    smaps = (
        mapping(0x1000, "r-xp", 0, "                   /usr/lib/libllvmlite.so")
        + mapping(0x3000, "rw-p", 0, "                   /usr/lib/libllvmlite.so")  # writable
        + mapping(0x5000, "r--p", 4, "                   /usr/lib/libm.so.6")  # has a page of its own
        + mapping(0x7000, "r--s", 0, "                   /usr/lib/libm.so.6")  # shared with others
        + mapping(0x9000, "r--p", 0, "                   /models/model.zip")
        + mapping(0xB000, "r--p", 0, "                   /usr/lib/libm.so.6")
        + mapping(0xD000, "r-xp", 0, "")
    )
    assert systems._read_only_libraries(smaps) == [(0x1000, 0x2000), (0xB000, 0xC000)]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_libraries_whose_pages_are_forgotten_are_read_again() -> None:
    def held() -> int:
        wanted = systems._read_only_libraries(smaps := Path("/proc/self/smaps").read_text("utf-8"))
        starts = {f"{begin:x}-{end:x}" for begin, end in wanted}
        found, counted = 0, False
        for line in smaps.splitlines():
            if "-" in (first := line.split()[0]):
                counted = first in starts
            elif counted and line.startswith("Rss:"):
                found += int(line.split()[1])
        return found

    matrix = np.random.default_rng(0).random((50, 50))
    expected, before = np.linalg.inv(matrix), held()
    systems.forget_library_pages()
    assert held() < before / 2
    np.testing.assert_array_equal(np.linalg.inv(matrix), expected)
