"""Does the store that training writes hold what was trained, and do store and command say how it went?"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bincompress import api
from bincompress.distillation import memory
from bincompress.distillation.settings import DistillSettings, LayerSettings
from bincompress.inference.load import load_decoder
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_config
from tests.training import MODEL, assert_engine_gives_what_training_saw, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]  # PyTorch


def test_the_store_has_the_size_of_its_start_and_the_engine_gives_what_training_saw(
    letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    api.compress(letters_model, tmp_path / "start", groups=2, block=64)
    out = tmp_path / "out"
    trained(letters_model, letters_text, out, start=str(tmp_path / "start"), model=MODEL)
    before, after = (api.inspect(tmp_path / name)["tensors"] for name in ("start", "out"))
    for name, report in after.items():
        if report["method"] == "wgm":
            assert report["stored_bits"] == before[name]["stored_bits"]
            assert report["nominal_bits"] == before[name]["nominal_bits"]
    assert api.verify(out).ok
    assert_engine_gives_what_training_saw(out, letters_model, np.random.default_rng(0).integers(0, 94, 48))


def test_one_plane_eight_bit_scales_and_packed_embeddings(
    letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    found = trained(
        letters_model, letters_text, tmp_path / "out", planes=1, block=64, scale_bits=8, embeddings="8bit", model=MODEL
    )
    assert found.model["best"] < found.model["start"]
    report = api.inspect(tmp_path / "out")["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert report["stored_bits"] == pytest.approx((3 * 64 + 3 * 8) / 160, rel=0.01)  # 3 words and 3 scales a row
    assert report["nominal_bits"] == pytest.approx(1 + 8 * 3 / 160)
    attributes = open_store(str(tmp_path / "out")).complete_attributes("model.layers.0.mlp.down_proj.weight")
    assert attributes["settings"]["scale_bits"] == 8
    assert api.verify(tmp_path / "out").ok
    load_decoder(str(tmp_path / "out"), 1, ActivationSettings())


def test_the_store_says_how_it_was_trained(letters_model: Path, letters_text: Path, tmp_path: Path, run: Run) -> None:
    trained(letters_model, letters_text, tmp_path / "out", model=MODEL)
    record = open_store(str(tmp_path / "out")).attributes["training"]
    assert record["layers"]["settings"]["windows"] == 24
    assert [report["layer"] for report in record["reports"]] == [0, 1]
    _, shown, _ = run("inspect", tmp_path / "out")
    assert "trained: 2 layers one after the other on 24 windows of 16 tokens, each 4 times, mean held-out loss" in shown
    assert "then: the whole model in 8 steps of 4 x 16 tokens, held-out perplexity" in shown
    page = tmp_path / "page.html"
    run("report", tmp_path / "out", "--out", page)
    assert "Held-out loss by layer" in page.read_text()


def test_the_command_says_which_layers_gained_nothing(
    letters_model: Path, letters_text: Path, tmp_path: Path, run: Run
) -> None:
    small = ["--windows", "8", "--layer-context", "16", "--device", "cpu", "--layer-lr", "3", "--layer-lr-planes", "3"]
    code, out, _ = run("train", letters_model, tmp_path / "out", "--text", letters_text, *small)
    assert code == 0
    assert "did not fall: the layer stays as it was" in out
    assert "of 2 layers gained nothing; more --windows help" in out


def test_scale_bits_go_both_ways(letters_model: Path, letters_text: Path, tmp_path: Path) -> None:
    trained(letters_model, letters_text, tmp_path / "eight", scale_bits=8)
    trained(letters_model, letters_text, tmp_path / "sixteen", start=str(tmp_path / "eight"), scale_bits=16)
    name = "model.layers.0.mlp.down_proj.weight"
    eight, sixteen = (open_store(str(tmp_path / own)).complete_attributes(name) for own in ("eight", "sixteen"))
    assert (eight["settings"]["scale_bits"], sixteen["settings"]["scale_bits"]) == (8, 16)
    more = sixteen["report"]["nominal_bits"] - eight["report"]["nominal_bits"]
    assert more == pytest.approx(2 * 8 * 2 / 160)  # two scales of 8 more bits for each of two blocks of a row of 160


def test_the_command(letters_model: Path, letters_text: Path, tmp_path: Path, run: Run) -> None:
    small = ["--windows", "24", "--layer-context", "16", "--passes", "1", "--device", "cpu", "--threads", "1"]
    code, out, _ = run("train", letters_model, tmp_path / "out", "--text", letters_text, *small)
    assert code == 0
    assert "layer 1: held-out loss" in out
    _, out, _ = run("train", letters_model, tmp_path / "two", "--text", letters_text, *small, "--json")
    assert [layer["layer"] for layer in json.loads(out)["layers"]] == [0, 1]
    code, _, err = run(
        "train", letters_model, tmp_path / "three", "--text", letters_text, "--start", tmp_path / "out", "--planes", "1"
    )
    assert code == 2
    assert "--planes, --block and --embeddings are those of the store given with --start" in err


def test_a_dry_run_tells_layers_tokens_and_memory(
    letters_model: Path, letters_text: Path, tmp_path: Path, run: Run
) -> None:
    given = ("train", letters_model, tmp_path / "out", "--text", letters_text, "--by", "layer+model", "--windows", "24")
    code, out, _ = run(*given, "--dry-run")
    assert code == 0
    assert "layer after layer: 2 layers on 6,144 tokens, each 4 times, about 0.5 GB" in out
    assert "whole model: 1000 steps of 16 x 512 tokens, about" in out
    assert not (tmp_path / "out").exists()
    _, out, _ = run(*given, "--dry-run", "--json")
    assert json.loads(out)["layers"]["tokens"] == 6144


def test_the_memory_that_a_dry_run_tells_grows_with_what_is_trained() -> None:
    config = parse(
        {
            **tiny_config(), "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 151936,
        }
    )  # fmt: skip
    settings = LayerSettings(windows=256, context=256, batch=4, dtype="bf16")
    found = memory.of_layers(config, settings)
    assert found == pytest.approx(2.48e9, rel=0.15)  # the peak that the system counted, 264 windows of a 0.5B model
    more = memory.of_layers(config, replace(settings, windows=512))
    assert more - found == 3 * 4 * 256 * 256 * 896
    assert memory.of_model(config, DistillSettings(batch=4, dtype="bf16")) > 4 * found
