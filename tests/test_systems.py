"""macOS and Windows, simulated by removing what they lack: the same commands give the same bytes and answers."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bincompress.process import systems
from tests import other_systems

ROOT = Path(__file__).parents[1]
SYSTEMS = ("macos", "windows")

# Every command in one process, as each would import Numba again. What they print is compared line by line.
_COMMANDS = """
import contextlib, io, json, sys
from pathlib import Path
from bincompress import cli
model, folder = Path(sys.argv[1]), Path(sys.argv[2])
text, prompts = folder / "text.txt", folder / "prompts.jsonl"
text.write_text("the kernel writes a page to the disk\\n" * 9, "utf-8")
prompts.write_text('{"prompt": "ab"}\\n{"prompt": "cd"}\\n', "utf-8")
store = folder / "store"
commands = [
    ["compress", model, store, "--workers", "2"],
    ["compress", model, store, "--overwrite"],
    ["verify", store],
    ["evaluate", store, "--text", text, "--context", "32", "--json"],
    ["generate", store, "ab", "--max-tokens", "5", "--temperature", "0"],
    ["run", store, prompts, "--out", folder / "answers.jsonl", "--max-tokens", "4"],
    ["pack", store, folder / "packed.zip"],
    ["pack", store, folder / "packed.zip", "--overwrite"],
    ["verify", folder / "packed.zip"],
    ["unpack", folder / "packed.zip", folder / "back"],
    ["export", store, folder / "exported"],
]
found = []
for command in commands:
    sys.argv = ["bincompress", "--debug", *map(str, command)]
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed):
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
    found.append([command[0], code or 0, printed.getvalue()])
print(json.dumps(found))
"""


def _run(system: str | None, model: Path, folder: Path) -> tuple[list[Any], str]:
    folder.mkdir()
    (folder / "start").mkdir()
    paths = [str(folder / "start"), str(ROOT / "tests"), str(ROOT)]
    if system:
        start = f"import other_systems\nother_systems.become({system!r})\n"
        (folder / "start" / "sitecustomize.py").write_text(start)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    code = [sys.executable, "-c", _COMMANDS, str(model), str(folder)]
    done = subprocess.run(code, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def here(letters_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("system") / "here"
    found, errors = _run(None, letters_model, folder)
    assert [code for _, code, _ in found] == [0] * len(found), errors
    return folder, found


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_commands_give_the_same_bytes_and_answers(
    system: str,
    letters_model: Path,
    here: tuple[Path, list[Any]],
    tree: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    folder, expected = here
    found, errors = _run(system, letters_model, tmp_path / system)
    assert [(name, code) for name, code, _ in found] == [(name, 0) for name, _, _ in expected], errors

    def lines(commands: list[Any], place: Path) -> list[tuple[str, str]]:
        told = ("evaluate", "generate")  # others print times
        return [(name, text.replace(str(place), "")) for name, _, text in commands if name in told]

    same = [(name, _untimed(text)) for name, text in lines(found, tmp_path / system)]
    assert same == [(name, _untimed(text)) for name, text in lines(expected, folder)]
    for part in ("store", "back", "exported"):
        kept = tree(folder / part)
        assert tree(tmp_path / system / part) == kept
        forbidden = set('<>:"|?*\\')
        assert not [name for name in kept if forbidden & set(name) or name.endswith((" ", "."))]
    assert (tmp_path / system / "answers.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()


def _untimed(text: str) -> Any:
    if not text.startswith("{"):
        return text
    return {name: value for name, value in json.loads(text).items() if "second" not in name and name != "store"}


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
_LOOKED_FOR = [ROOT / "bincompress" / "process" / name for name in ("machine.py", "interrupts.py", "blas.py")] + [
    ROOT / "cpu_kernels" / name for name in ("jit/kernel_cache.py", "matmul/aligned_memory.py", "parallel/workers.py")
]


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
