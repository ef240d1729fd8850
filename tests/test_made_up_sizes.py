"""Made-up shapes, chunks and codecs of arrays are refused by name, and ask for no memory."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest

from bincompress.calibration.statistics import begin_statistics
from bincompress.errors import DamagedError
from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.store.layout import SEAL
from bincompress.store.objects import ObjectFiles
from bincompress.store.store import open_store
from tests.hashed_stores import NAME, without_seals
from tests.runs import problems, run

HUGE = 1 << 36

NODES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("huge shape", lambda node: node.update(shape=[2, 160, HUGE])),
    ("huge everything", lambda node: _grid(node, [HUGE, HUGE, HUGE])),
    ("huge chunk", lambda node: _grid(node, node["shape"], [HUGE, 160, 1])),
    ("small chunks", lambda node: _grid(node, [HUGE, HUGE, 1], [1, 1, 1])),
    ("many chunks", lambda node: _grid(node, [HUGE, 160, 1], [1, 160, 1])),
    ("many dimensions", lambda node: _grid(node, [1] * 10_000)),
    ("some dimensions", lambda node: _grid(node, [HUGE] * 16)),
    ("negative", lambda node: _grid(node, [-1, 160, 1])),
    ("beyond integers", lambda node: _grid(node, [10**400, 160, 1])),
    ("floats", lambda node: _grid(node, [2.0, 160, 1])),
    ("infinite", lambda node: _grid(node, [float("inf"), 160, 1])),
    ("texts", lambda node: _grid(node, ["2", "160", "1"])),
    ("no shape", lambda node: node.pop("shape")),
    ("no grid", lambda node: node.update(chunk_grid=None)),
    ("another grid", lambda node: node["chunk_grid"].update(name="rectilinear")),
    ("no codecs", lambda node: node.update(codecs=[])),
    ("codecs of nothing", lambda node: node.update(codecs=[1, 2])),
    ("blosc", lambda node: node.update(codecs=[{"name": "bytes"}, {"name": "blosc"}, {"name": "crc32c"}])),
    ("zstd twice", lambda node: node.update(codecs=[{"name": "bytes"}, *2 * [{"name": "zstd"}], {"name": "crc32c"}])),
    ("sharding", lambda node: node.update(codecs=[{"name": "sharding_indexed", "configuration": {}}])),
    ("big-endian", lambda node: node["codecs"][0].update(configuration={"endian": "big"})),
    ("strings", lambda node: node.update(data_type="string")),
    ("objects", lambda node: node.update(data_type={"name": "object"})),
    ("raw bytes", lambda node: node.update(data_type=f"r{HUGE}")),
    ("complex", lambda node: node.update(data_type="complex128")),
    ("another separator", lambda node: node["chunk_key_encoding"].update(configuration={"separator": "."})),
    ("transformers", lambda node: node.update(storage_transformers=[{"name": "x"}])),
    ("a group", lambda node: node.update(node_type="group")),
]


def _grid(node: dict[str, Any], shape: list[Any], chunks: list[Any] | None = None) -> None:
    node["shape"] = shape
    node["chunk_grid"]["configuration"]["chunk_shape"] = shape if chunks is None else chunks


@pytest.fixture(params=["store", "archive"])
def store(request: pytest.FixtureRequest, tiny_stores: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_stores / request.param, tmp_path / "store"))


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize(("what", "edit"), NODES, ids=[what for what, _ in NODES])
def test_made_up_metadata_asks_for_no_memory(
    store: Path, what: str, edit: Callable[[dict[str, Any]], Any], seal: bool
) -> None:
    if not seal:  # as in a store of an earlier version, where nothing else says what the array is
        without_seals(store)
    path = store / "tensors" / NAME / "planes" / "zarr.json"
    node = json.loads(path.read_text())
    edit(node)
    path.write_text(json.dumps(node))
    with limited(), pytest.raises(DamagedError, match=f"{NAME}: "):
        open_store(str(store)).read_packed(NAME, check_hashes=True)
    with limited():
        assert list(problems(store)) == [NAME]


class limited:  # noqa: N801 - a context
    """No more than half a gigabyte of memory beyond what the process has."""

    def __enter__(self) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), self.before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def test_coded_bytes_are_not_asked_how_much_they_need(tiny_stores: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(tiny_stores / "archive", tmp_path / "store"))
    without_seals(store)
    chunk = store / "tensors" / NAME / "planes" / "c" / "0" / "0" / "0"
    # A frame header that promises 2 ** 40 bytes.
    bomb = b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    chunk.write_bytes(bomb + google_crc32c.value(bomb).to_bytes(4, "little"))
    with limited(), pytest.raises(DamagedError, match=f"{NAME}: array planes cannot be read"):
        open_store(str(store)).read_packed(NAME)
    # And bytes that are many more than the array has, or fewer.
    for size in (1 << 20, 8):
        other = bytes(numcodecs.Zstd(level=1).encode(bytes(size)))
        chunk.write_bytes(other + google_crc32c.value(other).to_bytes(4, "little"))
        with limited(), pytest.raises(DamagedError, match=f"{NAME}: array planes cannot be read"):
            open_store(str(store)).read_packed(NAME)


def test_a_large_array_coded_in_a_few_bytes_is_refused(tiny_stores: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(tiny_stores / "archive", tmp_path / "store"))
    without_seals(store)
    path = store / "tensors" / NAME / "planes" / "zarr.json"
    node = json.loads(path.read_text())
    _grid(node, [2, 160, 1 << 20])  # 2.5 GB in a file of a few kilobytes
    path.write_text(json.dumps(node))
    with (
        limited(),
        pytest.raises(DamagedError, match=r"bytes are said to hold 2,684,354,560; expected at most 1024 ti"),
    ):
        open_store(str(store)).read_packed(NAME)


@pytest.mark.parametrize(("what", "edit"), NODES, ids=[what for what, _ in NODES])
def test_made_up_statistics_ask_for_no_memory(tmp_path: Path, what: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    made = begin_statistics(str(tmp_path), {"inputs": {NAME: NAME}}, overwrite=False)
    made.write(NAME, [NAME], 1, {"hessian": np.eye(64, dtype=np.float32), "absmax": np.ones(64, np.float32)})
    np.testing.assert_array_equal(made.read(NAME).hessian, np.eye(64))
    path = tmp_path / "inputs" / NAME / "hessian" / "zarr.json"
    node = json.loads(path.read_text())
    edit(node)
    path.write_text(json.dumps(node))
    with limited(), pytest.raises(DamagedError, match="hessian cannot be read"):
        made.read(NAME)


def test_behind_a_url_too(tiny_stores: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}-sizes"
    run(tiny_stores / "model", url)
    files = ObjectFiles(url)
    for edit in (edit for what, edit in NODES if what != "a group"):
        key = f"tensors/{NAME}/planes/zarr.json"
        before = files.read(key)
        assert before is not None
        node = json.loads(before)
        edit(node)
        files.write(key, [json.dumps(node).encode()])
        with limited():
            assert list(problems(url)) == [NAME]
        files.write(key, [before])
    assert problems(url) == {}
    nodes = json.loads(files.read("nodes/zarr.json") or b"")
    nodes["attributes"]["tensors"][NAME][SEAL]["arrays"]["planes"]["shape"][2] = HUGE
    files.write("nodes/zarr.json", [json.dumps(nodes).encode()])
    with limited(), pytest.raises(DamagedError, match=NAME):
        load_decoder(url, 1, ActivationSettings())
    assert list(problems(url)) == ["zarr.json"]
    assert "nodes is not what its tensors say" in problems(url)["zarr.json"]
    assert run(tiny_stores / "model", url).unchanged == 21
    assert problems(url) == {}
