"""Is `compress --train` what compressing and then training is, and is it refused, killed and resumed as well?"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress import api
from bincompress.distillation import after_compression, layer_run
from bincompress.distillation.settings import LayerSettings
from bincompress.errors import BincompressError
from bincompress.store.store import open_store
from tests.conftest import Run

pytestmark = pytest.mark.slow  # PyTorch

SETTINGS: dict[str, Any] = {"groups": 2, "block": 64}


class KilledError(Exception):
    """Stands for the kill of a run."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(after_compression, "LayerSettings", _small)
    monkeypatch.setattr(after_compression, "fastest_products", lambda device: "float32")


def _small(**given: Any) -> LayerSettings:
    return LayerSettings(**{"windows": 24, "context": 16, "passes": 2} | given)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(map(chr, np.random.default_rng(3).integers(33, 127, 900))))
    return file


def tensors_of(store: Path) -> dict[str, str]:
    """Return what a store has but its times: hashes by tensor and array."""
    opened = open_store(str(store))
    return {name: json.dumps(opened.complete_attributes(name), sort_keys=True) for name in opened.tensors()}


def test_the_store_is_that_of_compressing_and_then_training(
    letters_model: Path, text: Path, tmp_path: Path, run: Run
) -> None:
    code, output, errors = run(
        "compress", letters_model, tmp_path / "store", "--block", "64", "--train", text, "--pack"
    )
    assert code == 0, errors
    assert "layer 0: held-out loss" in output
    assert (tmp_path / "store.bincompress.zip").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.bincompress.zip"]
    api.compress(letters_model, tmp_path / "start", block=64)
    layers = _small()
    api.train(letters_model, str(tmp_path / "two"), text, start=str(tmp_path / "start"), layers=layers)
    assert tensors_of(tmp_path / "store") == tensors_of(tmp_path / "two")
    assert api.verify(tmp_path / "store").ok


def test_bits_that_are_spread_over_matrices_are_trained(letters_model: Path, text: Path, tmp_path: Path) -> None:
    api.calibrate(letters_model, str(tmp_path / "stats"), text, samples=16, context=32)
    settings: dict[str, Any] = {
        "stats": str(tmp_path / "stats"), "compensate": True, "scale_bits": 8, "target_bits": 3.5,
    }  # fmt: skip
    before = api.compress(letters_model, tmp_path / "before", **settings)
    made = api.compress(letters_model, tmp_path / "store", **settings, train=text)
    assert made.trained is not None
    for name, report in before.tensors.items():
        if report["method"] != "keep":
            assert made.tensors[name]["stored_bits"] == report["stored_bits"]
    assert len({report["nominal_bits"] for report in made.tensors.values() if report["method"] != "keep"}) > 1
    assert any(report.held_out < report.held_out_start for report in made.trained.layers)


def test_a_killed_run_goes_on(letters_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.compress(letters_model, tmp_path / "whole", **SETTINGS, train=text)
    complete = layer_run.complete_layer

    def killed(*arguments: Any) -> Any:
        if arguments[2] == 1:
            raise KilledError
        return complete(*arguments)

    monkeypatch.setattr(layer_run, "complete_layer", killed)
    with pytest.raises(KilledError):
        api.compress(letters_model, tmp_path / "store", **SETTINGS, train=text)
    assert not (tmp_path / "store").exists()
    trained = []

    def counted(*arguments: Any) -> Any:
        trained.append(arguments[2])
        return complete(*arguments)

    monkeypatch.setattr(layer_run, "complete_layer", counted)
    api.compress(letters_model, tmp_path / "store", **SETTINGS, train=text)
    assert trained == [1]
    assert tensors_of(tmp_path / "store") == tensors_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"groups": 64, "block": "matrix"}, "has 7 planes, expected 1 to 4"),
        ({"method": "billm"}, "planes of their own, which are not trained"),
    ],
)
def test_planes_that_cannot_be_trained_are_refused_before_the_work(
    settings: dict[str, Any], cause: str, letters_model: Path, text: Path, tmp_path: Path
) -> None:
    if settings.get("method") == "billm":
        settings = settings | {"sequential": text, "samples": 16, "context": 32}
    with pytest.raises(BincompressError, match=cause):
        api.compress(letters_model, tmp_path / "store", **settings, train=text)
    assert not list(tmp_path.iterdir())


def test_a_short_text_gives_fewer_windows_or_is_refused(letters_model: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[: 16 * 12])
    made = api.compress(letters_model, tmp_path / "store", train=short)
    assert made.trained is not None
    assert api.inspect(tmp_path / "store")["total"]
    short.write_text(text.read_text()[: 16 * 8])
    with pytest.raises(BincompressError, match="the text to train on has 128 tokens; expected at least 144"):
        api.compress(letters_model, tmp_path / "none", train=short)


def test_a_dry_run_says_what_training_takes(letters_model: Path, text: Path, tmp_path: Path, run: Run) -> None:
    code, output, _ = run("compress", letters_model, tmp_path / "store", "--train", text, "--dry-run")
    assert code == 0
    assert "not included: --train then runs 131,072 tokens 4 times through each layer, in about" in output
    assert not (tmp_path / "store").exists()
