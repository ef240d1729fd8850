"""Does transformers load what `export` writes, with the weights that the store stands for?"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import StoreError
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.export import export
from bincompress.store.store import Store, open_store
from bincompress.tensors.dequantize import dequantize, to_bfloat16
from tests.test_model_tokenizer import byte_level

pytestmark = pytest.mark.slow  # PyTorch and transformers


@pytest.fixture
def store(tiny_model: Path, tmp_path: Path) -> Store:
    compress(make_plan(open_checkpoint(tiny_model), load_recipe(None, {"embeddings": "8bit"})), str(tmp_path / "store"))
    return open_store(str(tmp_path / "store"))


def test_transformers_loads_an_export(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bincompress.store.export._SHARD_BYTES", 30_000)
    folder = export(store, tmp_path / "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    assert set(store.tensors()) == set(state)
    for name, kind in store.tensors().items():
        if kind == "packed":
            expected = dequantize(store.read_packed(name))
            np.testing.assert_allclose(state[name].numpy(), expected, rtol=2**-8, atol=1e-8)
        else:
            np.testing.assert_array_equal(
                state[name].numpy(), store.read_plain(name)[0].float32().reshape(state[name].shape)
            )


def test_exports_are_checkpoints_again(store: Store, tmp_path: Path) -> None:
    folder = export(store, tmp_path / "out")
    make_plan(open_checkpoint(folder), load_recipe(None, {}))
    with pytest.raises(StoreError, match="exists and is not an empty folder"):
        export(store, folder)
    assert not list(tmp_path.glob(".out*"))


def test_a_damaged_store_exports_nothing(store: Store, tmp_path: Path) -> None:
    name = next(name for name, kind in store.tensors().items() if kind == "packed")
    (Path(store.url) / "tensors" / name / "planes" / "c" / "0" / "0" / "0").write_bytes(b"short")
    with pytest.raises(StoreError, match=f"{name}: array planes cannot be read"):
        export(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rounding_to_bfloat16_is_to_nearest_ties_to_even() -> None:
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    values = np.concatenate([values, np.array([1.00390625, 1.01171875, 0.0, -0.0], np.float32)])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bfloat16(values), expected)


def test_a_tokenizer_without_tokenizer_json_comes_out_again(tiny_model: Path, tmp_path: Path) -> None:
    """Of vocab.json and merges.txt with added tokens: without them it loads all the same, and gives nonsense."""
    model = json.loads(byte_level())["model"]
    (tiny_model / "tokenizer.json").unlink()
    (tiny_model / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (tiny_model / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tiny_model / "added_tokens.json").write_text(json.dumps({"<|x|>": len(model["vocab"])}))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    (tiny_model / "tokenizer_config.json").write_text(json.dumps(config))
    compress(make_plan(open_checkpoint(tiny_model), load_recipe(None, {})), str(tmp_path / "store"))
    out = export(open_store(str(tmp_path / "store")), tmp_path / "out")
    expected = transformers.AutoTokenizer.from_pretrained(tiny_model)("the <|x|> upon")["input_ids"]
    assert len(expected) > 3
    assert transformers.AutoTokenizer.from_pretrained(out)("the <|x|> upon")["input_ids"] == expected
