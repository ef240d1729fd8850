"""Is a packed store the same store: for every reader, in one form, and never believed further than its bytes go?"""

import fcntl
import hashlib
import io
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import bincompress
from bincompress.errors import DamagedError, StoreError
from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.store import pack as packing
from bincompress.store import zip_format
from bincompress.store.layout import MODEL
from bincompress.store.location import files_at
from bincompress.store.pack_files import LocalRanges, PackFiles
from bincompress.store.replace import mark_beginning
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_config, tiny_tensors, write_model
from tests.hostile_packs import hostile_packs
from tests.ranges import range_server
from tests.s3 import s3_server

UP = "tensors/model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its store, and the store as one file."""
    folder = tmp_path_factory.mktemp("made")
    model = write_model(folder / "model", tiny_tensors(), tiny_config())
    assert bincompress.compress(model, folder / "store", embeddings="4bit").complete
    for log in (folder / "store" / "log").glob("*/zarr.json"):  # times differ from run to run
        log.unlink()
    bincompress.pack(folder / "store", folder / "model.bincompress.zip")
    return folder


@pytest.fixture
def packed(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made / "model.bincompress.zip", tmp_path / "m.zip"))


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "store", tmp_path / "store"))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def logits(store: str | Path) -> Any:
    decoder = load_decoder(str(store), 1, ActivationSettings()).decoder
    return decoder.next_logits([1, 5, 9, 2], decoder.new_cache(8))


def write_zip(entries: dict[str, bytes]) -> bytes:
    """Return a file of the form, from these entries in this order."""
    out, found = io.BytesIO(), []
    for name, content in entries.items():
        entry = zip_format.Entry(name, out.tell(), len(content), zlib.crc32(content))
        out.write(entry.header + content)
        found.append(entry)
    out.write(zip_format.directory(found))
    return out.getvalue()


# The form


SMALL = ("tensors/a/planes/c/9/0", "tensors/a/planes/c/10/0", "tensors/a/planes/zarr.json", "zarr.json")


def test_a_small_pack_has_these_bytes() -> None:
    assert zip_format.in_order(sorted(SMALL)) == list(SMALL)
    content = write_zip({name: name.encode() * 3 for name in SMALL})
    assert content[:30] == struct.pack(
        "<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0x21, zlib.crc32(SMALL[0].encode() * 3), 66, 66, 22, 12
    )
    assert content[52:64] == struct.pack("<3H", 0xD935, 8, 64) + bytes(6)
    assert content[-35:] == b"bincompress pack 1 0000000000000105"
    assert hashlib.sha256(content).hexdigest() == "aecd340a691ea68fd6e8e547a1cf56c581b0afc0e3d75e95aecd202612877b2b"
    with zipfile.ZipFile(io.BytesIO(content)) as found:
        assert found.testzip() is None
        assert {name: found.read(name) for name in found.namelist()} == {n: n.encode() * 3 for n in SMALL}


def test_the_directory_of_a_large_pack_is_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file above 4 GiB: offsets beyond a limit go into the fields of zip64, which zipfile reads."""
    monkeypatch.setattr(zip_format, "LIMIT", 300)
    path = tmp_path / "m.zip"
    path.write_bytes(write_zip({name: name.encode() * 3 for name in SMALL}))
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        assert found.getinfo("zarr.json").header_offset > 300
    assert list(PackFiles(LocalRanges(path)).entries) == list(SMALL)


def test_a_pack_of_very_many_entries(tmp_path: Path) -> None:
    path = tmp_path / "m.zip"
    path.write_bytes(write_zip({f"plain/t{number:06d}/c": b"" for number in range(70_000)}))
    with zipfile.ZipFile(path) as found:
        assert len(found.namelist()) == 70_000
    assert len(PackFiles(LocalRanges(path)).entries) == 70_000


def test_chunks_are_aligned_and_nothing_is_compressed(packed: Path) -> None:
    with zipfile.ZipFile(packed) as found:
        assert {info.compress_type for info in found.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in found.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    files = open_store(str(packed)).files
    assert isinstance(files, PackFiles)
    chunks = [entry for entry in files.entries.values() if not entry.name.endswith("zarr.json")]
    assert chunks
    assert {entry.start % 64 for entry in chunks} == {0}


def test_zarr_opens_it(made: Path, packed: Path) -> None:
    with zarr.storage.ZipStore(packed, mode="r") as opened:
        group = zarr.open_group(opened, mode="r")
        assert group.attrs["format"] == "bincompress"
        array = group[f"{UP}/planes"]
        assert isinstance(array, zarr.Array)
        assert np.array_equal(np.asarray(array[:]), open_store(str(made / "store")).read_packed(UP[8:]).planes)
    assert open_store(str(packed)).root.attrs["format"] == "bincompress"


# There and back


def test_equal_stores_give_equal_files_and_come_back_as_they_were(made: Path, store: Path, tmp_path: Path) -> None:
    # Another order of the folder's entries, other times and modes.
    for path in sorted(store.rglob("zarr.json"), reverse=True):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        path.chmod(0o600)
    found = bincompress.pack(store, tmp_path / "other.zip")
    assert (tmp_path / "other.zip").read_bytes() == (made / "model.bincompress.zip").read_bytes()
    assert (found.unchanged, found.left_out) == (False, ())
    bincompress.unpack(tmp_path / "other.zip", tmp_path / "back")
    assert everything(tmp_path / "back") == everything(store)


def test_every_command_reads_the_file(made: Path, packed: Path, tmp_path: Path, run: Run) -> None:
    assert np.array_equal(logits(packed), logits(made / "store"))
    for command in (["inspect"], ["verify"], ["bench", "--prompt", 4, "--tokens", 2, "--repeats", 1]):
        code, _, errors = run(command[0], packed, *command[1:])
        assert code == 0, errors
    code, out, _ = run("inspect", packed, "--json")
    assert (code, out) == (0, run("inspect", made / "store", "--json")[1])
    texts = [run("generate", place, "t1 t2", "--max-tokens", 5)[1] for place in (packed, made / "store")]
    assert texts[0] == texts[1] != ""
    assert run("export", packed, tmp_path / "exported")[0] == 0
    assert run("export", made / "store", tmp_path / "other")[0] == 0
    assert everything(tmp_path / "exported") == everything(tmp_path / "other")
    (tmp_path / "text").write_text("t1 t2 t3 " * 20)
    assert run("evaluate", packed, "--text", tmp_path / "text", "--context", 8, "--windows", 1)[0] == 0


def test_compress_packs_at_its_end(tiny_model: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "store.bincompress.zip"
    code, out, _ = run("compress", tiny_model, tmp_path / "store", "--pack")
    assert (code, f"{file}: the same store as one file" in out) == (0, True)
    first = file.read_bytes()
    assert run("verify", file)[0] == 0
    assert run("compress", tiny_model, tmp_path / "store", "--pack")[0] == 0  # the same command
    assert file.read_bytes() == first
    file.write_text("somebody's notes")
    code, _, errors = run("compress", tiny_model, tmp_path / "other", "--pack")
    assert code == 0, errors
    code, _, errors = run("compress", tiny_model, tmp_path / "store", "--pack", "--overwrite")
    assert (code, "is not a sound packed store; nothing was changed" in errors) == (2, True)
    assert file.read_text() == "somebody's notes"


def test_an_archive_and_an_array_of_several_chunks(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bincompress.store.layout.CHUNK_LIMIT", 2048)
    for archive in (False, True):
        store, file = tmp_path / f"store{archive}", tmp_path / f"{archive}.zip"
        bincompress.compress(tiny_model, store, archive=archive)
        bincompress.pack(store, file)
        assert np.array_equal(logits(file), logits(store))
        with range_server(tmp_path) as server:
            assert np.array_equal(logits(f"{server.url}/{file.name}"), logits(store))
            assert len(set(server.asked)) == len(server.asked)
            arrays = sum(len(open_store(str(store)).hashes(name)) for name in open_store(str(store)).tensors())
            assert len(server.asked) <= arrays + 2 + len(open_store(str(store)).read_assets())


# Behind a URL


def test_over_http_inspect_downloads_no_weights_and_an_array_is_one_request(made: Path) -> None:
    expected = logits(made / "store")
    with range_server(made) as server:
        url = f"{server.url}/model.bincompress.zip"
        assert bincompress.inspect(url) == bincompress.inspect(made / "model.bincompress.zip")
        files = open_store(str(made / "model.bincompress.zip")).files
        assert isinstance(files, PackFiles)
        metadata = min(entry.offset for entry in files.entries.values() if entry.name.endswith("zarr.json"))
        assert sum(end - start for start, end in server.asked) <= max(128 << 10, files._source.size - metadata)
        server.asked.clear()
        assert np.array_equal(logits(url), expected)
        assert len(set(server.asked)) == len(server.asked)
        server.asked.clear()
        assert bincompress.verify(url).ok
        assert len(set(server.asked)) == len(server.asked)
        with pytest.raises(StoreError, match=rf"^{server.url}/missing\.zip: not found: "):
            open_store(f"{server.url}/missing.zip")
        server.ranges = False
        with pytest.raises(StoreError, match="does not answer requests for parts of a file"):
            open_store(url)


def test_large_metadata_takes_one_request_more(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_format, "_TAIL", 4096)
    with range_server(made) as server:
        bincompress.inspect(f"{server.url}/model.bincompress.zip")
        assert len(server.asked) == 2
        monkeypatch.setattr(zip_format, "_HELD", 4096)  # too much to be held
        found = bincompress.inspect(f"{server.url}/model.bincompress.zip")
        assert found == bincompress.inspect(made / "store")


@pytest.mark.slow
def test_in_a_bucket(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as (host, port):
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        bincompress.unpack(made / "model.bincompress.zip", "s3://bucket/unpacked")
        assert bincompress.verify("s3://bucket/unpacked").ok
        assert np.array_equal(logits("s3://bucket/unpacked"), logits(made / "store"))
        bincompress.pack("s3://bucket/unpacked", "s3://bucket/packed.zip")
        assert files_at("s3://bucket").read("packed.zip") == (made / "model.bincompress.zip").read_bytes()
        assert np.array_equal(logits("s3://bucket/packed.zip"), logits(made / "store"))
        assert bincompress.pack("s3://bucket/unpacked", "s3://bucket/packed.zip").unchanged
        bincompress.compress(made / "model", "s3://bucket/a-folder.zip")  # a folder of that name
        assert bincompress.verify("s3://bucket/a-folder.zip").ok


# What is there is not lost


def test_nothing_but_a_pack_is_replaced_and_that_only_when_told(made: Path, store: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.zip"
    for content in (b"", b"PK", b"notes", (made / "model.bincompress.zip").read_bytes()[:-100], write_zip({})):
        target.write_bytes(content)
        for overwrite in (False, True):
            with pytest.raises(StoreError, match="is not a sound packed store; nothing was changed"):
                bincompress.pack(store, target, overwrite=overwrite)
        assert target.read_bytes() == content
    with zipfile.ZipFile(target, "w") as other:
        other.writestr("notes.txt", "mine")
    with pytest.raises(StoreError, match="nothing was changed"):
        bincompress.pack(store, target, overwrite=True)
    shutil.copy(made / "model.bincompress.zip", target)
    assert bincompress.pack(store, target).unchanged
    bincompress.compress(made / "model", tmp_path / "two", groups=4)
    with pytest.raises(StoreError, match="holds another packed store; nothing was changed: --overwrite replaces it"):
        bincompress.pack(tmp_path / "two", target)
    bincompress.pack(tmp_path / "two", target, overwrite=True)
    assert np.array_equal(logits(target), logits(tmp_path / "two"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.zip", "store", "two"]


def test_odd_places_are_refused_in_one_line(made: Path, packed: Path, store: Path, tmp_path: Path, run: Run) -> None:
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
        (("compress", made / "model", packed), "is a packed store; a store is written into a folder"),
        (("inspect", made / "model" / "config.json"), "not a packed store"),
    ):  # fmt: skip
        code, _, errors = run(*arguments)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert message in errors
    assert not (tmp_path / "n").exists()
    assert everything(store) == everything(made / "store")


def test_what_is_no_part_of_the_store_is_not_packed_and_named(
    made: Path, store: Path, tmp_path: Path, run: Run
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
    assert (tmp_path / "m.zip").read_bytes() == (made / "model.bincompress.zip").read_bytes()


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
def test_a_killed_pack_is_cleared_away_and_a_running_one_is_not(store: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from bincompress.store import pack\n"
        "pack.directory = lambda entries: os.kill(os.getpid(), signal.SIGKILL)\npack.pack(*sys.argv[1:])"
    )
    folder = tmp_path / "files"
    subprocess.run([sys.executable, "-c", code, store, folder / "m.zip"], check=False)
    assert [path.name[:6] for path in folder.iterdir()] == [".pack-"]
    running = folder / f".pack-{'1' * 32}.partial"
    with open(running, "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        bincompress.pack(store, folder / "m.zip")
        assert sorted(path.name for path in folder.iterdir()) == [running.name, "m.zip"]


def test_an_interrupted_unpack_is_finished_by_the_same_call(
    made: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "unpack" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bincompress.unpack(packed, tmp_path / "back", progress=stop)
    with pytest.raises(StoreError, match="ended while it was creating this store"):
        open_store(str(tmp_path / "back"))
    bincompress.unpack(packed, tmp_path / "back")
    assert everything(tmp_path / "back") == everything(made / "store")
    (tmp_path / "back" / "README.md").write_text("mine")
    bincompress.unpack(packed, tmp_path / "back", overwrite=True)
    assert everything(tmp_path / "back") == {**everything(made / "store"), "README.md": b"mine"}


# What a file says is held against its bytes


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
