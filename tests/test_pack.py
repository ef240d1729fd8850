"""Is a packed store the same store: for every reader, in one form, from a folder, a server or a bucket?"""

import hashlib
import io
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import zarr

import bincompress
from bincompress.errors import StoreError
from bincompress.store import zip_format
from bincompress.store.location import files_at
from bincompress.store.pack_files import LocalRanges, PackFiles
from bincompress.store.store import open_store
from tests.conftest import Run
from tests.packs import UP, everything, logits, write_zip
from tests.ranges import range_server
from tests.s3 import s3_environment, s3_server


@pytest.fixture
def store(tiny_pack: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pack / "store", tmp_path / "store"))


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


@pytest.mark.slow
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


def test_zarr_opens_it(tiny_pack: Path, packed: Path) -> None:
    with zarr.storage.ZipStore(packed, mode="r") as opened:
        group = zarr.open_group(opened, mode="r")
        assert group.attrs["format"] == "bincompress"
        array = group[f"{UP}/planes"]
        assert isinstance(array, zarr.Array)
        assert np.array_equal(np.asarray(array[:]), open_store(str(tiny_pack / "store")).read_packed(UP[8:]).planes)
    assert open_store(str(packed)).root.attrs["format"] == "bincompress"


# There and back


def test_equal_stores_give_equal_files_and_come_back_as_they_were(tiny_pack: Path, store: Path, tmp_path: Path) -> None:
    # Another order of the folder's entries, other times and modes.
    for path in sorted(store.rglob("zarr.json"), reverse=True):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        path.chmod(0o600)
    found = bincompress.pack(store, tmp_path / "other.zip")
    assert (tmp_path / "other.zip").read_bytes() == (tiny_pack / "model.bincompress.zip").read_bytes()
    assert (found.unchanged, found.left_out) == (False, ())
    bincompress.unpack(tmp_path / "other.zip", tmp_path / "back")
    assert everything(tmp_path / "back") == everything(store)


def test_every_command_reads_the_file(tiny_pack: Path, packed: Path, tmp_path: Path, run: Run) -> None:
    assert np.array_equal(logits(packed), logits(tiny_pack / "store"))
    for command in (["inspect"], ["verify"], ["bench", "--prompt", 4, "--tokens", 2, "--repeats", 1]):
        code, _, errors = run(command[0], packed, *command[1:])
        assert code == 0, errors
    code, out, _ = run("inspect", packed, "--json")
    assert (code, out) == (0, run("inspect", tiny_pack / "store", "--json")[1])
    texts = [run("generate", place, "t1 t2", "--max-tokens", 5)[1] for place in (packed, tiny_pack / "store")]
    assert texts[0] == texts[1] != ""
    assert run("export", packed, tmp_path / "exported")[0] == 0
    assert run("export", tiny_pack / "store", tmp_path / "other")[0] == 0
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


def test_over_http_inspect_downloads_no_weights_and_an_array_is_one_request(tiny_pack: Path) -> None:
    expected = logits(tiny_pack / "store")
    with range_server(tiny_pack) as server:
        url = f"{server.url}/model.bincompress.zip"
        assert bincompress.inspect(url) == bincompress.inspect(tiny_pack / "model.bincompress.zip")
        files = open_store(str(tiny_pack / "model.bincompress.zip")).files
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


@pytest.mark.slow
def test_large_metadata_takes_one_request_more(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_format, "_TAIL", 4096)
    with range_server(tiny_pack) as server:
        bincompress.inspect(f"{server.url}/model.bincompress.zip")
        assert len(server.asked) == 2
        monkeypatch.setattr(zip_format, "_HELD", 4096)  # too much to be held
        found = bincompress.inspect(f"{server.url}/model.bincompress.zip")
        assert found == bincompress.inspect(tiny_pack / "store")


@pytest.mark.slow
def test_in_a_bucket(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as (host, port):
        for name, value in s3_environment(f"http://{host}:{port}").items():
            monkeypatch.setenv(name, value)
        bincompress.unpack(tiny_pack / "model.bincompress.zip", "s3://bucket/unpacked")
        assert bincompress.verify("s3://bucket/unpacked").ok
        assert np.array_equal(logits("s3://bucket/unpacked"), logits(tiny_pack / "store"))
        bincompress.pack("s3://bucket/unpacked", "s3://bucket/packed.zip")
        assert files_at("s3://bucket").read("packed.zip") == (tiny_pack / "model.bincompress.zip").read_bytes()
        assert np.array_equal(logits("s3://bucket/packed.zip"), logits(tiny_pack / "store"))
        assert bincompress.pack("s3://bucket/unpacked", "s3://bucket/packed.zip").unchanged
        bincompress.compress(tiny_pack / "model", "s3://bucket/a-folder.zip")  # a folder of that name
        assert bincompress.verify("s3://bucket/a-folder.zip").ok
