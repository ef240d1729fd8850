"""Settings and helpers that the tests of training share."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress import api
from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.model import Student
from bincompress.distillation.settings import DistillSettings, LayerSettings
from bincompress.distillation.train_run import Trained
from bincompress.inference.load import load_decoder
from bincompress.model.config import ModelConfig, parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import open_store

CPU = torch.device("cpu")
LAYERS = LayerSettings(windows=24, context=16, passes=4, batch=4)
MODEL = DistillSettings(
    steps=8, batch=4, context=16, lr=0.01, lr_planes=0.02, planes=True, evaluate_every=4, validation_share=0.2
)


class KilledError(Exception):
    """Stands for the kill of a run."""


def trained(source: Path, text: Path, out: Path, **more: Any) -> Trained:
    return api.train(source, str(out), text, **{"layers": LAYERS, "device": "cpu", **more})


def tensors_of(store: Path) -> dict[str, str]:
    """Return what a store has but its times: hashes by tensor and array."""
    opened = open_store(str(store))
    return {name: json.dumps(opened.complete_attributes(name), sort_keys=True) for name in opened.tensors()}


def killed_after_a_layer(model: Path, text: Path, out: Path, **more: Any) -> None:
    def stop(done: int, total: int, line: str) -> None:
        if "held out" in line:
            raise KilledError

    with pytest.raises(KilledError):
        trained(model, text, out, on_layers=stop, **more)


def logits(decoder: Any, ids: np.ndarray) -> np.ndarray:
    return np.asarray(decoder.logits(ids, decoder.new_cache(len(ids))))


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def as_trained(store: str, model: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Return what PyTorch computes with: the config and the weights of a trained store."""
    config = parse(open_checkpoint(model).config)
    weights = Student.of_store(open_store(store), config, CPU, torch.float32, False).weights()
    return config, {name: weight.detach() for name, weight in weights.items()}


def assert_engine_gives_what_training_saw(store: Path, model: Path, ids: np.ndarray) -> None:
    """Compare the logits of the engine with those of PyTorch."""
    config, weights = as_trained(str(store), model)
    decoder = TorchDecoder(config, CPU, len(ids))
    with torch.no_grad():
        expected = decoder.head(weights, decoder.states(weights, torch.from_numpy(ids)[None]))[0].numpy()
    assert apart(logits(load_decoder(str(store), 1, ActivationSettings(16)).decoder, ids), expected) < 1e-4
