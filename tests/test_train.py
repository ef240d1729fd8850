"""Does training lower what it should, resume without a trace, store what it trained, and refuse by name?"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress import api
from bincompress.distillation import memory
from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.layers import Objective
from bincompress.distillation.model import Student
from bincompress.distillation.settings import DistillError, DistillSettings, LayerSettings
from bincompress.distillation.train_run import Trained
from bincompress.errors import BincompressError
from bincompress.inference.load import load_decoder
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.reporting.inspection import trained_lines
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_config, tiny_tensors, write_model
from tests.test_declarations import WORDS, write
from tests.test_replace import Tree

pytestmark = pytest.mark.slow  # PyTorch

CPU = torch.device("cpu")
LAYERS = LayerSettings(windows=24, context=16, passes=4, batch=4)
MODEL = DistillSettings(
    steps=8, batch=4, context=16, lr=0.01, lr_planes=0.02, planes=True, evaluate_every=4, validation_share=0.2
)


class KilledError(Exception):
    """Stands for the kill of a run."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(letters_model: Path) -> Path:
    return letters_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(map(chr, np.random.default_rng(3).integers(33, 127, 900))))
    return file


def trained(source: Path, text: Path, out: Path, **more: Any) -> Trained:
    return api.train(source, str(out), text, **{"layers": LAYERS, "device": "cpu", **more})


def tensors_of(store: Path) -> dict[str, str]:
    """Return what a store has but its times: hashes by tensor and array."""
    opened = open_store(str(store))
    return {name: json.dumps(opened.complete_attributes(name), sort_keys=True) for name in opened.tensors()}


# Layer after layer


def test_layers_learn_and_the_same_run_gives_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trained(model, text, tmp_path / "a")
    assert not caplog.messages
    assert [report.layer for report in first.layers] == [0, 1]
    for report, factor in zip(first.layers, (0.85, 0.95), strict=True):
        assert report.held_out < factor * report.held_out_start
        assert 0.001 < report.flips < 0.2
    second = trained(model, text, tmp_path / "b")
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")
    assert [replace(r, seconds=0) for r in first.layers] == [replace(r, seconds=0) for r in second.layers]
    other = trained(model, text, tmp_path / "c", layers=replace(LAYERS, seed=1))
    assert tensors_of(tmp_path / "c") != tensors_of(tmp_path / "a")
    assert other.layers[1].held_out == pytest.approx(first.layers[1].held_out, rel=0.2)
    assert api.verify(tmp_path / "a").ok
    assert not list(tmp_path.glob(".*"))  # what a run keeps to be resumed is removed


@pytest.mark.parametrize("by", ["layer", "model", "layer+model"])
def test_a_resumed_run_equals_one_without_interruption(by: str, model: Path, text: Path, tmp_path: Path) -> None:
    chosen = {"layers": LAYERS if "layer" in by else None, "model": MODEL if "model" in by else None}
    trained(model, text, tmp_path / "whole", **chosen, checkpoint_every=2)

    def after_the_first_layer(done: int, total: int, line: str) -> None:
        if "held out" in line:
            raise KilledError

    def after_step_5(progress: Any) -> None:
        if progress.step == 5:
            raise KilledError

    def run(**callbacks: Any) -> None:
        trained(model, text, tmp_path / "resumed", **chosen, checkpoint_every=2, **callbacks)

    if "layer" in by:
        with pytest.raises(KilledError):
            run(on_layers=after_the_first_layer)
        assert len(list(tmp_path.glob(".resumed.distill/*/layer-*.safetensors"))) == 1
    if "model" in by:
        with pytest.raises(KilledError):
            run(on_step=after_step_5)
    assert not (tmp_path / "resumed").exists()
    run()
    assert tensors_of(tmp_path / "resumed") == tensors_of(tmp_path / "whole")
    attributes = [open_store(str(tmp_path / name)).attributes for name in ("whole", "resumed")]
    for key in ("training", "distillation"):
        assert attributes[0].get(key) == attributes[1].get(key)


INDEPENDENT = replace(LAYERS, inputs="unquantized")


@pytest.mark.parametrize("finish", [0, 1])
def test_independent_layers_learn_and_resume(finish: int, model: Path, text: Path, tmp_path: Path) -> None:
    layers = replace(INDEPENDENT, finish_passes=finish)
    found = trained(model, text, tmp_path / "whole", layers=layers)
    assert [report.layer for report in found.independent] == [0, 1]
    assert len(found.layers) == (2 if finish else 0)
    for report in found.independent:
        assert report.held_out < 0.95 * report.held_out_start
    stops = 1 + finish  # layers complete

    def stop(done: int, total: int, line: str) -> None:
        nonlocal stops
        stops -= "held out" in line
        if not stops:
            raise KilledError

    with pytest.raises(KilledError):
        trained(model, text, tmp_path / "resumed", layers=layers, on_layers=stop)
    with pytest.raises(DistillError, match="a run with other settings, text or store was interrupted here"):
        trained(model, text, tmp_path / "resumed", layers=LAYERS)
    trained(model, text, tmp_path / "resumed", layers=layers)
    assert tensors_of(tmp_path / "resumed") == tensors_of(tmp_path / "whole")
    attributes = [open_store(str(tmp_path / name)).attributes for name in ("whole", "resumed")]
    assert attributes[0]["training"] == attributes[1]["training"]
    lines = trained_lines(attributes[0])
    assert "2 layers each by itself" in lines[0]
    assert len(lines) == 1 + finish
    assert not list(tmp_path.glob(".*"))


def test_layers_that_read_each_other_are_not_trained_on_a_cluster(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(BincompressError, match="--layer-inputs unquantized makes them independent"):
        trained(model, text, tmp_path / "out", runner="ray")


def test_a_layers_file_of_another_run_or_a_damaged_one_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, line: str) -> None:
        if "held out" in line:
            raise KilledError

    with pytest.raises(KilledError):
        trained(model, text, tmp_path / "out", on_layers=stop)
    with pytest.raises(DistillError, match="a run with other settings, text or store was interrupted here"):
        trained(model, text, tmp_path / "out", layers=replace(LAYERS, lr=0.02))
    (file,) = tmp_path.glob(".out.distill/*/layer-*.safetensors")
    content = bytearray(file.read_bytes())
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DistillError, match="not a readable file of a trained layer"):
        trained(model, text, tmp_path / "out")
    trained(model, text, tmp_path / "out", overwrite=True)


def test_a_token_with_massive_activations_counts_as_one() -> None:
    """The first tokens of real models are thousands of times larger; unweighted, a layer would learn them alone."""
    inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    targets = inputs + 0.5 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    targets[:, 0] *= 1000
    objective = Objective(inputs, targets)
    found = targets * 1.1  # each token off by a tenth of its size
    assert float(objective(found, targets)) == pytest.approx(10 * float(objective(found, targets)) / 10)
    one = targets.clone()
    one[:, 0] *= 1.1
    assert float(objective(one, targets)) == pytest.approx(float(objective(found, targets)) / 5, rel=1e-3)


# The store


def test_the_store_has_the_size_of_its_start_and_the_engine_gives_what_training_saw(
    model: Path, text: Path, tmp_path: Path
) -> None:
    api.compress(model, tmp_path / "start", groups=2, block=64)
    out = tmp_path / "out"
    trained(model, text, out, start=str(tmp_path / "start"), model=MODEL)
    before, after = (api.inspect(tmp_path / name)["tensors"] for name in ("start", "out"))
    for name, report in after.items():
        if report["method"] == "wgm":
            assert report["stored_bits"] == before[name]["stored_bits"]
            assert report["nominal_bits"] == before[name]["nominal_bits"]
    assert api.verify(out).ok
    engine = load_decoder(str(out), 1, ActivationSettings(16)).decoder
    ids = np.random.default_rng(0).integers(0, 94, 48)
    config, opened = parse(open_checkpoint(model).config), open_store(str(out))
    weights = {k: v.detach() for k, v in Student.of_store(opened, config, CPU, torch.float32, False).weights().items()}
    decoder = TorchDecoder(config, CPU, 48)
    with torch.no_grad():
        expected = decoder.head(weights, decoder.states(weights, torch.from_numpy(ids)[None]))[0].numpy()
    found = np.asarray(engine.logits(ids, engine.new_cache(48)))
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["Gemma3", "SmolLM3", "Olmo2", "Olmo3", "Granite", "GraniteMoeHybrid", "Phi3"])
def test_other_architectures_learn_and_run(kind: str, tmp_path: Path) -> None:
    """Each with its norms, scales and windows: what was trained is what the engine runs."""
    model, out = write(tmp_path / "model", f"{kind}ForCausalLM"), tmp_path / "out"
    (tmp_path / "text.txt").write_text(WORDS)
    layers = replace(LAYERS, windows=12, lr_planes=0.02)
    steps = replace(MODEL, steps=4, evaluate_every=2)
    found = trained(model, tmp_path / "text.txt", out, layers=layers, model=steps, block=64)
    start, end = (sum(getattr(report, key) for report in found.layers) for key in ("held_out_start", "held_out"))
    assert end < 0.95 * start
    engine = load_decoder(str(out), 1, ActivationSettings(16)).decoder
    config, opened, ids = parse(open_checkpoint(model).config), open_store(str(out)), np.arange(2, 50)
    weights = {k: v.detach() for k, v in Student.of_store(opened, config, CPU, torch.float32, False).weights().items()}
    decoder = TorchDecoder(config, CPU, 48)
    with torch.no_grad():
        expected = decoder.head(weights, decoder.states(weights, torch.from_numpy(ids)[None]))[0].numpy()
    found_logits = np.asarray(engine.logits(ids, engine.new_cache(48)))
    assert np.abs(found_logits - expected).max() < 1e-3 * np.abs(expected).max()


def test_one_plane_eight_bit_scales_and_packed_embeddings(model: Path, text: Path, tmp_path: Path) -> None:
    found = trained(model, text, tmp_path / "out", planes=1, block=64, scale_bits=8, embeddings="8bit", model=MODEL)
    assert found.model["best"] < found.model["start"]
    report = api.inspect(tmp_path / "out")["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert report["stored_bits"] == pytest.approx((3 * 64 + 3 * 8) / 160, rel=0.01)  # 3 words and 3 scales a row
    assert report["nominal_bits"] == pytest.approx(1 + 8 * 3 / 160)
    attributes = open_store(str(tmp_path / "out")).complete_attributes("model.layers.0.mlp.down_proj.weight")
    assert attributes["settings"]["scale_bits"] == 8
    assert api.verify(tmp_path / "out").ok
    load_decoder(str(tmp_path / "out"), 1, ActivationSettings())


@pytest.mark.parametrize("method", [{"method": "dbllm", "block": 64}, {"method": "wgm", "groups": 3, "block": 64}])
def test_other_sums_of_planes_learn_too(method: dict[str, Any], model: Path, text: Path, tmp_path: Path) -> None:
    api.compress(model, tmp_path / "start", **method)
    found = trained(model, text, tmp_path / "out", start=str(tmp_path / "start"))
    assert all(report.held_out < 0.95 * report.held_out_start for report in found.layers)
    assert api.verify(tmp_path / "out").ok


def test_the_store_says_how_it_was_trained(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    trained(model, text, tmp_path / "out", model=MODEL)
    record = open_store(str(tmp_path / "out")).attributes["training"]
    assert record["layers"]["settings"]["windows"] == 24
    assert [report["layer"] for report in record["reports"]] == [0, 1]
    _, shown, _ = run("inspect", tmp_path / "out")
    assert "trained: 2 layers one after the other on 24 windows of 16 tokens, each 4 times, mean held-out loss" in shown
    assert "then: the whole model in 8 steps of 4 x 16 tokens, held-out perplexity" in shown
    page = tmp_path / "page.html"
    run("report", tmp_path / "out", "--out", page)
    assert "Held-out loss by layer" in page.read_text()


# Refused before the work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda t: {"layers": None}, "nothing to train: expected layers or model"),
        (lambda t: {"layers": replace(LAYERS, windows=60)}, "expected at least 68, 8 of them to judge"),
        (lambda t: {"layers": replace(LAYERS, context=10**6)}, "the model's limit"),
        (lambda t: {"start": str(t / "nothing")}, "nothing: no such store"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: Callable[[Path], dict[str, Any]], message: str, model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(BincompressError, match=message):
        trained(model, text, tmp_path / "out", **options(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_and_a_store_of_another_model_are_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    api.compress(model, tmp_path / "taken")
    before = Tree(str(tmp_path / "taken")).all()
    with pytest.raises(DistillError, match="taken: exists; choose another STORE, or --overwrite"):
        trained(model, text, tmp_path / "taken")
    assert Tree(str(tmp_path / "taken")).all() == before
    other = write_model(tmp_path / "other", tiny_tensors(), {**tiny_config(), "rms_norm_eps": 1e-4})
    api.compress(other, tmp_path / "theirs")
    with pytest.raises(DistillError, match="give the checkpoint that it was made from as SOURCE"):
        trained(model, text, tmp_path / "out", start=str(tmp_path / "theirs"))


def killed_after_a_layer(model: Path, text: Path, out: Path, **more: Any) -> None:
    def stop(done: int, total: int, line: str) -> None:
        if "held out" in line:
            raise KilledError

    with pytest.raises(KilledError):
        trained(model, text, out, on_layers=stop, **more)


def test_what_an_interrupted_run_of_another_kind_has_trained_is_neither_used_nor_removed(
    model: Path, text: Path, tmp_path: Path
) -> None:
    killed_after_a_layer(model, text, tmp_path / "a")
    with pytest.raises(DistillError, match="a run with --by layer was interrupted here"):
        trained(model, text, tmp_path / "a", layers=None, model=MODEL)
    assert list(tmp_path.glob(".a.distill/*/layer-0000.safetensors"))

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        trained(model, text, tmp_path / "b", model=MODEL, checkpoint_every=1, on_step=stop)
    with pytest.raises(DistillError, match="a run with --by model was interrupted here"):
        trained(model, text, tmp_path / "b")
    for file in tmp_path.glob(".b.distill/*/layer-*.safetensors"):
        file.unlink()
    with pytest.raises(DistillError, match="a run with other settings was interrupted here: its layers was different"):
        trained(model, text, tmp_path / "b", layers=None, model=MODEL, checkpoint_every=1)


def test_files_and_stores_of_the_user_in_the_work_folder_stay(model: Path, text: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    api.compress(model, work / "start", groups=2, block=64)
    before = Tree(str(work / "start")).all()
    for name in ("checkpoint.pt", "layer-notes.pt", "layer-0000.safetensors"):
        (work / name).write_text("mine")
    trained(model, text, tmp_path / "a", start=str(work / "start"), work=work)
    trained(model, text, tmp_path / "b", work=work, overwrite=True)
    assert Tree(str(work / "start")).all() == before
    assert sorted(path.name for path in work.iterdir()) == [
        "checkpoint.pt", "layer-0000.safetensors", "layer-notes.pt", "start",
    ]  # fmt: skip
    with pytest.raises(DistillError, match="lies in STORE"):
        trained(model, text, tmp_path / "c", work=tmp_path / "c" / "work")


def test_refusals_come_before_anything_is_removed(model: Path, text: Path, tmp_path: Path) -> None:
    killed_after_a_layer(model, text, tmp_path / "out")
    for wrong in (
        {"start": str(tmp_path / "none")},
        {"start": str(tmp_path / "out")},
        {"model": replace(MODEL, batch=400)},
    ):
        with pytest.raises(BincompressError):
            trained(model, text, tmp_path / "out", overwrite=True, **wrong)
    assert list(tmp_path.glob(".out.distill/*/layer-0000.safetensors"))


def test_a_layer_that_does_not_gain_stays_as_it_began(model: Path, text: Path, tmp_path: Path) -> None:
    found = trained(model, text, tmp_path / "out", layers=replace(LAYERS, lr=3.0, lr_planes=3.0))
    assert any(report.flips == 0 and report.held_out == report.held_out_start for report in found.layers)
    assert all(report.held_out <= report.held_out_start for report in found.layers)
    with pytest.raises(DistillError, match=r"the loss of layer 1 became .*; try a smaller --layer-lr"):
        trained(model, text, tmp_path / "nan", layers=replace(LAYERS, lr=1e30))


def test_trained_layers_are_a_result_where_the_whole_model_does_not_gain(
    model: Path, text: Path, tmp_path: Path
) -> None:
    found = trained(model, text, tmp_path / "out", model=replace(MODEL, lr=100.0, lr_planes=100.0, steps=2))
    assert found.model["best_step"] == 0
    trained(model, text, tmp_path / "layers")
    assert [api.inspect(tmp_path / name)["total"]["binary"] for name in ("out", "layers")] == [
        api.inspect(tmp_path / "layers")["total"]["binary"]
    ] * 2


def test_the_command_says_which_layers_gained_nothing(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    small = ["--windows", "8", "--layer-context", "16", "--device", "cpu", "--layer-lr", "3", "--layer-lr-planes", "3"]
    code, out, _ = run("train", model, tmp_path / "out", "--text", text, *small)
    assert code == 0
    assert "did not fall: the layer stays as it was" in out
    assert "of 2 layers gained nothing; more --windows help" in out


def test_scale_bits_go_both_ways(model: Path, text: Path, tmp_path: Path) -> None:
    trained(model, text, tmp_path / "eight", scale_bits=8)
    trained(model, text, tmp_path / "sixteen", start=str(tmp_path / "eight"), scale_bits=16)
    name = "model.layers.0.mlp.down_proj.weight"
    eight, sixteen = (open_store(str(tmp_path / own)).complete_attributes(name) for own in ("eight", "sixteen"))
    assert (eight["settings"]["scale_bits"], sixteen["settings"]["scale_bits"]) == (8, 16)
    more = sixteen["report"]["nominal_bits"] - eight["report"]["nominal_bits"]
    assert more == pytest.approx(2 * 8 * 2 / 160)  # two scales of 8 more bits for each of two blocks of a row of 160


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 1}, "--layer-context 1: expected at least 2"),
        ({"batch": 0}, "--layer-batch 0: expected at least 1"),
        ({"lr_planes": float("nan")}, "--layer-lr-planes nan: expected a number above 0"),
        ({"windows": 0}, "--windows 0: expected at least 1"),
    ],
)
def test_errors_name_the_options_of_the_phase(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        LayerSettings(**settings)


# The command


def test_the_command(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    small = ["--windows", "24", "--layer-context", "16", "--passes", "1", "--device", "cpu", "--threads", "1"]
    code, out, _ = run("train", model, tmp_path / "out", "--text", text, *small)
    assert code == 0
    assert "layer 1: held-out loss" in out
    _, out, _ = run("train", model, tmp_path / "two", "--text", text, *small, "--json")
    assert [layer["layer"] for layer in json.loads(out)["layers"]] == [0, 1]
    code, _, err = run("train", model, tmp_path / "three", "--text", text, "--start", tmp_path / "out", "--planes", "1")
    assert code == 2
    assert "--planes, --block and --embeddings are those of the store given with --start" in err


def test_a_dry_run_tells_layers_tokens_and_memory(model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    given = ("train", model, tmp_path / "out", "--text", text, "--by", "layer+model", "--windows", "24")
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
