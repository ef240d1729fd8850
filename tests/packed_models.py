"""Small models as stores, and how far logits are from each other, for the tests of the packed engine."""

from pathlib import Path
from typing import Any

import numpy as np

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import Recipe
from bincompress.compression.run import compress
from bincompress.model.decoder import Decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.tensors.packed import PackedTensor, assemble

IDS = np.random.default_rng(3).integers(0, 96, 40)
EXACT = ActivationSettings(bits=16)


def stored(model: Path, store: Path, recipe: Recipe, kept: dict[str, Any] | None = None, archive: bool = False) -> str:
    assert compress(make_plan(open_checkpoint(model), recipe, kept, archive), str(store)).complete
    return str(store)


def logits(decoder: Decoder) -> np.ndarray:
    return decoder.logits(IDS, decoder.new_cache(len(IDS)))


def close(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def packed_tensor(**changes: object) -> PackedTensor:
    """Assemble one plane of 2 x 200 with a number for each row and block of 128, but for the changes."""
    attributes: dict[str, Any] = {"shape": [2, 200], "block": 128, "terms": [1], "mix": None, "coef_exponent": 0}
    arrays: dict[str, Any] = {"planes": np.zeros((1, 2, 4), np.uint64), "coef": np.ones((1, 2, 2), np.float16)}
    for key, value in changes.items():
        (attributes if key in attributes else arrays)[key] = value
    return assemble(attributes, arrays)
