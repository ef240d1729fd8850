"""Does distillation gain, tell the truth about it, resume without a trace, and refuse by name?"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.model import Predictions, teacher_weights
from bincompress.distillation.places import Places
from bincompress.distillation.run import distill
from bincompress.distillation.settings import DistillError, DistillSettings
from bincompress.distillation.teacher import write_text
from bincompress.distillation.windows import Windows
from bincompress.inference.evaluate import evaluate
from bincompress.inference.load import load_decoder
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from bincompress.store.store import open_store
from bincompress.store.verify import verify
from bincompress.tensors.dequantize import dequantize
from tests.conftest import Run, tiny_config, tiny_tensors, write_model
from tests.training import CPU, KilledError, as_trained, assert_engine_gives_what_training_saw

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]  # PyTorch

NAME = "model.layers.1.mlp.down_proj.weight"
SMALL = DistillSettings(steps=6, batch=4, context=16, lr=0.05, evaluate_every=2, validation_share=0.2, norms=True)


@pytest.fixture(scope="module")
def text(letters_text: Path) -> str:
    return letters_text.read_text()[:800]


def packed(model: Path, store: Path, **options: Any) -> str:
    plan = make_plan(open_checkpoint(model), load_recipe(None, options))
    assert compress(plan, str(store)).complete
    return str(store)


@pytest.fixture(scope="module")
def store(letters_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return packed(letters_model, tmp_path_factory.mktemp("stores") / "wgm", block=64)


def test_a_store_of_too_many_terms_is_refused_by_name(letters_model: Path, text: str, tmp_path: Path) -> None:
    store = packed(letters_model, tmp_path / "store", groups=300, block="matrix")
    with pytest.raises(DistillError, match=r"has 512 terms, expected at most 256 to be trained"):
        distill(store, open_checkpoint(letters_model), text, str(tmp_path / "out"), SMALL)


def test_a_run_gains_and_makes_a_store_like_any_other(
    store: str, letters_model: Path, text: str, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in Path(store).rglob("*") if path.is_file()}
    out = str(tmp_path / "out")
    teacher = open_checkpoint(letters_model)
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


def test_the_engine_gives_what_training_saw(store: str, letters_model: Path, text: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    teacher = open_checkpoint(letters_model)
    distill(store, teacher, text, out, SMALL)
    tokens = np.random.default_rng(0).integers(0, 94, 96)
    assert_engine_gives_what_training_saw(Path(out), letters_model, tokens)
    config, weights = as_trained(out, letters_model)
    engine = load_decoder(out, 1, ActivationSettings(16)).decoder
    predictions = Predictions(TorchDecoder(config, CPU, 96), SMALL, CPU)
    loss = predictions.text_loss(weights, torch.from_numpy(tokens)[None])
    assert np.exp(loss / 95) == pytest.approx(evaluate(engine, tokens, 96).perplexity, rel=1e-3)


def test_an_interrupted_run_gives_the_same_bytes(
    store: str, letters_model: Path, text: str, tmp_path: Path, tree: Any
) -> None:
    teacher, places = open_checkpoint(letters_model), Places(checkpoint_every=2)
    distill(store, teacher, text, str(tmp_path / "whole"), SMALL, places)

    def interrupt(progress: Any) -> None:
        if progress.step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        distill(store, teacher, text, str(tmp_path / "parts"), SMALL, places, on_step=interrupt)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(DistillError, match=r"--lr was 0.05 and is 0.01 now"):
        distill(store, teacher, text, str(tmp_path / "parts"), replace(SMALL, lr=0.01), places)
    found = distill(store, teacher, text, str(tmp_path / "parts"), SMALL, places)
    assert found.resumed_at == 4
    assert tree(tmp_path / "whole") == tree(tmp_path / "parts")


def test_cached_logits_and_parts_of_a_batch_do_not_change_the_result(
    store: str, letters_model: Path, text: str, tmp_path: Path, tree: Any
) -> None:
    teacher = open_checkpoint(letters_model)
    distill(store, teacher, text, str(tmp_path / "plain"), SMALL)
    cached = Places(cached_logits=tmp_path / "cache")
    distill(store, teacher, text, str(tmp_path / "first"), SMALL, cached)
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(files) == len({int(n) for s in range(6) for n in _windows(text, letters_model).of_step(s, 4)})
    again = distill(store, teacher, text, str(tmp_path / "second"), SMALL, cached)
    assert tree(tmp_path / "plain") == tree(tmp_path / "first") == tree(tmp_path / "second")
    parts = distill(store, teacher, text, str(tmp_path / "parts"), replace(SMALL, accumulate=4), cached)
    assert parts.best == pytest.approx(again.best, rel=1e-3)


def _windows(text: str, model: Path) -> Windows:
    tokens = load_tokenizer(open_checkpoint(model).assets()).encode(text)
    return Windows.of(np.array(tokens, np.int64), SMALL)


def test_dbllm_chooses_planes_anew_where_that_helps(letters_model: Path, text: str, tmp_path: Path) -> None:
    start = packed(letters_model, tmp_path / "db", method="dbllm")
    out = str(tmp_path / "out")
    distill(start, open_checkpoint(letters_model), text, out, replace(SMALL, rechoose_planes=True))
    opened = open_store(out)
    rechosen = opened.attributes["distillation"]["planes_rechosen"]
    assert rechosen in (True, False)
    same = (
        opened.complete_attributes(NAME)["hashes"]["planes"]
        == open_store(start).complete_attributes(NAME)["hashes"]["planes"]
    )
    assert same is not rechosen
    assert all(problem == "" for _, problem in verify(opened))


def test_embeddings_packed_in_eight_bits_are_trained_too(letters_model: Path, text: str, tmp_path: Path) -> None:
    start = packed(letters_model, tmp_path / "start", embeddings="8bit")
    distill(start, open_checkpoint(letters_model), text, str(tmp_path / "out"), SMALL)
    name = "lm_head.weight"
    hashes = [open_store(str(tmp_path / at)).complete_attributes(name)["hashes"]["coef"] for at in ("start", "out")]
    assert hashes[0] != hashes[1]


def test_the_teacher_writes_its_own_text(letters_model: Path, store: str, tmp_path: Path, run: Run) -> None:
    checkpoint = open_checkpoint(letters_model)
    config = parse(checkpoint.config)
    weights = teacher_weights(checkpoint, config, CPU, torch.float32)
    predictions = Predictions(TorchDecoder(config, CPU, 16), SMALL, CPU)
    first, again, other = (write_text(predictions, weights, 1000, 16, 0, None, seed) for seed in (1, 1, 2))
    assert first.shape == (1008,)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.all(first.reshape(-1, 16)[:, 0] == 0)
    code, out, _ = run(
        "distill", store, "--teacher", letters_model, "--data-free", "--written-tokens", 2000,
        "--out", tmp_path / "out", "--steps", 20, "--context", 16, "--lr", 0.02, "--validation-share", 0.2, "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["best"] < json.loads(out)["start"]


def test_a_loss_that_becomes_nan_stops_at_the_last_good_state(
    store: str, letters_model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Predictions.learn
    calls = []

    def broken(self: Predictions, *arguments: Any) -> float:
        calls.append(1)
        found = learn(self, *arguments)
        return float("nan") if len(calls) == fails_at else found

    monkeypatch.setattr(Predictions, "learn", broken)
    fails_at = 4
    found = distill(store, open_checkpoint(letters_model), text, str(tmp_path / "out"), SMALL)
    assert "the loss became nan at step 4; try a smaller --lr" in found.stopped
    assert (found.best_step, found.steps) == (2, 3)
    assert all(problem == "" for _, problem in verify(open_store(str(tmp_path / "out"))))
    calls.clear()
    fails_at = 1
    with pytest.raises(DistillError, match=r"training did not improve .* no store was written: the loss"):
        distill(store, open_checkpoint(letters_model), text, str(tmp_path / "none"), SMALL)
    assert not (tmp_path / "none").exists()


def test_it_stops_where_held_out_text_gains_no_more(store: str, letters_model: Path, text: str, tmp_path: Path) -> None:
    settings = replace(SMALL, steps=40, lr=0.5, warmup=0.5, evaluate_every=1, patience=2)
    found = distill(store, open_checkpoint(letters_model), text, str(tmp_path / "out"), settings)
    assert 0 < found.best_step < 38
    assert found.steps == found.best_step + 2
    assert f"held-out perplexity has not fallen since step {found.best_step}" in found.stopped


def test_memory_that_runs_out_names_the_settings(
    store: str, letters_model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> float:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Predictions, "learn", full)
    with pytest.raises(DistillError, match="4 windows of 16 tokens were trained at once: raise --accumulate"):
        distill(store, open_checkpoint(letters_model), text, str(tmp_path / "out"), SMALL)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused_before_work(
    run: Run, store: str, letters_model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text)
    other = write_model(tmp_path / "other", tiny_tensors(hidden=32), tiny_config(hidden=32))
    unfinished = tmp_path / "unfinished"
    tensors = tiny_tensors()
    tensors[NAME][0, 0] = float("nan")
    run("compress", write_model(tmp_path / "nan", tensors, tiny_config()), unfinished)

    def refused(expected: str, *arguments: object, at: str = store, teacher: Path = letters_model) -> None:
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
    code, _, err = run("distill", store, "--teacher", letters_model, "--out", "memory://out", *given)
    assert (code, "give one as --work" in err) == (2, True)
    (tmp_path / "taken").mkdir()
    code, _, err = run("distill", store, "--teacher", letters_model, "--out", tmp_path / "taken", *given)
    assert (code, "exists; choose another --out, or --overwrite" in err) == (2, True)
    if not torch.cuda.is_available():
        refused("PyTorch finds no CUDA device", *given, "--device", "cuda")
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("bincompress.distillation")]:
        monkeypatch.delitem(sys.modules, name)
    refused("pip install 'bincompress[distill]'", *given)


def test_the_report_shows_how_it_went(store: str, letters_model: Path, text: str, tmp_path: Path, run: Run) -> None:
    distill(store, open_checkpoint(letters_model), text, str(tmp_path / "out"), SMALL)
    assert run("report", tmp_path / "out", "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "Distillation" in page
    assert "held-out perplexity" in page
    assert run("report", store, "--out", tmp_path / "page.html")[0] == 0
    assert "Distillation" not in (tmp_path / "page.html").read_text()


# The order of windows and the learning rate
