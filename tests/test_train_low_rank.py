"""Training of both factors of a low-rank matrix: its beginning, its gradients, and what it stores again."""

import numpy as np
import pytest
import torch

from bincompress.distillation.low_rank import FactorsBeginning, TrainedFactors, flat, from_flat
from bincompress.tensors.dequantize import dequantize
from tests.test_low_rank import random_tensor

NAME = "w"
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
