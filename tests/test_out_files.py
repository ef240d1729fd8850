"""Is a file that cannot be written where it is asked for refused in one line, before any work?"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.forked import Forked

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems set no limit of address space")

COMMANDS = {
    "run": ["run", "STORE", "PROMPTS", "--out", "FILE"],
    "report": ["report", "STORE", "--out", "FILE"],
    "generate": ["generate", "STORE", "ab", "--prompt-cache", "FILE"],
    "chat": ["chat", "STORE", "--prompt-cache", "FILE"],
    "compress": ["compress", "STORE", "NEW", "--events", "FILE"],
    "batch": ["batch", "PROMPTS", "--events", "FILE"],
    "kernels": ["kernels", "export", "FILE"],
    "pack": ["pack", "STORE", "FILE"],
    "export": ["export", "STORE", "FILE"],
}
MAKE_FOLDERS = {"pack", "export"}
ENDINGS = {"pack": ".zip", "export": ".gguf"}
FOLDERS = {
    "train": ["train", "STORE", "NEW", "--text", "PROMPTS", "--work", "FOLDER"],
    "distill": ["distill", "STORE", "--teacher", "STORE", "--out", "NEW", "--cache-logits", "FOLDER"],
}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    (folder / "filled").write_bytes(bytes(8192))
    yield folder
    subprocess.run(["umount", folder], check=True)


def words(command: list[str], file: Path, demo: Path, tmp_path: Path) -> list[object]:
    prompts = tmp_path / "prompts"
    prompts.write_text('{"prompt": "ab"}\n')
    given: dict[str, object] = {
        "STORE": demo, "PROMPTS": prompts, "FILE": file, "FOLDER": file, "NEW": tmp_path / "new"
    }  # fmt: skip
    return [given.get(word, word) for word in command]


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("bincompress.inference.load.load", load)
    monkeypatch.setattr("bincompress.reporting.page.report_page", load)
    monkeypatch.setattr("bincompress.store.pack._check", load)
    monkeypatch.setattr("bincompress.sources.checkpoint.open_checkpoint", load)


def refused(run: Run, command: list[object], *texts: str) -> None:
    code, out, errors = run(*command)
    assert (code, out) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for text in texts:
        assert text in errors


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_in_place_of_a_file(run: Run, demo: Path, tmp_path: Path, name: str, loads_nothing: None) -> None:
    folder = tmp_path / f"folder{ENDINGS.get(name, '')}"
    folder.mkdir()
    refused(run, words(COMMANDS[name], folder, demo, tmp_path), f"{folder}: is a folder; give the name of a file")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - MAKE_FOLDERS))
def test_no_folder_for_the_file(run: Run, demo: Path, tmp_path: Path, name: str, loads_nothing: None) -> None:
    file = tmp_path / "absent" / "file"
    refused(run, words(COMMANDS[name], file, demo, tmp_path), str(file), "there is no such folder; make it first")
    assert not file.parent.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_in_place_of_the_folder(run: Run, demo: Path, tmp_path: Path, name: str, loads_nothing: None) -> None:
    (tmp_path / "file").write_text("mine")
    file = tmp_path / "file" / f"inner{ENDINGS.get(name, '')}"
    refused(run, words(COMMANDS[name], file, demo, tmp_path), str(file), "is no folder")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [*COMMANDS, *FOLDERS])
def test_a_place_that_is_read_only(
    run: Run, demo: Path, tmp_path: Path, full_disk: Path, name: str, loads_nothing: None
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True)
    file = full_disk / f"file{ENDINGS.get(name, '')}"
    command = words({**COMMANDS, **FOLDERS}[name], file, demo, tmp_path)
    refused(run, command, f"{file}: cannot be written: Read-only file system; choose a path that can be written")


@pytest.mark.parametrize("name", sorted(({*COMMANDS} - {"compress", "batch"}) | {*FOLDERS}))
def test_a_disk_that_is_full(
    run: Run, demo: Path, tmp_path: Path, full_disk: Path, name: str, loads_nothing: None
) -> None:
    file = full_disk / f"file{ENDINGS.get(name, '')}"
    command = words({**COMMANDS, **FOLDERS}[name], file, demo, tmp_path)
    refused(run, command, f"{file}: cannot be written: No space left on device; free some space")
    assert [path.name for path in full_disk.iterdir()] == ["filled"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_in_place_of_a_working_folder(run: Run, demo: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    refused(run, words(FOLDERS[name], file, demo, tmp_path), f"{file}: is no folder; give another path")
    refused(run, words(FOLDERS[name], file / "inner", demo, tmp_path), "is no folder")
    assert file.read_text() == "mine"


def test_events_on_a_full_disk_stop_nothing(
    run: Run, tiny_model: Path, tmp_path: Path, full_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, _, _ = run("compress", tiny_model, tmp_path / "new", "--events", full_disk / "events")
    assert code == 0
    assert "events: cannot be written: No space left on device; the run goes on without it" in caplog.text


@pytest.mark.parametrize("name", ["kernels", "export"])
def test_what_others_wrote_is_not_replaced(run: Run, demo: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / f"mine{ENDINGS.get(name, '')}"
    file.write_text("GGML, but not quite")
    more = ["--overwrite"] if name == "export" else []
    refused(run, [*words(COMMANDS[name], file, demo, tmp_path), *more], str(file), "nothing was changed")
    assert file.read_text() == "GGML, but not quite"


def test_a_disk_that_fills_under_a_prompt_cache(run: Run, demo: Path, full_disk: Path) -> None:
    (full_disk / "filled").write_bytes(bytes(4096))
    file = full_disk / "cache"
    code, _, errors = run("generate", demo, "ab", "--max-tokens", 3, "--prompt-cache", file)
    assert code == 2
    assert errors.endswith(
        f"error: {file}: the prompt cache cannot be written: No space left on device; free some space\n"
    )
    assert [path.name for path in full_disk.iterdir()] == ["filled"]


@on_linux
@pytest.mark.parametrize("option", ["-v", "-d"])
@pytest.mark.parametrize("kbytes", [30_000, 80_000])
def test_a_memory_limit_below_what_the_program_takes(option: str, kbytes: int, demo: Path) -> None:
    for command in ("generate", "compress"):
        line = f"ulimit {option} {kbytes}; exec '{sys.executable}' -m bincompress {command} '{demo}' ab"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: the memory limit is too small: `ulimit {option}` allows ")
        assert done.stderr.endswith(f"to run a small model; raise it (`ulimit {option} unlimited`)\n")
        assert done.stderr.count("\n") == 1


@on_linux
def test_a_memory_limit_that_is_met_on_the_way(demo: Path, forked: Forked) -> None:
    # 60 MB more than is in use then: the model's arena of 128 MB has no place.
    code = (
        "import resource, sys, psutil\n"
        "from bincompress import cli\n"
        "from bincompress.inference import load\n"
        "load.check_memory = lambda *arguments: None\n"
        "now = psutil.Process().memory_info().vms\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + (60 << 20), resource.RLIM_INFINITY))\n"
        "sys.argv = ['bincompress', *sys.argv[1:]]\n"
        "cli.main()"
    )
    done = forked("generate", demo, "ab", "--max-tokens", 2, code=code)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the memory limit is too small: `ulimit -v` allows ")
    assert done.stderr.count("\n") == 1


@on_linux
def test_help_needs_little_memory() -> None:
    line = f"ulimit -v 110000; exec '{sys.executable}' -m bincompress generate --help"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--max-tokens" in done.stdout


def test_a_home_that_no_shell_has_read(
    run: Run, demo: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = tmp_path / "models.toml"
    manifest.write_text(f'[[model]]\nsource = "{tiny_model}"\nstore = "~/store"\n')
    for command in (
        ("compress", tiny_model, "~/store"),
        ("batch", manifest),
        ("export", demo, "~/exported"),
        ("pack", demo, "~/packed.zip"),
        ("report", demo, "--out", "~/report.html"),
    ):
        refused(run, list(command), "~ is a home folder only where a shell reads it")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "models.toml"}
