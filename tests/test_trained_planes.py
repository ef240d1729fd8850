"""Do latents stand for what is stored, do gradients go where they should, and do the kernels equal their twins?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bincompress.compression.job import run_job
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import make_jobs
from bincompress.distillation.planes import Beginning, TrainedPlanes, form_of, refuse_untrainable
from bincompress.distillation.settings import DistillError
from bincompress.distillation.student import StoredMatrix
from bincompress.methods import make_settings
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.store import begin_store, open_store
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.float8 import from_float8
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.quantize.latents import latent_gradients, levels_of_latents
from cpu_kernels.quantize.packing import words_for
from cpu_kernels.reference import latents as reference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]  # PyTorch

CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.down_proj.weight"
TRAINABLE = [
    make_settings("xnor", block=128),
    make_settings("xnor", block="row"),
    make_settings("xnor", block="matrix"),
    make_settings("dbllm", block=64),
    make_settings("wgm", block=64),
    make_settings("wgm", block="row"),
    make_settings("wgm", block="matrix"),
    make_settings("wgm", groups=1, block=64),
    make_settings("wgm", groups=3, block=64),
]


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8, 16]), st.integers(1, 40), st.sampled_from([1, 7, 64, 128]))
def test_kernels_equal_their_twins(seed: int, count: int, units: int, block: int) -> None:
    random = np.random.default_rng(seed)
    latents, gradients = random.standard_normal((2, units, block)).astype(np.float32)
    levels = np.sort(random.standard_normal((units, count)).astype(np.float32), axis=1)
    thresholds = ((levels[:, 1:] + levels[:, :-1]) / 2).astype(np.float32)
    latents[:, 0] = thresholds[:, 0]  # on a threshold: the lower level
    limits = np.ascontiguousarray(levels[:, [0, -1]])
    weights, found, sums = np.empty_like(latents), np.empty_like(latents), np.empty((units, count), np.float32)
    levels_of_latents(latents, levels, thresholds, weights)
    assert np.array_equal(weights, reference.levels_of_latents(latents, levels, thresholds))
    assert np.array_equal(weights[:, 0], levels[:, 0])
    latent_gradients(latents, gradients, thresholds, limits, found, sums)
    expected, expected_sums = reference.latent_gradients(latents, gradients, thresholds, limits)
    assert np.array_equal(found, expected)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5, atol=1e-4)


def test_a_latent_far_out_is_pulled_back_and_never_further() -> None:
    latents = np.array([[-9.0, -9.0, 0.5, 9.0, 9.0]], np.float32)
    gradients = np.array([[0.25, -0.5, 1.0, 0.25, -0.5]], np.float32)  # a step goes against them
    found, sums = np.empty_like(latents), np.empty((1, 2), np.float32)
    arrays = (latents, gradients, np.zeros((1, 1), np.float32), np.array([[-2.0, 2.0]], np.float32))
    latent_gradients(*arrays, found, sums)
    assert found.tolist() == [[0.0, -0.5, 1.0, 0.25, 0.0]]
    assert sums.tolist() == [[0.5, 0.75]]


def stored_by(settings: Any, model: Path, place: Path, kept: tuple[tuple[int, int], ...] = ()) -> StoredMatrix:
    plan = make_plan(open_checkpoint(model), load_recipe(None, {"method": "xnor"}))
    (planned,) = (t for t in plan.tensors if t.source.name == NAME)
    one = replace(plan, tensors=(replace(planned, settings=settings, kept=kept),))
    begin_store(str(place), one.record(), {}, "", overwrite=False)
    (report,) = map(run_job, make_jobs(one, str(place), ""))
    assert report.status == "done", report.error
    return StoredMatrix.read(open_store(str(place)), NAME)


def source_of(model: Path) -> np.ndarray:
    checkpoint = open_checkpoint(model)
    return read_weight(checkpoint.tensors[NAME]).float32().reshape(checkpoint_config(checkpoint).tensors()[NAME])


@pytest.mark.parametrize("settings", TRAINABLE, ids=str)
def test_training_begins_with_what_is_stored(settings: Any, tiny_model: Path, tmp_path: Path) -> None:
    stored = stored_by(settings, tiny_model, tmp_path / "store", ((3, 5),))
    trained = TrainedPlanes([Beginning(stored, source_of(tiny_model))], CPU)
    expected = dequantize(stored.tensor)
    assert np.allclose(trained.weights()[NAME].numpy(), expected, rtol=1e-5, atol=1e-6)
    packed = trained.packed()[NAME]
    assert np.allclose(dequantize(packed), expected, rtol=1e-3, atol=1e-5)
    assert packed.numbers.dtype == stored.tensor.numbers.dtype
    # Most latents are the weights themselves: small steps then turn the signs of small weights first.
    weights = source_of(tiny_model)
    latents = torch.from_numpy(trained.latents()[NAME].astype(np.float32)).reshape(weights.shape[0], -1)
    near = np.abs(latents.numpy()[:, : weights.shape[1]] * weights.std(ddof=1) - weights) < 2e-3 * np.abs(weights).max()
    assert near.mean() > 0.85


@pytest.mark.parametrize("settings", TRAINABLE, ids=str)
def test_the_gradient_of_coefficients_is_exact(settings: Any, tiny_model: Path, tmp_path: Path) -> None:
    trained = TrainedPlanes([Beginning(stored_by(settings, tiny_model, tmp_path / "s"), source_of(tiny_model))], CPU)
    random = np.random.default_rng(0)
    along = torch.from_numpy(random.standard_normal(source_of(tiny_model).shape).astype(np.float32))
    codes = trained.codes()
    before = float((trained.weights()[NAME].double() * along).sum())
    trained.backward({NAME: along.clone()})
    direction = 1e-3 * torch.from_numpy(random.standard_normal(tuple(trained.moved.shape)).astype(np.float32))
    assert trained.moved.grad is not None
    slope = float((trained.moved.grad * direction).sum())
    with torch.no_grad():
        trained.moved += direction
        # The levels moved, and with them the thresholds: latents stay in their cells.
        trained.latent.copy_(trained._into_cells(trained.latent, codes))
    after = float((trained.weights()[NAME].double() * along).sum())
    assert after - before == pytest.approx(slope, rel=2e-2, abs=1e-4)


def made(planes: int, rows: int = 6, cols: int = 200, block: int = 64, **more: Any) -> StoredMatrix:
    random = np.random.default_rng(7)
    numbers = random.uniform(0.2, 1.0, (planes, rows, -(-cols // block))).astype(np.float16)
    packed = random.integers(0, 1 << 63, (planes, rows, words_for(cols)), np.uint64)
    tensor = PackedTensor(packed, numbers, tuple(1 << p for p in range(planes)), block, (rows, cols), **more)
    return StoredMatrix("w", "xnor", tensor)


def test_the_gradient_goes_straight_through_to_latents_inside() -> None:
    """One plane: to each within three scales of zero, by its column's scale; beyond only inward; to none listed."""
    random = np.random.default_rng(1)
    in_scale = random.uniform(0.5, 2, 200).astype(np.float32)
    listed = np.array([3, 450], np.uint64)
    stored = made(1, in_scale=in_scale, listed_index=listed, listed_value=np.array([9.0, -9.0], np.float32))
    source = random.standard_normal((6, 200)).astype(np.float32) * 2
    trained = TrainedPlanes([Beginning(stored, source)], CPU)
    weights = trained.weights()["w"]
    assert weights.view(-1)[listed.astype(np.int64)].tolist() == [9.0, -9.0]
    gradient = torch.from_numpy(random.standard_normal((6, 200)).astype(np.float32))
    expected = gradient.clone().view(-1)
    expected[listed.astype(np.int64)] = 0.0
    expected = expected.view(6, 200) * torch.from_numpy(in_scale)
    trained.backward({"w": gradient.clone()})
    assert trained.latent.grad is not None
    formula = source / in_scale
    deviation = float(torch.from_numpy(formula).std())
    latent = trained.latent.detach().reshape(6, -1)[:, :200] * deviation
    scales = np.repeat(stored.tensor.numbers[0].astype(np.float32), 64, axis=1)[:, :200]
    inside = latent.abs().numpy() <= 3 * scales
    inward = inside | (latent.numpy() * expected.numpy() > 0)  # a step goes against the gradient
    assert 0.5 < inside.mean() < inward.mean() < 1
    found = trained.latent.grad.reshape(6, -1)[:, :200].numpy() / deviation
    np.testing.assert_allclose(found, np.where(inward, expected.numpy(), 0.0), rtol=1e-5, atol=1e-6)


def test_matrices_trained_as_one_are_trained_as_each_alone() -> None:
    """Several shapes of one form share a parameter; every weight, gradient and packed byte is its own matrix's."""
    random = np.random.default_rng(2)
    stored = [replace(made(2, rows, cols), name=f"w{rows}") for rows, cols in ((6, 200), (3, 64), (5, 130))]
    sources = [random.standard_normal(each.tensor.shape).astype(np.float32) for each in stored]
    assert len({form_of(each) for each in stored}) == 1
    together = TrainedPlanes([Beginning(*pair) for pair in zip(stored, sources, strict=True)], CPU)
    weights = together.weights()
    gradients = {
        name: torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) for name, weight in weights.items()
    }
    together.backward({name: values.clone() for name, values in gradients.items()})
    assert together.latent.grad is not None
    assert together.moved.grad is not None
    first = column = 0
    for each, source in zip(stored, sources, strict=True):
        alone = TrainedPlanes([Beginning(each, source)], CPU)
        assert torch.equal(alone.weights()[each.name], weights[each.name])
        alone.backward({each.name: gradients[each.name].clone()})
        assert alone.latent.grad is not None
        assert alone.moved.grad is not None
        assert torch.equal(together.latent.grad[first : first + len(alone.latent)], alone.latent.grad)
        own = together.moved.grad[:, column : column + alone.moved.shape[1]]
        assert torch.allclose(own, alone.moved.grad, rtol=1e-6)
        assert np.array_equal(together.packed()[each.name].planes, alone.packed()[each.name].planes)
        first, column = first + len(alone.latent), column + alone.moved.shape[1]


def test_eight_bit_scales_are_trained_as_they_will_be_stored() -> None:
    stored = made(2).with_scale_bits(8)
    assert stored.tensor.numbers.dtype == np.uint8
    assert np.array_equal(stored.with_scale_bits(16).coefficients(), stored.coefficients())
    trained = TrainedPlanes([Beginning(stored, dequantize(stored.tensor))], CPU)
    with torch.no_grad():
        trained.moved += 0.05
    packed = trained.packed()["w"]
    expected = from_float8(packed.numbers, packed.exponent).reshape(2, -1)
    assert np.array_equal(trained.coefficients().detach().numpy(), expected)
    np.testing.assert_allclose(trained.weights()["w"].numpy(), dequantize(packed), rtol=1e-6)


def test_planes_go_where_the_loss_pulls_them() -> None:
    """Adam on the squared distance from other weights: in the end each level is the one nearest to its weight."""
    random = np.random.default_rng(3)
    goal = torch.from_numpy(random.standard_normal((6, 200)).astype(np.float32))
    trained = TrainedPlanes([Beginning(made(2), 0.5 * random.standard_normal((6, 200)).astype(np.float32))], CPU)
    adam = torch.optim.Adam([trained.latent, trained.moved], lr=0.05)
    errors = []
    for step in range(300):
        adam.param_groups[0]["lr"] = 0.2 * (1 - step / 300)
        weight = trained.weights()["w"].requires_grad_()
        loss = (weight - goal).square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        adam.zero_grad()
        trained.backward({"w": gradient})
        adam.step()
        errors.append(float(loss.detach()))
    assert (
        errors[-1] < 0.16 * float(goal.square().mean()) < errors[0] / 4
    )  # the best of 2 bits for normal weights: 0.1175


@pytest.mark.parametrize(
    ("attributes", "scale_bits", "message"),
    [
        (
            {"terms": [1, 2, 4], "hashes": {"column_planes": ""}},
            None,
            "method m gives some columns planes of their own",
        ),
        ({"terms": [1, 3, 16], "hashes": {}}, None, "w: has 5 planes, expected 1 to 4: begin with fewer"),
        ({"terms": [0, 1, 2], "hashes": {}, "mix": [[1, 0]]}, 8, "8-bit scales have no sign, and coefficients of m"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    attributes: dict[str, Any], scale_bits: int | None, message: str
) -> None:
    with pytest.raises(DistillError, match=message):
        refuse_untrainable("w", {"method": "m", "mix": None, **attributes}, scale_bits)
