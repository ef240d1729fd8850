"""Does distillation train what the store holds, tell the truth about it, go on as if never interrupted, and refuse?"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress.compression.job import run_job
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress, make_jobs
from bincompress.distillation.decoder import Cache, TorchDecoder
from bincompress.distillation.loss import deviation_aware
from bincompress.distillation.model import Predictions, Student, teacher_weights
from bincompress.distillation.places import Places
from bincompress.distillation.run import distill
from bincompress.distillation.settings import DistillError, DistillSettings
from bincompress.distillation.student import StoredMatrix, TrainedMatrix
from bincompress.distillation.teacher import write_text
from bincompress.distillation.train import Checkpoints, rate
from bincompress.distillation.windows import Windows
from bincompress.inference.evaluate import evaluate
from bincompress.inference.load import load_decoder
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.store import begin_store, open_store
from bincompress.store.verify import verify
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.float8 import from_float8
from bincompress.tensors.packed import PackedTensor
from tests.conftest import EVERY_METHOD, Run, tiny_config, tiny_tensors, write_model
from tests.test_model_transformers import BEYOND_LLAMA, CASES
from tests.transformers_models import VOCAB, random_model, their_logits

pytestmark = pytest.mark.slow  # PyTorch

CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.down_proj.weight"
SMALL = DistillSettings(steps=6, batch=4, context=16, lr=0.05, evaluate_every=2, validation_share=0.2, norms=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(letters_model: Path) -> Path:
    return letters_model


@pytest.fixture(scope="module")
def text() -> str:
    letters = np.random.default_rng(3).integers(33, 127, 800)
    return "".join(map(chr, letters))


def packed(model: Path, store: Path, **options: Any) -> str:
    plan = make_plan(open_checkpoint(model), load_recipe(None, options))
    assert compress(plan, str(store)).complete
    return str(store)


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return packed(model, tmp_path_factory.mktemp("stores") / "wgm", block=64)


def logits(decoder: Any, ids: np.ndarray) -> np.ndarray:
    return np.asarray(decoder.logits(ids, decoder.new_cache(len(ids))))


MIXTURES = ("qwen3-moe", "mixtral")
TRAINED = [*CASES, *(case for case in BEYOND_LLAMA if not case.startswith(MIXTURES))]


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# The decoder and the student


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


def test_a_store_of_too_many_terms_is_refused_by_name(model: Path, text: str, tmp_path: Path) -> None:
    store = packed(model, tmp_path / "store", groups=300, block="matrix")
    with pytest.raises(DistillError, match=r"has 512 terms, expected at most 256 to be trained"):
        distill(store, open_checkpoint(model), text, str(tmp_path / "out"), SMALL)


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


# The loss


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


# Runs


def test_a_run_gains_and_makes_a_store_like_any_other(store: str, model: Path, text: str, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in Path(store).rglob("*") if path.is_file()}
    out = str(tmp_path / "out")
    teacher = open_checkpoint(model)
    found = distill(store, teacher, text, out, SMALL)
    assert found.best < found.start
    assert found.best_step > 0
    assert before == {path: path.read_bytes() for path in Path(store).rglob("*") if path.is_file()}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    opened, source = open_store(out), open_store(store)
    assert all(problem == "" for _, problem in verify(opened))
    record = opened.attributes["distillation"]
    assert record["settings"]["steps"] == 6
    assert [step for step, _ in record["held_out"]] == [0, 2, 4, 6]
    assert len(record["losses"]["mean"]) == 6
    assert record["losses"]["mean"][-1] < record["losses"]["mean"][0]
    theirs, ours = source.complete_attributes(NAME), opened.complete_attributes(NAME)
    assert ours["hashes"]["planes"] == theirs["hashes"]["planes"]
    assert ours["hashes"]["coef"] != theirs["hashes"]["coef"]
    weight = (teacher.tensors[NAME], dequantize(opened.read_packed(NAME)))
    error = np.sum((read_weight(weight[0]).float32().astype(np.float64) - weight[1]) ** 2)
    assert ours["report"]["squared_error"] == pytest.approx(error, rel=1e-5)
    norm = opened.read_plain("model.norm.weight")[0]
    assert norm.dtype == "F32"
    assert not np.array_equal(norm.float32(), source.read_plain("model.norm.weight")[0].float32())


def test_the_engine_gives_what_training_saw(store: str, model: Path, text: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    teacher = open_checkpoint(model)
    distill(store, teacher, text, out, SMALL)
    config, opened = parse(teacher.config), open_store(out)
    tokens = np.random.default_rng(0).integers(0, 94, 96)
    engine = load_decoder(out, 1, ActivationSettings(16)).decoder
    weights = {k: v.detach() for k, v in Student.of_store(opened, config, CPU, torch.float32, False).weights().items()}
    decoder = TorchDecoder(config, CPU, 96)
    with torch.no_grad():
        found = decoder.head(weights, decoder.states(weights, torch.from_numpy(tokens)[None]))[0].numpy()
    assert apart(found, logits(engine, tokens)) < 1e-4
    predictions = Predictions(decoder, SMALL, CPU)
    loss = predictions.text_loss(weights, torch.from_numpy(tokens)[None])
    assert np.exp(loss / 95) == pytest.approx(evaluate(engine, tokens, 96).perplexity, rel=1e-3)


class InterruptedRunError(Exception):
    pass


def test_an_interrupted_run_gives_the_same_bytes(store: str, model: Path, text: str, tmp_path: Path, tree: Any) -> None:
    teacher, places = open_checkpoint(model), Places(checkpoint_every=2)
    distill(store, teacher, text, str(tmp_path / "whole"), SMALL, places)

    def interrupt(progress: Any) -> None:
        if progress.step == 5:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        distill(store, teacher, text, str(tmp_path / "parts"), SMALL, places, on_step=interrupt)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(DistillError, match=r"--lr was 0.05 and is 0.01 now"):
        distill(store, teacher, text, str(tmp_path / "parts"), replace(SMALL, lr=0.01), places)
    found = distill(store, teacher, text, str(tmp_path / "parts"), SMALL, places)
    assert found.resumed_at == 4
    assert tree(tmp_path / "whole") == tree(tmp_path / "parts")


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


def test_cached_logits_and_parts_of_a_batch_do_not_change_the_result(
    store: str, model: Path, text: str, tmp_path: Path, tree: Any
) -> None:
    teacher = open_checkpoint(model)
    distill(store, teacher, text, str(tmp_path / "plain"), SMALL)
    cached = Places(cached_logits=tmp_path / "cache")
    distill(store, teacher, text, str(tmp_path / "first"), SMALL, cached)
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(files) == len({int(n) for s in range(6) for n in _windows(text, model).of_step(s, 4)})
    again = distill(store, teacher, text, str(tmp_path / "second"), SMALL, cached)
    assert tree(tmp_path / "plain") == tree(tmp_path / "first") == tree(tmp_path / "second")
    parts = distill(store, teacher, text, str(tmp_path / "parts"), replace(SMALL, accumulate=4), cached)
    assert parts.best == pytest.approx(again.best, rel=1e-3)


def _windows(text: str, model: Path) -> Windows:
    tokens = load_tokenizer(open_checkpoint(model).assets()).encode(text)
    return Windows.of(np.array(tokens, np.int64), SMALL)


def test_dbllm_chooses_planes_anew_where_that_helps(model: Path, text: str, tmp_path: Path) -> None:
    start = packed(model, tmp_path / "db", method="dbllm")
    out = str(tmp_path / "out")
    distill(start, open_checkpoint(model), text, out, replace(SMALL, rechoose_planes=True))
    opened = open_store(out)
    rechosen = opened.attributes["distillation"]["planes_rechosen"]
    assert rechosen in (True, False)
    same = (
        opened.complete_attributes(NAME)["hashes"]["planes"]
        == open_store(start).complete_attributes(NAME)["hashes"]["planes"]
    )
    assert same is not rechosen
    assert all(problem == "" for _, problem in verify(opened))


def test_embeddings_packed_in_eight_bits_are_trained_too(model: Path, text: str, tmp_path: Path) -> None:
    start = packed(model, tmp_path / "start", embeddings="8bit")
    distill(start, open_checkpoint(model), text, str(tmp_path / "out"), SMALL)
    name = "lm_head.weight"
    hashes = [open_store(str(tmp_path / at)).complete_attributes(name)["hashes"]["coef"] for at in ("start", "out")]
    assert hashes[0] != hashes[1]


def test_the_teacher_writes_its_own_text(model: Path, store: str, tmp_path: Path, run: Run) -> None:
    checkpoint = open_checkpoint(model)
    config = parse(checkpoint.config)
    weights = teacher_weights(checkpoint, config, CPU, torch.float32)
    predictions = Predictions(TorchDecoder(config, CPU, 16), SMALL, CPU)
    first, again, other = (write_text(predictions, weights, 1000, 16, 0, None, seed) for seed in (1, 1, 2))
    assert first.shape == (1008,)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.all(first.reshape(-1, 16)[:, 0] == 0)
    code, out, _ = run(
        "distill", store, "--teacher", model, "--data-free", "--written-tokens", 2000, "--out", tmp_path / "out",
        "--steps", 20, "--context", 16, "--lr", 0.02, "--validation-share", 0.2, "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["best"] < json.loads(out)["start"]


def test_a_loss_that_becomes_nan_stops_at_the_last_good_state(
    store: str, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Predictions.learn
    calls = []

    def broken(self: Predictions, *arguments: Any) -> float:
        calls.append(1)
        found = learn(self, *arguments)
        return float("nan") if len(calls) == fails_at else found

    monkeypatch.setattr(Predictions, "learn", broken)
    fails_at = 4
    found = distill(store, open_checkpoint(model), text, str(tmp_path / "out"), SMALL)
    assert "the loss became nan at step 4; try a smaller --lr" in found.stopped
    assert (found.best_step, found.steps) == (2, 3)
    assert all(problem == "" for _, problem in verify(open_store(str(tmp_path / "out"))))
    calls.clear()
    fails_at = 1
    with pytest.raises(DistillError, match=r"training did not improve .* no store was written: the loss"):
        distill(store, open_checkpoint(model), text, str(tmp_path / "none"), SMALL)
    assert not (tmp_path / "none").exists()


def test_it_stops_where_held_out_text_gains_no_more(store: str, model: Path, text: str, tmp_path: Path) -> None:
    settings = replace(SMALL, steps=40, lr=0.5, warmup=0.5, evaluate_every=1, patience=2)
    found = distill(store, open_checkpoint(model), text, str(tmp_path / "out"), settings)
    assert 0 < found.best_step < 38
    assert found.steps == found.best_step + 2
    assert f"held-out perplexity has not fallen since step {found.best_step}" in found.stopped


def test_memory_that_runs_out_names_the_settings(
    store: str, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> float:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Predictions, "learn", full)
    with pytest.raises(DistillError, match="4 windows of 16 tokens were trained at once: raise --accumulate"):
        distill(store, open_checkpoint(model), text, str(tmp_path / "out"), SMALL)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused_before_work(
    run: Run, store: str, model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text)
    other = write_model(tmp_path / "other", tiny_tensors(hidden=32), tiny_config(hidden=32))
    unfinished = tmp_path / "unfinished"
    tensors = tiny_tensors()
    tensors[NAME][0, 0] = float("nan")
    run("compress", write_model(tmp_path / "nan", tensors, tiny_config()), unfinished)

    def refused(expected: str, *arguments: object, at: str = store, teacher: Path = model) -> None:
        code, out, err = run("distill", at, "--teacher", teacher, "--out", tmp_path / "out", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert expected in err
        assert not (tmp_path / "out").exists()

    given = ("--text", file, "--context", 16)
    refused("give the checkpoint that it was made from", *given, teacher=other)
    refused("not complete", *given, at=str(unfinished))
    refused("expected at least 400 for a batch", *given, "--batch", 400)
    refused("nothing to train on: expected --text FILE, or --data-free")
    refused("expected either --text FILE or --data-free", *given, "--data-free")
    refused("expected at most 128, the model's limit", "--text", file, "--context", 256)
    refused("--accumulate 3: expected a divisor of the batch of 4", *given, "--accumulate", 3)
    refused("not readable as UTF-8 text", "--text", tmp_path / "nowhere")
    refused("no such store", *given, at=str(tmp_path / "nothing"))
    code, _, err = run("distill", store, "--teacher", model, "--out", "memory://out", *given)
    assert (code, "give one as --work" in err) == (2, True)
    (tmp_path / "taken").mkdir()
    code, _, err = run("distill", store, "--teacher", model, "--out", tmp_path / "taken", *given)
    assert (code, "exists; choose another --out, or --overwrite" in err) == (2, True)
    if not torch.cuda.is_available():
        refused("PyTorch finds no CUDA device", *given, "--device", "cuda")
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("bincompress.distillation")]:
        monkeypatch.delitem(sys.modules, name)
    refused("pip install 'bincompress[distill]'", *given)


def test_the_report_shows_how_it_went(store: str, model: Path, text: str, tmp_path: Path, run: Run) -> None:
    distill(store, open_checkpoint(model), text, str(tmp_path / "out"), SMALL)
    assert run("report", tmp_path / "out", "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "Distillation" in page
    assert "held-out perplexity" in page
    assert run("report", store, "--out", tmp_path / "page.html")[0] == 0
    assert "Distillation" not in (tmp_path / "page.html").read_text()


# The order of windows and the learning rate


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
