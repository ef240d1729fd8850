"""Single weights that a model depends on: planted, found by running it, kept exactly, and told with the reason."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import bincompress
from bincompress.calibration import super_weights
from bincompress.calibration.super_weights import try_super_weights
from bincompress.errors import RecipeError
from bincompress.inference.evaluate import log_softmax
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import open_store
from bincompress.tensors.dequantize import dequantize
from tests.conftest import Run, tiny_config, tiny_tensors, write_model

NAME = "model.layers.0.mlp.down_proj.weight"
PLACE = (13, 70)


def planted(tied: bool = False) -> dict[str, np.ndarray]:
    tensors = tiny_tensors(layers=3)
    tensors[NAME][PLACE] = 30.0
    tensors["model.layers.2.mlp.down_proj.weight"][5, 9] = 120.0
    if tied:
        del tensors["lm_head.weight"]
    return tensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "planted", planted(), tiny_config(layers=3))


@pytest.fixture(autouse=True)
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that the tiny tokenizer knows."""
    words = np.random.default_rng(4).integers(0, 96, 60)
    monkeypatch.setattr(super_weights, "_PROMPT", " ".join(f"t{word}" for word in words))


def log_probabilities(folder: Path) -> np.ndarray:
    decoder = load_checkpoint(folder)
    ids = [int(word[1:]) for word in super_weights._PROMPT.split()]
    return log_softmax(decoder.logits(ids, decoder.new_cache(128)))


@pytest.mark.parametrize("tied", [False, True])
def test_the_effect_is_that_of_the_model_with_the_weight_set_to_zero(tied: bool, tmp_path: Path) -> None:
    config = {**tiny_config(layers=3), "tie_word_embeddings": tied}
    folder = write_model(tmp_path / "whole", planted(tied=tied), config)
    tried = try_super_weights(open_checkpoint(folder), lambda name: True)
    assert (NAME, *PLACE) in [(weight.name, weight.row, weight.col) for weight in tried]
    assert [weight.effect for weight in tried] == sorted((weight.effect for weight in tried), reverse=True)
    usual = log_probabilities(folder)
    for number, weight in enumerate(tried[:3]):
        assert weight.value == float(planted()[weight.name][weight.row, weight.col])
        tensors = planted(tied=tied)
        tensors[weight.name][weight.row, weight.col] = 0.0
        other = log_probabilities(write_model(tmp_path / f"without-{number}", tensors, config))
        expected = float(np.mean(np.sum(np.exp(usual) * (usual - other), axis=1)))
        assert weight.effect == pytest.approx(expected, rel=1e-3)
        assert weight.effect > 0


def test_they_are_kept_exactly_and_the_summary_says_why(run: Run, model: Path, tmp_path: Path) -> None:
    code, text, error = run("compress", model, tmp_path / "store", "--keep-weights", "auto")
    assert code == 0, error
    assert "kept exactly: 2 of " in text
    assert "setting one of them to zero changes predictions by 0.01 nats a token or more" in text
    line = next(line for line in text.splitlines() if NAME in line)
    assert line.startswith(f"  {NAME} 13 70 (30): ")
    assert float(line.split(": ")[1].split()[0]) >= 0.01
    assert "nats a token" in line
    store = open_store(str(tmp_path / "store"))
    assert store.attributes["keep_weights"] == {NAME: [[13, 70]], "model.layers.2.mlp.down_proj.weight": [[5, 9]]}
    assert dequantize(store.read_packed(NAME))[PLACE] == 30.0
    assert store.complete_attributes(NAME)["report"]["kept"] == 1
    again = run("compress", model, tmp_path / "store", "--keep-weights", "auto")
    assert again[0] == 0
    assert "0 tensors done" in again[1]


def test_python_gets_the_same_lines(model: Path, tmp_path: Path) -> None:
    result = bincompress.compress(model, tmp_path / "store", keep_weights="auto", groups=300, block="matrix")
    assert [NAME in line for line in result.remarks].count(True) == 1
    assert result.remarks[-1].startswith("slow to run: ")


def test_a_model_without_spikes_keeps_none_and_says_so(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    code, text, _ = run("compress", tiny_model, tmp_path / "store", "--keep-weights", "auto")
    assert code == 0
    assert "kept exactly: no single weight; none makes a spike in the output of a down_proj" in text
    assert open_store(str(tmp_path / "store")).attributes["keep_weights"] == {}


def test_a_spike_that_changes_little_is_not_kept(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bincompress.compression.kept_weights.LEAST_EFFECT", 1e6)
    text = run("compress", model, tmp_path / "store", "--keep-weights", "auto")[1]
    assert "kept exactly: 0 of " in text
    assert f"  not kept, the next: {NAME} 13 70 (30): " in text or "  not kept, the next: model.layers.2." in text
    assert not open_store(str(tmp_path / "store")).read_packed(NAME).listed_index.size


def test_a_tensor_that_is_kept_whole_is_not_searched(run: Run, model: Path, tmp_path: Path) -> None:
    options = ("--keep-weights", "auto", "--keep", "model.layers.0.*")
    code, text, error = run("compress", model, tmp_path / "store", *options)
    assert code == 0, error
    assert NAME not in text
    assert open_store(str(tmp_path / "store")).attributes["keep_weights"] == {
        "model.layers.2.mlp.down_proj.weight": [[5, 9]]
    }


def test_a_dry_run_says_that_it_does_not_search(run: Run, model: Path, tmp_path: Path) -> None:
    asked = ("compress", model, tmp_path / "store", "--keep-weights", "auto", "--dry-run", "--rate", "1MB")
    line = "kept exactly: --keep-weights auto runs the model to find them, and a dry run does not"
    assert line in run(*asked)[1]
    assert line in json.loads(run(*asked, "--json")[1])["remarks"]


def test_a_file_may_have_any_name(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("auto").write_text(f"{NAME} 1 2\n")
    assert run("compress", model, "store", "--keep-weights", "./auto")[0] == 0
    assert open_store("store").attributes["keep_weights"] == {NAME: [[1, 2]]}


def test_a_model_that_does_not_run_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    config = {**tiny_config(layers=3), "architectures": ["OtherForCausalLM"], "model_type": "other"}
    folder = write_model(tmp_path / "other", planted(), config)
    code, _, error = run("compress", folder, tmp_path / "store", "--keep-weights", "auto", "--export-only")
    assert code == 2
    assert "--keep-weights auto runs the model, which does not run here: " in error
    assert "OtherForCausalLM" in error
    assert not (tmp_path / "store").exists()


def test_what_else_is_wrong_is_refused_before_the_model_is_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bincompress.compression.kept_weights.try_super_weights", None)
    with pytest.raises(RecipeError, match=r"groups 300: more than 256 are for a whole matrix"):
        bincompress.compress(model, tmp_path / "store", keep_weights="auto", groups=300)


def test_a_model_that_computes_nan_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    tensors = planted()
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = np.array(np.nan, ml_dtypes.bfloat16)
    folder = write_model(tmp_path / "damaged", tensors, tiny_config(layers=3))
    code, _, error = run("compress", folder, tmp_path / "store", "--keep-weights", "auto")
    assert code == 2
    assert "model.layers.1.mlp.down_proj.weight: what comes out of its layer is not finite" in error
    assert not (tmp_path / "store").exists()
