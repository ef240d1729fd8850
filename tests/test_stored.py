"""Is what a store holds what was made: damage is found by name, kept weights, counted bytes, Zarr's own bytes?"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr
import zarr.codecs
import zarr.storage

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import StoreError
from bincompress.reporting.inspection import inspect
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.arrays import read_array, write_array
from bincompress.store.files import LocalFiles
from bincompress.store.layout import parse_array, parse_node
from bincompress.store.store import open_store
from tests.conftest import tiny_config, tiny_tensors, write_model
from tests.runs import Tree, problems, run


@pytest.mark.parametrize("archive", [False, True])
def test_a_flipped_bit_is_found_by_name(tiny_model: Path, tmp_path: Path, archive: bool) -> None:
    store = tmp_path / "store"
    plan = make_plan(open_checkpoint(tiny_model), load_recipe(None, {}), archive=archive)
    compress(plan, str(store))
    name = "model.layers.1.self_attn.v_proj.weight"
    chunk = store / "tensors" / name / "planes" / "c" / "0" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 4
    chunk.write_bytes(content)
    found = problems(store)
    assert list(found) == [name]
    assert "planes cannot be read" in found[name]
    # With a checksum that fits, the hash in the attributes still tells.
    values = open_store(str(store)).root[f"tensors/{name}/coef"]
    assert isinstance(values, zarr.Array)
    values[0, 0, 0] = np.asarray(values[0, 0, 0]) + 1
    chunk.write_bytes(bytes(content[:100]) + bytes([content[100] ^ 4]) + bytes(content[101:]))
    found = problems(store)
    assert "coef: its bytes are not those that were written" in found[name]


def test_a_damaged_asset_is_found(tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_model, tmp_path / "store")
    array = open_store(str(tmp_path / "store")).root["assets/config.json"]
    assert isinstance(array, zarr.Array)
    array[0] = 32
    assert "bytes are not those" in problems(tmp_path / "store")["assets"]


def test_other_versions_and_other_stores_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_model, tmp_path / "store")
    root = zarr.open_group(tmp_path / "store")
    root.attrs["version"] = 99
    with pytest.raises(StoreError, match="store version 99; this program reads versions 1 and 2"):
        open_store(str(tmp_path / "store"))
    with pytest.raises(StoreError, match="no such store"):
        open_store(str(tmp_path / "nowhere"))
    zarr.create_group(tmp_path / "zarr")
    with pytest.raises(StoreError, match="not a bincompress store"):
        open_store(str(tmp_path / "zarr"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="not a Zarr v3 store"):
        open_store(str(tmp_path / "folder"))


def test_kept_weights_come_back_exactly(tmp_path: Path) -> None:
    from bincompress.tensors.dequantize import dequantize

    tensors = tiny_tensors()
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][[2, 2, 9], [0, 159, 70]] = np.array([40.0, -30.0, 0.0], ml_dtypes.bfloat16)
    model = write_model(tmp_path / "model", tensors, tiny_config())
    kept = {name: ((2, 0), (2, 159), (9, 70))}
    tried: list[dict[str, Any]] = [{}, {"groups": 4, "block": "matrix"}, {"method": "xnor"}]
    for number, options in enumerate(tried):
        store = tmp_path / f"store{number}"
        plan = make_plan(open_checkpoint(model), load_recipe(None, options), kept)
        assert compress(plan, str(store)).complete
        opened = open_store(str(store))
        weights = dequantize(opened.read_packed(name))
        assert weights[[2, 2, 9], [0, 159, 70]].tolist() == [40.0, -30.0, 0.0]
        exact = tensors[name].astype(np.float64)
        report = opened.node_attributes(name)["report"]
        assert report["relative_error"] == pytest.approx(np.sum((weights - exact) ** 2) / np.sum(exact**2), rel=1e-4)
        assert report["kept"] == 3


def test_stored_bits_are_the_files_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for archive in (False, True):
        store = tmp_path / f"store-{archive}"
        compress(make_plan(open_checkpoint(tiny_model), load_recipe(None, {}), archive=archive), str(store))
        found = inspect(open_store(str(store)))
        total = 0
        for name, report in found["tensors"].items():
            kind = "tensors" if report["method"] != "keep" else "plain"
            files = [path for path in (store / kind / name).rglob("*") if path.is_file() and path.name != "zarr.json"]
            assert report["stored_bytes"] == sum(path.stat().st_size for path in files)
            total += report["stored_bytes"]
        assert found["total"]["stored_bytes"] == total


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("dtype", ["uint64", "float16", "float32", "uint16", "uint8"])
@pytest.mark.parametrize(
    ("shape", "rows"), [((), 1), ((3,), 3), ((2, 5), 2), ((7, 4), 3), ((2, 3, 4), 3), ((2, 5, 4), 2), ((0, 4), 1)]
)
def test_arrays_written_here_have_zarrs_own_bytes(
    tmp_path: Path, tree: Tree, dtype: str, shape: tuple[int, ...], rows: int, archive: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    axis = 1 if len(shape) == 3 else 0
    if values.size and rows != (shape[axis] if shape else 1):  # so small a limit that chunks have so many rows
        monkeypatch.setattr("bincompress.store.layout.CHUNK_LIMIT", -(-values.nbytes // -(-shape[axis] // rows)))
    chunks = tuple(rows if i == axis else size for i, size in enumerate(shape))
    stored = write_array(LocalFiles(tmp_path / "ours"), "a", values, archive, {"x": [1, 0.5], "\u00e9": None})
    zstd = [zarr.codecs.ZstdCodec(level=9)] if archive else []
    array = zarr.create_array(
        zarr.storage.LocalStore(tmp_path / "zarrs"), name="a", shape=shape, chunks=chunks, dtype=dtype, filters=None,
        compressors=[*zstd, zarr.codecs.Crc32cCodec()], zarr_format=3, config={"write_empty_chunks": True},
    )  # fmt: skip
    if values.size:
        array[...] = values
    array.attrs.put({"x": [1, 0.5], "\u00e9": None})
    theirs = {name: content for name, content in tree(tmp_path / "zarrs").items() if name.startswith("a/")}
    assert tree(tmp_path / "ours") == theirs
    assert stored == sum(len(content) for name, content in theirs.items() if not name.endswith("zarr.json"))
    layout = parse_array(parse_node(theirs["a/zarr.json"]))
    np.testing.assert_array_equal(read_array(LocalFiles(tmp_path / "zarrs"), "a", layout), values)
