"""Mixtures of experts: what a calibration says of each, and how an expert without tokens is rounded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.calibration.collect import choose_samples
from bincompress.calibration.statistics import open_statistics
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.experts import ExpertLayer
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import open_store
from tests.conftest import Run, write_model
from tests.expert_models import KINDS, tensors_of
from tests.test_declarations import WORDS, config_of, write


def unused_expert(folder: Path) -> Path:
    """Write a model whose router never chooses expert 4."""
    tensors = tensors_of(write(folder / "whole", KINDS[0]))
    router = tensors["model.layers.1.mlp.gate.weight"]
    # What the router reads is the token's vector, whose items are all positive: nothing else is added to it.
    router[4] = -1000 * np.abs(router[4])
    tensors["model.layers.0.mlp.down_proj.weight"] *= 0
    tensors["model.embed_tokens.weight"] = np.abs(tensors["model.embed_tokens.weight"])
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 0
    return write_model(folder / "model", tensors, config_of(KINDS[0]))


def test_a_calibration_counts_the_tokens_of_each_expert(tmp_path: Path, run: Run) -> None:
    model, text, stats = unused_expert(tmp_path), tmp_path / "text", tmp_path / "stats"
    text.write_text(WORDS)
    code, output, _ = run("calibrate", model, stats, "--text", text, "--samples", 9, "--context", 40, "--json")
    assert code == 0
    counts = json.loads(output)["experts"]["1"]
    assert sum(counts) == 2 * 9 * 40
    assert counts[4] == 0
    found = open_statistics(str(stats))
    prefix = "model.layers.1.mlp.experts"
    assert [found.tokens(f"{prefix}.{expert}.down_proj.weight") for expert in range(5)] == counts
    assert found.read(f"{prefix}.4.gate_proj.weight").hessian.max() == 0
    assert found.read(f"{prefix}.0.gate_proj.weight").hessian.max() > 0
    output = run("calibrate", model, stats, "--text", text, "--samples", 9, "--context", 40)[1]
    assert "of 5 experts saw fewer tokens than the 64 columns of their inputs, 1 of them none at all" in output
    assert "4 (0)" in output


METHODS: dict[str, tuple[object, ...]] = {
    "wgm": ("--compensate",),
    "xnor": ("--method", "xnor", "--compensate", "--refine", 1),
    "billm": ("--method", "billm"),
    "dbellquant": ("--method", "dbellquant"),
    "spread bits": ("--compensate", "--target-bits", 3.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_tokens_is_rounded_without_compensation(method: str, tmp_path: Path, run: Run) -> None:
    model, text, stats = unused_expert(tmp_path), tmp_path / "text", tmp_path / "stats"
    text.write_text(WORDS)
    run("calibrate", model, stats, "--text", text, "--samples", 9, "--context", 40)
    code, output, errors = run("compress", model, tmp_path / "store", "--stats", stats, *METHODS[method])
    assert code == 0, errors + output
    assert "none at all" in output
    store = open_store(str(tmp_path / "store"))
    for part in ("gate_proj", "down_proj"):
        assert store.report(f"model.layers.1.mlp.experts.4.{part}.weight")["relative_error"] < 0.7


def test_statistics_of_an_expert_are_those_of_its_own_tokens(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, stats = write(tmp_path / "model", KINDS[0]), tmp_path / "text", tmp_path / "stats"
    text.write_text(WORDS)
    assert run("calibrate", model, stats, "--text", text, "--samples", 3, "--context", 24)[0] == 0
    decoder, checkpoint = load_checkpoint(model), open_checkpoint(model)
    seen: dict[int, list[Any]] = {}
    choose = ExpertLayer.choose

    def watched(self: ExpertLayer, x: Any) -> Any:
        chosen, weights = choose(self, x)
        for expert in range(5):
            seen.setdefault(expert, []).append(x[(chosen == expert).any(axis=1)])
        return chosen, weights

    monkeypatch.setattr(ExpertLayer, "choose", watched)
    for sample in choose_samples(checkpoint, WORDS, 3, 24):
        decoder.states(sample, decoder.new_cache(24))
    found = open_statistics(str(stats))
    for expert, inputs in seen.items():
        x = np.concatenate(inputs).astype(np.float64)
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        assert found.tokens(name) == len(x)
        expected = x.T @ x / len(x)
        assert np.abs(found.read(name).hessian - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--sequential", "TEXT", "--samples", 2, "--context", 16, "--compensate"),
            "--sequential does not know mix",
        ),
        (("--keep-weights", "auto"), "--keep-weights auto does not know mixtures of experts yet"),
    ],
)
def test_what_does_not_know_experts_says_so_before_the_work(
    options: tuple[object, ...], message: str, tmp_path: Path, run: Run
) -> None:
    model, text = write(tmp_path / "model", KINDS[0]), tmp_path / "text"
    text.write_text(WORDS)
    given = [text if option == "TEXT" else option for option in options]
    code, _, errors = run("compress", model, tmp_path / "store", *given)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "store").exists()
