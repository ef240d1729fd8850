"""Is a checkpoint that lies, lacks something or leads out of its folder refused, and by name?"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import Recipe
from bincompress.errors import CheckpointError
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from tests.conftest import tiny_config, tiny_tensors, write_model


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    found: dict[str, Any] = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    return found


def rewrite(path: Path, header: dict[str, Any]) -> None:
    content = path.read_bytes()
    data = content[8 + struct.unpack("<Q", content[:8])[0] :]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_model(tmp_path / "single", tiny_tensors(layers=1), tiny_config(layers=1))


def test_tensors_are_read_as_they_were_written(tiny_model: Path) -> None:
    checkpoint = open_checkpoint(tiny_model)
    tensors = tiny_tensors()
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, source in checkpoint.tensors.items():
        np.testing.assert_array_equal(
            read_weight(source).bits.reshape(tensors[name].shape), tensors[name].view(np.uint16)
        )


def test_truncated_file(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"lie outside the [\d,]+ bytes .*truncated"):
        open_checkpoint(single)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not safetensors"),
        (b"\x10\0\0", "truncated or not safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", "truncated or not safetensors"),
        (struct.pack("<Q", 4) + b"[1]\n", "expected a JSON object"),
        (struct.pack("<Q", 4) + b"{{{{", "header not readable"),
        (struct.pack("<Q", 2) + b"{}", "hold no tensors"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "header not readable"),
    ],
)
def test_malformed_header(single: Path, content: bytes, message: str) -> None:
    (single / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(single)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [96, 63]}, "needs 12,096 bytes, the header gives 12,288"),
        ({"shape": [1 << 40, 1 << 40]}, "needs"),
        ({"shape": [-96, 64]}, "not a name and whole numbers"),
        ({"shape": "96"}, "not a name and whole numbers"),
        ({"data_offsets": [0, 1 << 50]}, "not a name and whole numbers"),
        ({"data_offsets": [0, 1 << 40]}, "lie outside"),
        ({"data_offsets": [100, 0]}, "lie outside"),
        ({"data_offsets": [0]}, "expected dtype, shape and data_offsets"),
        ({"dtype": 7}, "not a name and whole numbers"),
        ({"data_offsets": [2, 12290]}, "overlaps"),
    ],
)
def test_lying_header(single: Path, change: dict[str, Any], message: str) -> None:
    path = single / "model.safetensors"
    header = header_of(path)
    assert header["lm_head.weight"]["data_offsets"] == [0, 12288]
    header["lm_head.weight"] |= change
    rewrite(path, header)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(single)


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", "a..b", "", "x\0y", "a" * 300])
def test_tensor_names_that_could_leave_the_store(single: Path, name: str) -> None:
    path = single / "model.safetensors"
    header = header_of(path)
    header[name] = header.pop("lm_head.weight")
    rewrite(path, header)
    with pytest.raises(CheckpointError, match="expected a tensor name"):
        open_checkpoint(single)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "config.json"])
def test_index_that_points_outside_the_folder(tiny_model: Path, file: str) -> None:
    index = tiny_model / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file in that folder"):
        open_checkpoint(tiny_model)


def test_index_that_names_what_is_not_there(tiny_model: Path) -> None:
    index = tiny_model / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    swapped = {
        name: f"model-0000{1 + ('1-of' not in file) % 2}-of-00002.safetensors"
        for name, file in found["weight_map"].items()
    }
    swapped["mtp.fc.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": swapped}))
    checkpoint = open_checkpoint(tiny_model)
    assert list(checkpoint.tensors) == sorted(tiny_tensors())
    assert checkpoint.notes == ("model.safetensors.index.json names 1 tensors that no file holds: mtp.fc.weight",)
    (tiny_model / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing, but .* names it"):
        open_checkpoint(tiny_model)


def test_a_whole_file_comes_before_an_index(tiny_model: Path) -> None:
    other = tiny_tensors(seed=3)
    safetensors.numpy.save_file(other, tiny_model / "model.safetensors")
    checkpoint = open_checkpoint(tiny_model)
    assert {Path(tensor.file).name for tensor in checkpoint.tensors.values()} == {"model.safetensors"}
    assert "model.safetensors is read" in checkpoint.notes[0]
    assert "model.safetensors.index.json" in checkpoint.notes[0]
    for shard in tiny_model.glob("model-*"):
        shard.unlink()
    assert list(open_checkpoint(tiny_model).tensors) == sorted(other)


@pytest.mark.parametrize("overlay", ["overlay", "zz-overlay"])
def test_overlay_shards(tmp_path: Path, overlay: str) -> None:
    """The index names the overlay for one tensor; transformers takes the later of the files' names."""
    base, changed = tiny_tensors(), tiny_tensors(seed=4)["lm_head.weight"]
    folder = write_model(tmp_path / "m", base, tiny_config())
    (folder / "model.safetensors").rename(folder / "q-base.safetensors")
    safetensors.numpy.save_file({"lm_head.weight": changed}, folder / f"{overlay}.safetensors")
    where = dict.fromkeys(base, "q-base.safetensors") | {"lm_head.weight": f"{overlay}.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    if overlay == "overlay":
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: in both .* different values, and the index names"):
            open_checkpoint(folder)
        safetensors.numpy.save_file({"lm_head.weight": base["lm_head.weight"]}, folder / f"{overlay}.safetensors")
        changed = base["lm_head.weight"]
    found = read_weight(open_checkpoint(folder).tensors["lm_head.weight"])
    np.testing.assert_array_equal(found.bits, changed.view(np.uint16))


def test_a_whole_set_without_an_index(tiny_model: Path) -> None:
    (tiny_model / "model.safetensors.index.json").unlink()
    assert open_checkpoint(tiny_model).notes == ()
    second = {"tok_embeddings.weight": tiny_tensors()["lm_head.weight"]}
    safetensors.numpy.save_file(second, tiny_model / "consolidated.safetensors")
    checkpoint = open_checkpoint(tiny_model)
    assert list(checkpoint.tensors) == sorted(tiny_tensors())
    assert "not used: consolidated.safetensors" in checkpoint.notes[0]
    (tiny_model / "model-00002-of-00002.safetensors").rename(tiny_model / "part.safetensors")
    safetensors.numpy.save_file(
        {"lm_head.weight": tiny_tensors(seed=2)["lm_head.weight"]}, tiny_model / "x.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"different values, and no index says which"):
        open_checkpoint(tiny_model)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_is_called_one(single: Path, name: str) -> None:
    (single / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: a Git LFS pointer, not the file itself"):
        open_checkpoint(single)


def test_folders_of_other_kinds_are_called_what_they_are(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "o/m"}')
    safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, adapter / "adapter_model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"an adapter \(LoRA or the like\) of 'o/m', not a whole model"):
            open_checkpoint(adapter)
        (adapter / "config.json").write_text("{}")
    cache = tmp_path / "models--o--m"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for folder in (cache, tmp_path):
        with pytest.raises(CheckpointError, match=r"a folder of the Hub's cache; give the model in it, such as .*abc"):
            open_checkpoint(folder)


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        open_checkpoint(tmp_path)


def test_shapes_that_contradict_the_config(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "wrong", tiny_tensors(), {**tiny_config(), "intermediate_size": 161})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: shape \[64, 160\] contradicts .* \[64, 161\]"):
        make_plan(open_checkpoint(folder), Recipe())


def test_file_that_shrinks_after_the_plan(single: Path) -> None:
    source = open_checkpoint(single).tensors["model.norm.weight"]
    (single / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="has 5 bytes, the tensor ends at"):
        read_weight(source)
