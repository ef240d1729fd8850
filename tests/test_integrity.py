"""Is what a store says of itself believed only as far as its hashes go, and what is not finite named?"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import BincompressError, DamagedError, StoreError
from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.arrays import first_not_finite
from bincompress.store.layout import SEAL, array_hash, sealed
from bincompress.store.store import open_store
from bincompress.store.verify import unsealed
from tests.conftest import Run, as_weight, tiny_config, tiny_tensors, write_model
from tests.hashed_stores import NAME, change, node_at, without_seals
from tests.runs import problems

NORM = "model.layers.0.input_layernorm.weight"
HEAD = "lm_head.weight"
EIGHT = ActivationSettings()


@pytest.fixture(params=["store", "archive"])
def store(request: pytest.FixtureRequest, tiny_stores: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_stores / request.param, tmp_path / "store"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (NAME, {"terms": [2, 1]}),
        (NAME, {"coef_exponent": 1}),
        (NAME, {"mix": [[1.0, 0.5], [0.0, 1.0]]}),
        (NAME, {"method": "xnor"}),
        (NAME, {"report": {"stored_bytes": 0}}),
        (NAME, {SEAL: {}}),
        (NAME, {SEAL: "x"}),
        (NAME, {SEAL: ...}),  # removed where the root has one
        (NORM, {"dtype": "float16"}),
        (NORM, {"x": 1}),
    ],
)
def test_attributes_that_were_changed_are_found(store: Path, name: str, changes: dict[str, Any], run: Run) -> None:
    change(node_at(store, name), **changes)
    found = problems(store)
    assert list(found) == [name]
    assert "attributes" in found[name]
    with pytest.raises(DamagedError, match=f"{re.escape(name)}: its attributes"):
        load_decoder(str(store), 1, EIGHT)
    code, _, err = run("verify", store)
    assert (code, name in err) == (1, True)
    assert run("generate", store, "a")[0] == 2


@pytest.mark.parametrize("change", [{"zarr_format": 4}, {"node_type": "grp"}, {"node_type": ...}])
@pytest.mark.parametrize("group", ["tensors", "assets", "log", f"tensors/{NAME}"])
def test_groups_that_other_programs_refuse_are_found(store: Path, group: str, change: dict[str, Any]) -> None:
    file = store / group / "zarr.json"
    node = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in node.items() if value is not ...}))
    found = problems(store)
    assert list(found) == [NAME if NAME in group else "zarr.json"]
    assert "not the metadata of a Zarr v3 group" in next(iter(found.values()))


def test_attributes_of_another_tensor_are_found(store: Path) -> None:
    first, second = (store / "tensors" / f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    first.rename(store / "x")
    second.rename(first)
    (store / "x").rename(second)
    assert set(problems(store)) == {first.name, second.name}


def test_the_shape_of_a_kept_tensor_is_under_the_hash(store: Path) -> None:
    path = node_at(store, HEAD)
    node = json.loads(path.read_text())
    node["shape"] = node["chunk_grid"]["configuration"]["chunk_shape"] = node["shape"][::-1]
    chunk = store / "plain" / HEAD / "c" / "0" / "0"
    assert chunk.exists()  # of as many bytes as before
    path.write_text(json.dumps(node))
    assert "its zarr.json is not the one that was written" in problems(store)[HEAD]
    with pytest.raises(DamagedError, match=r"its zarr.json is not the one that was written"):
        load_decoder(str(store), 1, EIGHT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {}}, "attributes are not those that were written"),
        ({"status": "incomplete"}, "attributes are not those that were written"),
        ({"config": {"hidden_size": 1}}, "attributes are not those that were written"),
        ({"tensors": {"../../etc": "packed"}}, "which names no tensor"),
        ({"tensors": {"a": 5}}, "which names no tensor"),
    ],
)
def test_a_root_that_was_changed_is_found(store: Path, changes: dict[str, Any], message: str, run: Run) -> None:
    change(store / "zarr.json", **changes)
    with pytest.raises(StoreError, match=message):
        open_store(str(store))
    code, _, err = run("verify", store)
    assert (code, message in err, err.count("\n")) == (1 if "written" in message else 2, True, 1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({}, "its root lists no tensors"), ({NORM: "plain"}, "its root does not list .* lies there")],
)
def test_a_list_of_tensors_that_lacks_some_does_not_verify(
    store: Path, tensors: dict[str, str], message: str, run: Run
) -> None:
    root = json.loads((store / "zarr.json").read_text())
    attributes = sealed("", {**root["attributes"], "tensors": tensors})  # with a hash that fits
    (store / "zarr.json").write_text(json.dumps({**root, "attributes": attributes}))
    found = problems(store)
    assert list(found) == ["zarr.json"]
    assert re.search(message, found["zarr.json"])
    assert run("verify", store)[0] == 1


def test_stores_of_earlier_versions_load_and_verify_says_what_it_cannot(
    tiny_stores: Path, store: Path, run: Run
) -> None:
    decoder = load_decoder(str(store), 1, EIGHT).decoder
    expected = decoder.logits([1, 2, 3], decoder.new_cache(8))
    without_seals(store)
    assert len(unsealed(open_store(str(store)))) == 21
    decoder = load_decoder(str(store), 1, EIGHT).decoder
    np.testing.assert_array_equal(decoder.logits([1, 2, 3], decoder.new_cache(8)), expected)
    code, out, err = run("verify", store)
    assert (code, "every tensor is as it was written" in out) == (0, True)
    assert "the attributes of 21 tensors are under no hash (an earlier version wrote them)" in err
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    plan = make_plan(open_checkpoint(tiny_stores / "model"), load_recipe(None, {}), archive=_is_archive(store))
    assert compress(plan, str(store)).unchanged == 21
    assert before == {path: path.read_bytes() for path in before}


def _is_archive(store: Path) -> bool:
    return bool(json.loads((store / "zarr.json").read_text())["attributes"]["archive"])


def test_a_tensor_whose_attributes_were_changed_is_written_again(tiny_stores: Path, store: Path) -> None:
    good = node_at(store, NAME).read_bytes()
    change(node_at(store, NAME), terms=[2, 1])
    plan = make_plan(open_checkpoint(tiny_stores / "model"), load_recipe(None, {}), archive=_is_archive(store))
    outcome = compress(plan, str(store))
    assert (outcome.done, outcome.unchanged) == (1, 20)
    assert node_at(store, NAME).read_bytes() == good


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_first_value_that_is_not_finite(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    greatest = {"BF16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), "F16": 65504.0, "F32": 3.4028234e38}[dtype]  # type: ignore[no-untyped-call]
    values[:4] = [greatest, -greatest, -0.0, 1e-7]
    assert first_not_finite(as_weight(values, dtype).bits, dtype) is None
    for place in (0, 131_071, 131_072, 299_999):
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            broken = values.copy()
            broken[[place, -1]] = bad
            assert first_not_finite(as_weight(broken, dtype).bits, dtype) == place
    assert first_not_finite(np.empty(0, np.uint16), "BF16") is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [NORM, "model.norm.weight"])
def test_a_norm_that_is_not_finite_is_refused(tmp_path: Path, run: Run, name: str, value: float) -> None:
    tensors = tiny_tensors()
    tensors[name][5] = value
    code, _, err = run("compress", write_model(tmp_path / "model", tensors, tiny_config()), tmp_path / "store")
    assert code == 1
    assert f"FAILED {name}: {value} at [5]; expected finite values" in err
    assert list(problems(tmp_path / "store")) == [name]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", HEAD])
def test_a_kept_matrix_that_is_not_finite_is_recorded_named_and_runs_nowhere(
    tmp_path: Path, run: Run, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tiny_tensors()
    tensors[name][3, 7] = np.nan
    store = tmp_path / "store"
    code, _, _ = run("compress", write_model(tmp_path / "model", tensors, tiny_config()), store)
    assert code == 0
    assert f"{name}: nan at [3, 7]; expected finite values; it is kept as it is, and `verify` and" in caplog.text
    report = open_store(str(store)).complete_attributes(name)["report"]
    assert report["not_finite"] == "nan at [3, 7]; expected finite values"
    assert list(problems(store)) == [name]
    assert run("verify", store)[0] == 1
    with pytest.raises(BincompressError, match=rf"{name}: nan at \[3, 7\]; expected finite values"):
        load_decoder(str(store), 1, EIGHT)
    said = f"NOT FINITE: {name}: nan at [3, 7]; expected finite values; it will not run\n"
    assert said in run("inspect", store)[1]
    assert said in run("compress", tmp_path / "model", store)[1]  # again, when there is nothing left to do
    text = tmp_path / "text"
    text.write_text("t1 t2 " * 400)
    for command in (
        ("export", store, tmp_path / "exported"),
        ("pack", store, tmp_path / "packed.zip"),
        ("distill", store, "--teacher", tmp_path / "model", "--out", tmp_path / "out", "--text", text),
        ("train", tmp_path / "model", tmp_path / "out", "--text", text, "--layer-context", 64, "--start", store),
    ):
        code, _, errors = run(*command)
        assert code == 2
        assert f"{name}: nan at [3, 7]; expected finite values" in errors
        assert errors.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model", "store", "text"}


def test_a_store_of_an_earlier_version_with_a_norm_that_is_not_finite(
    tiny_stores: Path, tmp_path: Path, run: Run
) -> None:
    store = Path(shutil.copytree(tiny_stores / "store", tmp_path / "store"))
    chunk = store / "plain" / NORM / "c" / "0"
    values = np.frombuffer(chunk.read_bytes()[:-4], np.uint16).copy()
    values[9] = 0x7F80
    chunk.write_bytes(values.tobytes() + google_crc32c.value(values.view(np.uint8)).to_bytes(4, "little"))
    without_seals(store)
    change(node_at(store, NORM), hashes={"array": array_hash(values)})
    assert "inf at [9]; expected finite values" in problems(store)[NORM]
    with pytest.raises(StoreError, match=rf"{NORM}: inf at \[9\]; expected finite values"):
        load_decoder(str(store), 1, EIGHT)
