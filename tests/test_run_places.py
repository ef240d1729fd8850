"""Does a run that cannot write - a full disk, a folder without rights - say so, and keep what is complete?"""

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from bincompress.compression.run import compress
from bincompress.errors import StoreError
from bincompress.store import files
from tests.runs import Tree, plan_of, problems, run


def test_a_full_disk_stops_the_run_and_keeps_what_is_complete(
    tiny_model: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, left = tmp_path / "store", 40_000
    real = files.replacing

    class Limited:
        def __init__(self, file: BinaryIO) -> None:
            self.file = file

        def write(self, content: bytes) -> None:
            nonlocal left
            left -= memoryview(content).nbytes
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
            self.file.write(content)

    @contextlib.contextmanager
    def replacing(path: Path) -> Iterator[Limited]:
        with real(path) as file:
            yield Limited(file)

    monkeypatch.setattr(files, "replacing", replacing)
    with pytest.raises(StoreError, match=r"No space left on device; (\d+) of 21 tensors are complete: .* run the same"):
        run(tiny_model, store)
    monkeypatch.undo()
    outcome = run(tiny_model, store)
    assert outcome.unchanged > 0
    assert outcome.complete
    run(tiny_model, tmp_path / "undisturbed")
    assert tree(store) == tree(tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk(tiny_model: Path, small_disk: Path) -> None:
    with pytest.raises(StoreError, match="No space left on device"):
        run(tiny_model, small_disk / "store")
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert run(tiny_model, small_disk / "store").complete
    assert problems(small_disk / "store") == {}


def test_a_folder_that_cannot_be_written(tiny_model: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp" if Path("/tmp").is_dir() else None))
    folder.chmod(0o555)
    plan = plan_of(tiny_model)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root writes everywhere
        with pytest.raises(StoreError, match="cannot be written: Permission denied"):
            compress(plan, str(folder / "store"))
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


def test_a_place_where_no_file_can_be_made(tiny_model: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        run(tiny_model, "/proc/nothing")


def test_a_store_below_a_file(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        run(tiny_model, tmp_path / "file" / "store")
