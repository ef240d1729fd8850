"""What packing and unpacking refuse, replace and leave behind: other files, full disks, interrupts, kills."""

import fcntl
import os
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bincompress
from bincompress.errors import StoreError
from bincompress.store import pack as packing
from bincompress.store.layout import MODEL
from bincompress.store.location import files_at
from bincompress.store.replace import mark_beginning
from bincompress.store.store import open_store
from tests.conftest import Run
from tests.forked import Forked
from tests.packs import UP, everything, logits, write_zip


@pytest.fixture
def store(tiny_pack: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pack / "store", tmp_path / "store"))


def test_nothing_but_a_pack_is_replaced_and_that_only_when_told(tiny_pack: Path, store: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.zip"
    for content in (b"", b"PK", b"notes", (tiny_pack / "model.bincompress.zip").read_bytes()[:-100], write_zip({})):
        target.write_bytes(content)
        for overwrite in (False, True):
            with pytest.raises(StoreError, match="is not a sound packed store; nothing was changed"):
                bincompress.pack(store, target, overwrite=overwrite)
        assert target.read_bytes() == content
    with zipfile.ZipFile(target, "w") as other:
        other.writestr("notes.txt", "mine")
    with pytest.raises(StoreError, match="nothing was changed"):
        bincompress.pack(store, target, overwrite=True)
    shutil.copy(tiny_pack / "model.bincompress.zip", target)
    assert bincompress.pack(store, target).unchanged
    bincompress.compress(tiny_pack / "model", tmp_path / "two", groups=4)
    with pytest.raises(StoreError, match="holds another packed store; nothing was changed: --overwrite replaces it"):
        bincompress.pack(tmp_path / "two", target)
    bincompress.pack(tmp_path / "two", target, overwrite=True)
    assert np.array_equal(logits(target), logits(tmp_path / "two"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.zip", "store", "two"]


def test_odd_places_are_refused_in_one_line(
    tiny_pack: Path, packed: Path, store: Path, tmp_path: Path, run: Run
) -> None:
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    for arguments, message in (
        (("pack", store, tmp_path / "model"), "expected a file name that ends in .zip"),
        (("pack", store, tmp_path), "expected a file name that ends in .zip"),
        (("pack", packed, packed), "is packed already"),
        (("pack", packed, tmp_path / "n.zip"), "is packed already"),
        (("pack", store, store / "m.zip"), "lies in the store itself"),
        (("pack", store, "/proc/m.zip"), "cannot be written"),
        (("pack", tmp_path / "missing", tmp_path / "n.zip"), "no such store"),
        (("pack", tmp_path / "other", tmp_path / "n.zip"), "not a Zarr v3 store"),
        (("pack", store, tmp_path / "pipe.zip"), "is there, and is not a sound packed store"),
        (("unpack", packed, packed), "is a packed store; a store is written into a folder"),
        (("unpack", packed, store), "holds a store; nothing was changed: --overwrite replaces it"),
        (("unpack", packed, tmp_path / "other"), "nothing was changed"),
        (("unpack", store, tmp_path / "n"), "is a store already"),
        (("unpack", tmp_path / "missing.zip", tmp_path / "n"), "no such store"),
        (("compress", tiny_pack / "model", packed), "is a packed store; a store is written into a folder"),
        (("inspect", tiny_pack / "model" / "config.json"), "not a packed store"),
    ):  # fmt: skip
        code, _, errors = run(*arguments)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert message in errors
    assert not (tmp_path / "n").exists()
    assert everything(store) == everything(tiny_pack / "store")


def test_what_is_no_part_of_the_store_is_not_packed_and_named(
    tiny_pack: Path, store: Path, tmp_path: Path, run: Run
) -> None:
    (store / "README.md").write_text("mine")
    (store / ".git").mkdir()
    (store / ".git" / "HEAD").write_text("x")
    (store / UP / "extra").mkdir()
    (store / UP / "extra" / "zarr.json").write_text("{}")
    (store / f".{'0' * 32}.partial").write_text("half")
    code, _, errors = run("pack", store, tmp_path / "m.zip")
    assert (code, errors) == (
        0, f"note: {store}: not packed, as it is no part of the store: .git/, README.md, {UP}/extra/zarr.json\n"
    )  # fmt: skip
    assert (tmp_path / "m.zip").read_bytes() == (tiny_pack / "model.bincompress.zip").read_bytes()


def test_a_store_that_is_not_whole_is_not_packed(store: Path, tmp_path: Path, run: Run) -> None:
    chunk = store / UP / "planes" / "c" / "0" / "0" / "0"
    sound = chunk.read_bytes()
    for change in (sound[:-1], b"\0" * 8 + sound[8:]):
        chunk.write_bytes(change)
        code, _, errors = run("pack", store, tmp_path / "m.zip")
        assert (code, errors.count("\n"), UP[8:] in errors) == (2, 1, True)
    chunk.write_bytes(sound)
    (store / UP / "planes" / "c").rename(tmp_path / "c")
    (store / UP / "planes" / "c").symlink_to(tmp_path / "c")
    code, _, errors = run("pack", store, tmp_path / "m.zip")
    assert (code, "is a link, which is not followed" in errors) == (2, True)
    node = store / "zarr.json"
    node.write_text(node.read_text().replace('"status": "complete"', '"status": "incomplete"').replace("sealed", "was"))
    code, _, errors = run("pack", store, tmp_path / "m.zip")
    assert (code, "not complete; run the same" in errors) == (2, True)
    mark_beginning(files_at(str(store)), MODEL, 1)
    code, _, errors = run("pack", store, tmp_path / "m.zip")
    assert (code, "ended while it was creating this store" in errors) == (2, True)
    assert not (tmp_path / "m.zip").exists()


def test_a_full_disk_or_an_interrupt_leaves_nothing(
    store: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    for stop, error in ((full, StoreError), (stopped, KeyboardInterrupt)):
        monkeypatch.setattr(packing, "directory", stop)
        with pytest.raises(error):
            bincompress.pack(store, tmp_path / "new.zip")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.zip", "store"]


@pytest.mark.slow
def test_a_killed_pack_is_cleared_away_and_a_running_one_is_not(forked: Forked, store: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from bincompress.store import pack\n"
        "pack.directory = lambda entries: os.kill(os.getpid(), signal.SIGKILL)\npack.pack(*sys.argv[1:])"
    )
    folder = tmp_path / "files"
    assert forked(store, folder / "m.zip", code=code).returncode == -signal.SIGKILL
    assert [path.name[:6] for path in folder.iterdir()] == [".pack-"]
    running = folder / f".pack-{'1' * 32}.partial"
    with open(running, "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        bincompress.pack(store, folder / "m.zip")
        assert sorted(path.name for path in folder.iterdir()) == [running.name, "m.zip"]


def test_an_interrupted_unpack_is_finished_by_the_same_call(
    tiny_pack: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "unpack" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bincompress.unpack(packed, tmp_path / "back", progress=stop)
    with pytest.raises(StoreError, match="ended while it was creating this store"):
        open_store(str(tmp_path / "back"))
    bincompress.unpack(packed, tmp_path / "back")
    assert everything(tmp_path / "back") == everything(tiny_pack / "store")
    (tmp_path / "back" / "README.md").write_text("mine")
    bincompress.unpack(packed, tmp_path / "back", overwrite=True)
    assert everything(tmp_path / "back") == {**everything(tiny_pack / "store"), "README.md": b"mine"}
