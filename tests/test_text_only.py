"""--text-only: the language model of a larger one becomes a store of its own, and what is left out is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.inference.load import load_decoder
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_tokenizer, write_model
from tests.test_declarations import WORDS, config_of


def whole(folder: Path) -> Path:
    """Write a made Gemma 3 that also sees: a language model under a prefix, and a tower."""
    text = config_of("Gemma3ForCausalLM")
    random = np.random.default_rng(5)
    tensors: dict[str, np.ndarray] = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: (
            0.2 * random.standard_normal(shape)
        ).astype(np.float32)
        for name, shape in parse(text).tensors().items()
    }
    tensors["model.vision_tower.encoder.layers.0.fc1.weight"] = np.ones((32, 16), np.float32)
    tensors["model.multi_modal_projector.norm.weight"] = np.ones(16, np.float32)
    config: dict[str, Any] = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    config |= {"text_config": text, "vision_config": {"hidden_size": 16}, "tie_word_embeddings": False}
    write_model(folder, tensors, config)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(96)))
    return folder


def logits(store: Path) -> np.ndarray:
    decoder = load_decoder(str(store), 1, ActivationSettings(16)).decoder
    return decoder.logits([5, 6, 7, 8, 9, 10, 11], decoder.new_cache(16))


def test_the_language_model_alone_runs_alike_and_is_exported_as_itself(tmp_path: Path, run: Run) -> None:
    model = whole(tmp_path / "model")
    planned = run("compress", model, tmp_path / "alone", "--text-only", "--dry-run")
    assert planned[0] == 0, planned[2]
    found = run("compress", model, tmp_path / "alone", "--text-only")
    assert found[0] == 0, found[2]
    left_out = "left out (--text-only): model.multi_modal_projector.* (1 tensors, 16 weights), model.vision_tower.* "
    for said in (planned, found):
        assert left_out + "(1 tensors, 512 weights)" in said[1] + said[2]
        assert "what sees or hears beside it is kept" not in said[1] + said[2]
    assert run("compress", model, tmp_path / "both")[0] == 0
    assert np.array_equal(logits(tmp_path / "alone"), logits(tmp_path / "both"))
    assert run("export", tmp_path / "alone", tmp_path / "back")[0] == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Gemma3ForCausalLM"], "gemma3_text")
    assert not (tmp_path / "back" / "preprocessor_config.json").exists()
    store = open_store(str(tmp_path / "alone"))
    assert set(store.attributes["tensors"]) == set(parse(config).tensors())


def test_statistics_are_of_the_language_model_too(tmp_path: Path, run: Run) -> None:
    model, text = whole(tmp_path / "model"), tmp_path / "text"
    text.write_text(WORDS)
    samples = ("--text", text, "--samples", 4, "--context", 16)
    assert run("calibrate", model, tmp_path / "stats", "--text-only", *samples)[0] == 0
    options = ("--stats", tmp_path / "stats", "--compensate")
    assert run("compress", model, tmp_path / "store", "--text-only", *options)[0] == 0
    refused = run("compress", model, tmp_path / "other", *options)
    assert refused[0] == 2
    assert "statistics of another model" in refused[2]


def test_a_model_without_towers_is_refused(tiny_model: Path, tmp_path: Path, run: Run) -> None:
    code, _, error = run("compress", tiny_model, tmp_path / "store", "--text-only")
    assert code == 2
    assert (
        "--text-only: config.json of model_type 'llama' is not that of a model whose language model is known" in error
    )
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", ["llava", 7])
def test_a_larger_model_that_is_not_known_is_refused(kind: object, tmp_path: Path, run: Run) -> None:
    model = whole(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    code, _, error = run("compress", model, tmp_path / "store", "--text-only")
    assert code == 2
    assert f"model_type {kind!r} is not that of a model" in error
