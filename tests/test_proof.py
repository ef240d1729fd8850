"""Does `verify --source` prove that a store came of its source: the same bytes made once more, differences named?"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import bincompress
from bincompress.errors import BincompressError, StoreError
from bincompress.store.layout import sealed
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_config, tiny_tensors, write_model

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", tiny_tensors(), tiny_config())


def text(folder: Path) -> Path:
    words = np.random.default_rng(0).integers(2, 96, 400)
    (folder / "text").write_text(" ".join(f"t{word}" for word in words))
    return folder / "text"


def change_root(store: Path, **changes: Any) -> None:
    node = json.loads((store / "zarr.json").read_text())
    node["attributes"] = sealed("", {**node["attributes"], **changes})
    (store / "zarr.json").write_text(json.dumps(node))


@pytest.mark.parametrize(
    "settings",
    [
        {"embeddings": "4bit", "keep_weights": {UP: ((0, 1), (5, 7))}},
        {"groups": 4, "block": "row", "archive": True},
        {"method": "dbllm", "keep": ["*.0.self_attn.k_proj.weight"]},
        {"method": "wgm", "groups": 8, "block": "matrix", "embeddings": "8bit", "lam": 0.1, "lam_normalized": True},
        {"method": "xnor", "block": 64},
    ],
)
def test_a_store_gives_its_bytes_once_more(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    bincompress.compress(model, tmp_path / "store", **settings)
    found = bincompress.verify(tmp_path / "store", source=model)
    assert found.problems == {}
    assert sorted(found.recomputed) == sorted(open_store(str(tmp_path / "store")).tensors())


def test_settings_of_single_tensors(model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        '[defaults]\nmethod = "wgm"\ngroups = 3\n[[tensor]]\npattern = "*.down_proj.weight"\nmethod = "xnor"\n'
        '[[tensor]]\npattern = "*.1.mlp.up*"\ngroups = 2\nblock = 64\n'
        '[[tensor]]\npattern = "*q_proj*"\nmethod = "keep"\n'
    )
    bincompress.compress(model, tmp_path / "store", recipe=tmp_path / "r.toml")
    bincompress.pack(tmp_path / "store", tmp_path / "m.zip")
    assert bincompress.verify(tmp_path / "m.zip", source=model).ok


@pytest.mark.parametrize(
    "settings",
    [{"compensate": True, "refine": 1, "scale_bits": 8}, {"method": "billm"}, {"method": "dbellquant", "planes": 1}],
)
def test_calibrated_stores_need_their_statistics(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    for name, samples in (("stats", 4), ("other", 3)):
        bincompress.calibrate(model, str(tmp_path / name), text(tmp_path), samples=samples, context=16, threads=1)
    store = tmp_path / "store"
    bincompress.compress(model, store, stats=str(tmp_path / "stats"), **settings)
    with pytest.raises(
        StoreError, match=r"tensors were calibrated .* give what they were made with: --statistics STATS"
    ):
        bincompress.verify(store, source=model)
    with pytest.raises(StoreError, match=r"not the statistics that .* was made with"):
        bincompress.verify(store, source=model, statistics=str(tmp_path / "other"))
    assert bincompress.verify(store, source=model, statistics=str(tmp_path / "stats")).problems == {}


def test_a_sample_is_the_same_for_the_same_seed(model: Path, tmp_path: Path, run: Run) -> None:
    bincompress.compress(model, tmp_path / "store")

    def drawn(*options: object) -> list[str]:
        code, out, errors = run("verify", tmp_path / "store", "--source", model, "--json", *options)
        assert code == 0, errors
        found: list[str] = json.loads(out)["recomputed"]
        return found

    assert drawn("--sample", 4) == drawn("--sample", 4) != drawn("--sample", 4, "--seed", 1)
    assert len(drawn("--sample", 4)) == 4
    assert drawn("--sample", 999) == drawn()
    code, out, _ = run("verify", tmp_path / "store", "--source", model, "--sample", 2)
    assert (code, f"2 of 21 tensors made from {model} once more: the same bytes" in out) == (0, True)


def test_what_differs_is_named(model: Path, tmp_path: Path, run: Run) -> None:
    """A store that is whole and was made from other weights, whatever it says of them."""
    bincompress.compress(model, tmp_path / "store")
    other = tiny_tensors()
    other[UP] = (other[UP].astype(np.float32) * 1.5).astype(ml_dtypes.bfloat16)
    other[NORM] = other[NORM] * ml_dtypes.bfloat16(2)
    changed = write_model(tmp_path / "changed", other, tiny_config())
    code, _, errors = run("verify", tmp_path / "store", "--source", changed)
    assert (code, sorted(line.split(":")[0] for line in errors.splitlines())) == (1, sorted([UP, NORM]))
    assert "the source's weights are others" in errors
    # A store of the other weights that claims to be made from these.
    bincompress.compress(changed, tmp_path / "forged")
    for place in (f"tensors/{UP}", f"plain/{NORM}"):
        path = tmp_path / "forged" / place / "zarr.json"
        node = json.loads(path.read_text())
        own = json.loads((tmp_path / "store" / place / "zarr.json").read_text())["attributes"]["fingerprint"]
        attributes = {key: value for key, value in node["attributes"].items() if key != "sealed"}
        arrays = node["attributes"]["sealed"]["arrays"]
        node["attributes"] = sealed(place.split("/")[1], {**attributes, "fingerprint": own}, arrays)
        path.write_text(json.dumps(node))
    assert run("verify", tmp_path / "forged")[0] == 0
    code, _, errors = run("verify", tmp_path / "forged", "--source", model)
    assert (code, errors.splitlines()) == (1, [f"{NORM}: array differs", f"{UP}: planes differs"])


def test_other_files_and_other_tensors_are_named(model: Path, tmp_path: Path) -> None:
    bincompress.compress(model, tmp_path / "store")
    tensors = tiny_tensors()
    tensors["extra.weight"] = tensors[NORM]
    tensors[UP] = tensors[UP][:-8].copy()
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    (model / "tokenizer.json").write_text("{}")
    (model / "merges.txt").write_text("a b")
    problems = bincompress.verify(tmp_path / "store", source=model).problems
    assert problems["lm_head.weight"].endswith("has no such tensor")
    assert problems["extra.weight"].endswith("and not in the store")
    assert problems[UP].startswith("shape [160, 64]; ")
    assert problems["tokenizer.json"].startswith("differs from that of")
    assert problems["merges.txt"].endswith("alone")
    assert "zarr.json: source.fingerprint" in problems
    assert len(problems) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {}}, "was trained, so its bytes do not follow from a source alone"),
        ({"distillation": {}}, "was distilled, so its bytes do not follow"),
        ({"statistics": {"text": "0"}}, "was calibrated layer after layer"),
        ({"status": "incomplete"}, "not complete; run the same"),
    ],
)
def test_what_cannot_be_proved_is_refused(
    model: Path, tmp_path: Path, run: Run, changes: dict[str, Any], message: str
) -> None:
    bincompress.compress(model, tmp_path / "store")
    change_root(tmp_path / "store", **changes)
    code, out, errors = run("verify", tmp_path / "store", "--source", model)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert message in errors


def test_bytes_of_another_version_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bincompress.compress(model, tmp_path / "store")
    monkeypatch.setattr("bincompress.compression.recompute.BYTES_VERSION", 4)
    with pytest.raises(StoreError, match=r"whose bytes are others; .* \(bytes_version 3; here 4\)"):
        bincompress.verify(tmp_path / "store", source=model)


def test_a_damaged_store_and_odd_arguments(model: Path, tmp_path: Path, run: Run) -> None:
    bincompress.compress(model, tmp_path / "store")
    for options in (("--sample", 2), ("--statistics", "x")):
        code, _, errors = run("verify", tmp_path / "store", *options)
        assert (code, "are for --source MODEL" in errors) == (2, True)
    assert run("verify", tmp_path / "store", "--source", tmp_path / "missing")[0] == 2
    assert run("verify", tmp_path / "store", "--source", model, "--statistics", tmp_path / "missing")[0] == 2
    assert run("verify", tmp_path / "store", "--source", model, "--sample", 0)[0] == 2
    chunk = tmp_path / "store" / "tensors" / UP / "planes" / "c" / "0" / "0" / "0"
    chunk.write_bytes(bytes(8) + chunk.read_bytes()[8:])
    code, _, errors = run("verify", tmp_path / "store", "--source", model)
    assert (code, errors.count(UP) >= 1) == (1, True)
    with pytest.raises(BincompressError, match="--sample and --statistics are for --source MODEL"):
        bincompress.verify(tmp_path / "store", sample=3)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("config", {"rms_norm_eps": 0.5, "rope_theta": 1.5}, ["config.rms_norm_eps", "config.rope_theta"]),
        ("config", {"made_up": 1}, ["config.made_up"]),
        ("source", {"fingerprint": "0" * 32}, ["source.fingerprint"]),
        ("fused", ["model.layers.0.mlp.experts"], ["fused"]),
        ("keep_weights", {UP: [[0, 1]]}, ["keep_weights"]),
        ("keep_weights", {"no.tensor": [[0, 1]]}, ["keep_weights"]),
        ("archive", True, ["archive"]),
        ("failures", {UP: "x"}, ["failures"]),
        ("made_up", 1, ["made_up"]),
    ],
)
def test_a_changed_root_is_named(model: Path, tmp_path: Path, run: Run, key: str, value: Any, named: list[str]) -> None:
    """The engine runs the config in the root, which config.json beside it says nothing of."""
    bincompress.compress(model, tmp_path / "store")
    before = open_store(str(tmp_path / "store")).attributes.get(key)
    change_root(tmp_path / "store", **{key: {**before, **value} if isinstance(before, dict) else value})
    code, _, errors = run("verify", tmp_path / "store", "--source", model, "--sample", 1)
    assert code == 1
    for each in named:
        assert f"zarr.json: {each}: " in errors


@pytest.mark.parametrize("differs", [False, True])
def test_lossless_matrices_and_those_that_fell_back(tmp_path: Path, differs: bool) -> None:
    """A weight that no sample shows makes a matrix fall back to the recipe's settings."""
    tensors = tiny_tensors()
    for name in [name for name in tensors if "proj" in name]:
        values = np.where(np.arange(tensors[name].size).reshape(tensors[name].shape) % 3 == 0, 0.5, -0.5)
        values[1, 5:10] = (0.123, 0.77, 0.9, 0.31, 0.111) if differs else 0.5
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    source = write_model(tmp_path / "few", tensors, tiny_config(), shards=2)
    bincompress.compress(source, tmp_path / "store")
    store = open_store(str(tmp_path / "store"))
    assert store.complete_attributes(UP)["method"] == ("wgm" if differs else "lossless")
    assert bincompress.verify(tmp_path / "store", source=source).problems == {}
