"""What distillation is made of: the decoder and weights in PyTorch, the loss, the order of windows, the rate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress.compression.job import run_job
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import make_jobs
from bincompress.distillation.decoder import Cache, TorchDecoder
from bincompress.distillation.loss import deviation_aware
from bincompress.distillation.model import teacher_weights
from bincompress.distillation.settings import DistillSettings
from bincompress.distillation.student import StoredMatrix, TrainedMatrix
from bincompress.distillation.train import Checkpoints, rate
from bincompress.distillation.windows import Windows
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.store import begin_store, open_store
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.float8 import from_float8
from bincompress.tensors.packed import PackedTensor
from tests.conftest import EVERY_METHOD
from tests.test_model_transformers import BEYOND_LLAMA, CASES
from tests.training import CPU, apart, logits
from tests.transformers_models import VOCAB, random_model, their_logits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]  # PyTorch

NAME = "model.layers.1.mlp.down_proj.weight"
MIXTURES = ("qwen3-moe", "mixtral")
TRAINED = [*CASES, *(case for case in BEYOND_LLAMA if not case.startswith(MIXTURES))]


@pytest.mark.parametrize("case", TRAINED)
def test_torch_decoder_equals_ours_and_transformers(case: str, tmp_path: Path) -> None:
    theirs = random_model(tmp_path, *{**CASES, **BEYOND_LLAMA}[case])
    ids = np.random.default_rng(1).integers(0, VOCAB, 75)
    checkpoint = open_checkpoint(tmp_path)
    config = parse(checkpoint.config)
    weights = teacher_weights(checkpoint, config, CPU, torch.float32)
    decoder = TorchDecoder(config, CPU, 75)
    with torch.no_grad():
        found = decoder.head(weights, decoder.states(weights, torch.from_numpy(ids)[None]))[0].numpy()
        cache = Cache()
        parts = [decoder.states(weights, part[None], cache) for part in torch.from_numpy(ids).split([40, 1, 34])]
        cached = decoder.head(weights, torch.cat(parts, 1))[0].numpy()
    assert apart(found, their_logits(theirs, ids)) < 1e-4
    assert apart(found, logits(load_checkpoint(tmp_path), ids)) < 1e-4
    assert apart(cached, found) < 1e-5


@pytest.mark.parametrize("settings", EVERY_METHOD, ids=str)
def test_student_weights_are_the_stored_ones(settings: Any, tmp_path: Path, tiny_model: Path) -> None:
    plan = make_plan(open_checkpoint(tiny_model), load_recipe(None, {"method": "xnor"}))
    (planned,) = (t for t in plan.tensors if t.source.name == NAME)
    one = replace(plan, tensors=(replace(planned, settings=settings, kept=((3, 5),)),))
    begin_store(str(tmp_path / "store"), one.record(), {}, "", overwrite=False)
    (report,) = map(run_job, make_jobs(one, str(tmp_path / "store"), ""))
    assert report.status == "done"
    opened = open_store(str(tmp_path / "store"))
    matrix = TrainedMatrix(StoredMatrix.read(opened, NAME), CPU)
    expected = dequantize(opened.read_packed(NAME))
    assert np.allclose(matrix.weight().numpy(), expected, rtol=1e-5, atol=1e-6)
    # The gradient of a random linear function of the weights, against a difference along a random direction.
    random = np.random.default_rng(0)
    along = torch.from_numpy(random.standard_normal(expected.shape).astype(np.float32))
    before = float((matrix.weight().double() * along).sum())
    matrix.backward(along.clone())
    direction = torch.from_numpy(random.standard_normal(tuple(matrix.moved.shape)).astype(np.float32))
    assert matrix.moved.grad is not None
    slope = float((matrix.moved.grad * direction).sum())
    with torch.no_grad():
        matrix.moved += direction
    after = float((matrix.weight().double() * along).sum())
    assert after - before == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_products_of_planes_columns_and_eight_bit_scales() -> None:
    random = np.random.default_rng(5)
    rows, cols, block = 4, 100, 64
    arrays = {
        "planes": random.integers(0, 1 << 63, (2, rows, 2), np.uint64),
        "column_planes": random.integers(0, 1 << 63, (1, 2), np.uint64),
        "coef": random.integers(100, 250, (3, rows, 2), np.uint8),
        "in_scale": random.uniform(0.5, 2, cols).astype(np.float32),
    }
    stored = StoredMatrix(
        "w",
        "",
        PackedTensor(
            arrays["planes"],
            arrays["coef"],
            (1, 3, 6),
            block,
            (rows, cols),
            -2,
            None,
            arrays["column_planes"],
            arrays["in_scale"],
        ),
    )
    matrix = TrainedMatrix(stored, CPU)

    def signs(plane: np.ndarray) -> np.ndarray:
        return 2.0 * np.unpackbits(plane.view(np.uint8), axis=-1, count=cols, bitorder="little") - 1

    a, b = signs(arrays["planes"])
    mask = signs(arrays["column_planes"])[0]
    coef = np.repeat(from_float8(arrays["coef"], -2), block, axis=2)[:, :, :cols]
    expected = (coef[0] * a + coef[1] * a * b + coef[2] * b * mask) * arrays["in_scale"]
    assert np.allclose(matrix.weight().numpy(), expected, rtol=1e-5)
    with torch.no_grad():
        matrix.moved += 0.1
    again, exponent = stored.rounded(matrix.values())
    assert np.array_equal(from_float8(again, exponent), matrix.values())  # trained as it will be stored


def test_loss_by_hand() -> None:
    random = np.random.default_rng(1)
    teacher, student = random.standard_normal((2, 5, 7))

    def softmax(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(values) / np.exp(values).sum(1, keepdims=True))

    p, q = softmax(teacher), softmax(student)
    cross = -np.sum(p * np.log(q), 1)
    weight = 0.7 * (-np.sum(p * np.log(p), 1)) ** 0.3 * (-np.sum(q * np.log(q), 1)) ** 0.7
    ours = deviation_aware(torch.from_numpy(teacher), torch.from_numpy(student), 0.7, 0.3)
    assert np.allclose(ours, cross + weight * cross)
    assert np.allclose(deviation_aware(torch.from_numpy(teacher), torch.from_numpy(student), 0.0, 0.3), cross)


def test_the_weight_carries_no_gradient() -> None:
    teacher, student = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    deviation_aware(teacher, student, 2.0, 0.5).sum().backward()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    weight = 1 + 2 * (-(p * p.log()).sum(-1)).sqrt() * (-(q * q.log()).sum(-1)).sqrt()
    assert torch.allclose(student.grad, weight[:, None] * (q - p), atol=1e-6)


def test_a_certain_prediction_has_a_finite_loss() -> None:
    certain = torch.tensor([[200.0, 0.0, 0.0]])
    assert torch.isfinite(deviation_aware(certain, certain.clone(), 1.0, 0.5)).all()


def test_checkpoints_by_time_take_a_twentieth_of_the_run(tmp_path: Path) -> None:
    now = [0.0]
    state: dict[str, Any] = {"slow": 10.0}

    def clock() -> float:
        return now[0]

    kept = Checkpoints(tmp_path / "checkpoint.pt", None, {}, clock)
    for seconds, due in ((29.0, False), (30.0, True)):
        now[0] = seconds
        assert kept.due(1) == due
    write = kept._write

    def slowly(given: dict[str, Any]) -> None:
        write(given)
        now[0] += given["slow"]

    kept._write = slowly  # type: ignore[method-assign,assignment]
    kept.write(state)
    for seconds, due in ((40.0 + 199.0, False), (40.0 + 200.0, True)):
        now[0] = seconds
        assert kept.due(2) == due
    assert kept.read(CPU) == state


def test_every_epoch_sees_every_window_once_in_another_order() -> None:
    settings = DistillSettings(batch=4, context=8, validation_share=0.1)
    windows = Windows.of(np.arange(8 * 30), settings)
    assert len(windows.training) == 27
    assert len(windows.held_out) == 3
    seen = np.concatenate([windows.of_step(step, 9) for step in range(6)])
    assert sorted(seen[:27]) == sorted(seen[27:]) == list(range(27))
    assert not np.array_equal(seen[:27], seen[27:])
    assert not set(windows.training.ravel()) & set(windows.held_out.ravel())


def test_rate_goes_up_then_down() -> None:
    rates = [rate(step, 0.1, 100) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert np.all(np.diff(rates[10:]) <= 0)
    assert rates[-1] < 0.001
