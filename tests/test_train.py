"""Does training lower what it should, for each kind of model and planes, and resume without a trace?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress import api
from bincompress.distillation.layers import Objective
from bincompress.distillation.settings import DistillError
from bincompress.reporting.inspection import trained_lines
from bincompress.store.store import open_store
from tests.test_declarations import WORDS, write
from tests.training import LAYERS, MODEL, KilledError, assert_engine_gives_what_training_saw, tensors_of, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]  # PyTorch


def test_layers_learn_and_the_same_run_gives_the_same_bytes(
    letters_model: Path, letters_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trained(letters_model, letters_text, tmp_path / "a")
    assert not caplog.messages
    assert [report.layer for report in first.layers] == [0, 1]
    for report, factor in zip(first.layers, (0.85, 0.95), strict=True):
        assert report.held_out < factor * report.held_out_start
        assert 0.001 < report.flips < 0.2
    second = trained(letters_model, letters_text, tmp_path / "b")
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")
    assert [replace(r, seconds=0) for r in first.layers] == [replace(r, seconds=0) for r in second.layers]
    other = trained(letters_model, letters_text, tmp_path / "c", layers=replace(LAYERS, seed=1))
    assert tensors_of(tmp_path / "c") != tensors_of(tmp_path / "a")
    assert other.layers[1].held_out == pytest.approx(first.layers[1].held_out, rel=0.2)
    assert api.verify(tmp_path / "a").ok
    assert not list(tmp_path.glob(".*"))  # what a run keeps to be resumed is removed


@pytest.mark.parametrize("by", ["layer", "model", "layer+model"])
def test_a_resumed_run_equals_one_without_interruption(
    by: str, letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    chosen = {"layers": LAYERS if "layer" in by else None, "model": MODEL if "model" in by else None}
    trained(letters_model, letters_text, tmp_path / "whole", **chosen, checkpoint_every=2)

    def after_the_first_layer(done: int, total: int, line: str) -> None:
        if "held out" in line:
            raise KilledError

    def after_step_5(progress: Any) -> None:
        if progress.step == 5:
            raise KilledError

    def run(**callbacks: Any) -> None:
        trained(letters_model, letters_text, tmp_path / "resumed", **chosen, checkpoint_every=2, **callbacks)

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
def test_independent_layers_learn_and_resume(
    finish: int, letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    layers = replace(INDEPENDENT, finish_passes=finish)
    found = trained(letters_model, letters_text, tmp_path / "whole", layers=layers)
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
        trained(letters_model, letters_text, tmp_path / "resumed", layers=layers, on_layers=stop)
    with pytest.raises(DistillError, match="a run with other settings, text or store was interrupted here"):
        trained(letters_model, letters_text, tmp_path / "resumed", layers=LAYERS)
    trained(letters_model, letters_text, tmp_path / "resumed", layers=layers)
    assert tensors_of(tmp_path / "resumed") == tensors_of(tmp_path / "whole")
    attributes = [open_store(str(tmp_path / name)).attributes for name in ("whole", "resumed")]
    assert attributes[0]["training"] == attributes[1]["training"]
    lines = trained_lines(attributes[0])
    assert "2 layers each by itself" in lines[0]
    assert len(lines) == 1 + finish
    assert not list(tmp_path.glob(".*"))


def test_a_token_with_massive_activations_counts_as_one() -> None:
    """The first tokens of real models are thousands of times larger; unweighted, a layer would learn them alone."""
    inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    targets = inputs + 0.5 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    targets[:, 0] *= 1000
    objective = Objective(inputs, targets)
    found = targets * 1.1  # each token off by a tenth of its size
    change = ((inputs - targets).square().mean(-1) / targets.square().mean(-1)).mean()
    assert float(objective(found, targets)) == pytest.approx(0.01 / float(change), rel=1e-4)
    one = targets.clone()
    one[:, 0] *= 1.1
    assert float(objective(one, targets)) == pytest.approx(float(objective(found, targets)) / 5, rel=1e-3)


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
    assert_engine_gives_what_training_saw(out, model, np.arange(2, 50))


@pytest.mark.parametrize("method", [{"method": "dbllm", "block": 64}, {"method": "wgm", "groups": 3, "block": 64}])
def test_other_sums_of_planes_learn_too(
    method: dict[str, Any], letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    api.compress(letters_model, tmp_path / "start", **method)
    found = trained(letters_model, letters_text, tmp_path / "out", start=str(tmp_path / "start"))
    assert all(report.held_out < 0.95 * report.held_out_start for report in found.layers)
    assert api.verify(tmp_path / "out").ok


def test_a_layer_that_does_not_gain_stays_as_it_began(letters_model: Path, letters_text: Path, tmp_path: Path) -> None:
    found = trained(letters_model, letters_text, tmp_path / "out", layers=replace(LAYERS, lr=3.0, lr_planes=3.0))
    assert any(report.flips == 0 and report.held_out == report.held_out_start for report in found.layers)
    assert all(report.held_out <= report.held_out_start for report in found.layers)
    with pytest.raises(DistillError, match=r"the loss of layer 1 became .*; try a smaller --layer-lr"):
        trained(letters_model, letters_text, tmp_path / "nan", layers=replace(LAYERS, lr=1e30))


def test_trained_layers_are_a_result_where_the_whole_model_does_not_gain(
    letters_model: Path, letters_text: Path, tmp_path: Path
) -> None:
    found = trained(
        letters_model, letters_text, tmp_path / "out", model=replace(MODEL, lr=100.0, lr_planes=100.0, steps=2)
    )
    assert found.model["best_step"] == 0
    trained(letters_model, letters_text, tmp_path / "layers")
    assert [api.inspect(tmp_path / name)["total"]["binary"] for name in ("out", "layers")] == [
        api.inspect(tmp_path / "layers")["total"]["binary"]
    ] * 2
