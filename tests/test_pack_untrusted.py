"""Is a file that says it is a packed store believed no further than its bytes go?"""

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import bincompress
from bincompress.errors import DamagedError, StoreError
from bincompress.store.pack_files import PackFiles
from bincompress.store.store import open_store
from tests.hostile_packs import hostile_packs
from tests.packs import UP, write_zip


def test_every_byte_is_checked(packed: Path) -> None:
    sound = packed.read_bytes()
    files = open_store(str(packed)).files
    assert isinstance(files, PackFiles)
    places = {end - 1 for entry in files.entries.values() for end in (entry.offset + 5, entry.start, entry.end)}
    places |= set(range(len(sound) - 120, len(sound)))
    chosen = sorted(places)[::7]
    for place in chosen:
        changed = bytearray(sound)
        changed[place] ^= 4
        packed.write_bytes(changed)
        try:
            problems = bincompress.verify(packed).problems
        except StoreError as error:
            problems = {"zarr.json": str(error)}
        assert problems, place
        assert all("\n" not in text for text in problems.values())
    for length in (0, 1, 21, 22, 1000, len(sound) // 2, len(sound) - 200, len(sound) - 36, len(sound) - 1):
        packed.write_bytes(sound[:length])
        with pytest.raises(StoreError):
            open_store(str(packed))
    packed.write_bytes(sound + b"more")
    with pytest.raises(DamagedError):
        open_store(str(packed))


def zipped(edit: Callable[[zipfile.ZipFile], None], kind: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as file:
        edit(file)
    return out.getvalue()


def link(file: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("tensors/zarr.json")
    info.external_attr = 0o120777 << 16
    file.writestr(info, "/etc/passwd")


def twice(file: zipfile.ZipFile) -> None:
    file.writestr("zarr.json", "{}")
    with pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("zarr.json", "{}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(lambda f: f.writestr("../zarr.json", "{}")), r"'\.\./zarr\.json', which leads out of the store"),
        (zipped(lambda f: f.writestr("tensors/../../x/zarr.json", "")), "which leads out of the store"),
        (zipped(lambda f: f.writestr("/etc/zarr.json", "{}")), "'/etc/zarr.json', which leads out of the store"),
        (zipped(lambda f: f.writestr("tensors\\x/zarr.json", "{}")), "which leads out of the store"),
        (zipped(lambda f: f.writestr("tensors//zarr.json", "{}")), "which is no part of a store"),
        (zipped(lambda f: f.writestr("notes.txt", "x")), "'notes.txt', which is no part of a store"),
        (zipped(link), "'tensors/zarr.json', which is a link"),
        (zipped(twice), "has the entry 'zarr.json' twice"),
        (zipped(lambda f: f.writestr("zarr.json", bytes(1 << 20)), zipfile.ZIP_DEFLATED), "'zarr.json' is compressed"),
        (zipped(lambda f: f.writestr("zarr.json", "{}")), "not laid out as `bincompress pack` does it"),
        (write_zip({}), "it has no zarr.json"),
        (write_zip({"zarr.json": b"{}"}), "not a group's"),
        (write_zip({"zarr.json": b"{}", "tensors/a/c": b""}), "not laid out as"),
        (b"PK\3\4" + bytes(100), "whose end is missing"),
        (b"#!/bin/sh", "not a packed store"),
    ],
)  # fmt: skip
def test_what_no_pack_holds_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.zip"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=message):
        open_store(str(path))


def crafted(count: int = 0, size: int = 0, begin: int = 0, more: bytes = b"") -> bytes:
    return more + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, begin, 0)


@pytest.mark.parametrize("case", list(hostile_packs()))
def test_a_directory_that_is_cut_off_or_has_too_long_numbers_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, message = hostile_packs()[case]
    (tmp_path / "m.zip").write_bytes(content)
    with pytest.raises(StoreError, match=message) as caught:
        open_store(str(tmp_path / "m.zip"))
    assert len(str(caught.value)) < 400


ZIP64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *(1 << 62,) * 4) + bytes(20)


@pytest.mark.parametrize(
    "content",
    [
        crafted(5, 0xFFFFFFF0, 0), crafted(5, 10, 0xFFFFFFF0), crafted(0xFFFE, 46, 0, bytes(46)),
        crafted(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        crafted(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, ZIP64),
    ],
)  # fmt: skip
def test_made_up_sizes_ask_for_no_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.zip"
    path.write_bytes(content)
    with pytest.raises(DamagedError):
        open_store(str(path))


def test_a_file_that_becomes_shorter_does_not_end_the_process(packed: Path) -> None:
    store = open_store(str(packed))
    os.truncate(packed, 5000)
    with pytest.raises(DamagedError, match="has become shorter"):
        store.read_packed(UP[8:])


def test_a_pack_is_only_read(packed: Path) -> None:
    store = open_store(str(packed))
    with pytest.raises(StoreError, match="is only read; `bincompress unpack` makes a folder of it"):
        store.write_log("x", {})
    with pytest.raises(StoreError, match="is only read"):
        store.files.delete(["zarr.json"])
