"""Training of both factors of a low-rank matrix: its beginning, its gradients, and what it stores again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress import api
from bincompress.distillation import after_compression
from bincompress.distillation.low_rank import FactorsBeginning, TrainedFactors, flat, from_flat
from bincompress.distillation.settings import LayerSettings
from bincompress.tensors.dequantize import dequantize
from tests.conftest import Run
from tests.test_low_rank import random_tensor

pytestmark = pytest.mark.slow  # PyTorch

NAME = "w"
SMALL: dict[str, Any] = {"windows": 24, "context": 16, "passes": 2}
SOURCE = np.random.default_rng(0).standard_normal((40, 70)).astype(np.float32)


def trained() -> TrainedFactors:
    return TrainedFactors(FactorsBeginning(NAME, random_tensor(40, 70, 20)[0], SOURCE), torch.device("cpu"))


def test_training_begins_with_what_is_stored() -> None:
    tensor, factors = random_tensor(40, 70, 20)[0], trained()
    np.testing.assert_allclose(factors.weights()[NAME].numpy(), dequantize(tensor), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dequantize(factors.packed()[NAME]), dequantize(tensor), rtol=2e-3, atol=1e-4)
    assert np.array_equal(dequantize(from_flat(tensor, *flat(tensor), tensor.exponent)), dequantize(tensor))
    with pytest.raises(ValueError, match="do not fit rank 20"):
        from_flat(tensor, flat(tensor)[0][1:], flat(tensor)[1], 0)


def test_the_gradient_of_scales_is_exact() -> None:
    factors, chance = trained(), np.random.default_rng(1)
    along = torch.from_numpy(chance.standard_normal((40, 70)).astype(np.float32))
    before = float((factors.weights()[NAME].double() * along).sum())
    factors.backward({NAME: along.clone()})
    direction = 1e-3 * torch.from_numpy(chance.standard_normal(130).astype(np.float32))
    assert factors.moved.grad is not None
    slope = float((factors.moved.grad * direction).sum())
    with torch.no_grad():
        factors.moved += direction
    after = float((factors.weights()[NAME].double() * along).sum())
    assert after - before == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_signs_learn_too() -> None:
    factors, target = trained(), torch.from_numpy(SOURCE)
    before, losses = factors.codes(), []
    adam = torch.optim.Adam([factors.latent, factors.moved], 0.01)
    for _ in range(100):
        away = factors.weights()[NAME] - target
        losses.append(float(away.square().mean()))
        factors.backward({NAME: 2 * away / away.numel()})
        adam.step()
    assert losses[-1] < 0.7 * losses[0]
    assert 0 < float((before != factors.codes()).float().mean()) < 0.5


@pytest.fixture(scope="module")
def low_rank_store(letters_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("low") / "store"
    assert api.compress(letters_model, store, method="lowrank", rank=20).complete
    return store


def test_what_does_not_train_factors_refuses_them_by_name(
    low_rank_store: Path, letters_model: Path, letters_text: Path, tmp_path: Path, run: Run
) -> None:
    given = ("--text", letters_text, "--context", 16, "--steps", 2)
    code, _, errors = run("distill", low_rank_store, "--teacher", letters_model, *given, "--out", tmp_path / "out")
    assert code == 2
    assert "is stored in low-rank form, whose scales are trained with its factors: `bincompress train" in errors
    windows = ("--windows", 8, "--layer-context", 16, "--activation-bits", 6)
    start = ("--start", low_rank_store, "--text", letters_text)
    code, _, errors = run("train", letters_model, tmp_path / "out", *start, *windows)
    assert code == 2
    assert "in low-rank form, whose two products round their inputs in another way" in errors
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_is_trained_in_this_form(letters_model: Path, letters_text: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "lowrank", "rank": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(after_compression, "LayerSettings", lambda **own: LayerSettings(**{**SMALL, **own}))
        made = api.compress(letters_model, tmp_path / "out", train=letters_text, **settings)
    assert made.trained is not None
    assert all(report.held_out < report.held_out_start for report in made.trained.layers)
    assert api.verify(tmp_path / "out").ok
