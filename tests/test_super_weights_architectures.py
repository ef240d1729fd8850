"""The effect of single weights where an architecture scales embeddings, what is added to the stream, or logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.calibration import super_weights
from bincompress.calibration.super_weights import try_super_weights
from bincompress.inference.evaluate import log_softmax
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.sources.checkpoint import open_checkpoint
from tests.conftest import write_model
from tests.test_declarations import config_of

NAME = "model.layers.0.mlp.down_proj.weight"
PLACE = (13, 70)
WORDS = np.random.default_rng(4).integers(0, 96, 40)


def tensors_of(config: dict[str, Any], value: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    made = {
        name: (random.standard_normal(shape) * (0.02 if "embed" in name else 0.2)).astype(np.float32)
        for name, shape in parse(config).tensors().items()
    }
    made[NAME][PLACE] = value
    return made


def log_probabilities(folder: Path) -> np.ndarray:
    decoder = load_checkpoint(folder)
    return log_softmax(decoder.logits(WORDS, decoder.new_cache(128)))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 5.0}),  # 1 + weight in norms, a norm behind the MLP
        ("GraniteForCausalLM", {}),  # multipliers of embeddings, of what is added to the stream, and of logits
    ],
)
def test_the_effect_is_that_of_the_architecture(
    architecture: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(super_weights, "_PROMPT", " ".join(f"t{word}" for word in WORDS))
    monkeypatch.setattr(super_weights, "_SPIKE", 1.0)
    config = config_of(architecture) | options
    folder = write_model(tmp_path / "whole", tensors_of(config, 50.0), config)
    tried = try_super_weights(open_checkpoint(folder), lambda name: name == NAME)
    found = next(weight for weight in tried if (weight.row, weight.col) == PLACE)
    usual = log_probabilities(folder)
    other = log_probabilities(write_model(tmp_path / "without", tensors_of(config, 0.0), config))
    expected = float(np.mean(np.sum(np.exp(usual) * (usual - other), axis=1)))
    assert found.effect > 1e-4
    assert found.effect == pytest.approx(expected, rel=1e-3)
