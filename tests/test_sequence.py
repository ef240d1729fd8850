"""Is a layer calibrated on what the layers before it have become, and does such a run survive what happens to runs?"""

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.calibration.collect import calibrate as collect
from bincompress.calibration.collect import choose_samples, run_in_threads, text_record
from bincompress.calibration.statistics import Statistics
from bincompress.compression.plan import Plan, make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.records import Job, JobReport
from bincompress.compression.run import Outcome, compress
from bincompress.compression.runner import Processes, run_local
from bincompress.compression.sequential import in_sequence
from bincompress.errors import StoreError, TensorError
from bincompress.inference.evaluate import evaluate
from bincompress.inference.load import load_decoder
from bincompress.methods import Inputs
from bincompress.methods.rounding.asymmetric import asymmetric_target
from bincompress.methods.rounding.curvature import curvature
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.packed_linear import ActivationSettings
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.layout import STATISTICS
from bincompress.store.location import files_at
from bincompress.store.replace import mark_beginning
from bincompress.store.store import open_store
from tests.conftest import DEMO_MODEL, SHARED, Run, tiny_config, tiny_tensors, write_model
from tests.runs import problems
from tests.test_calibrate import SAMPLES, Watched

Tree = Callable[[Path], dict[str, bytes]]
ONE_PLANE = {"method": "xnor", "compensate": True, "scale_bits": 8, "block": 64, "refine": 2}
BELLS = {"method": "dbellquant", "planes": 1}


def planned(model: Path, **options: object) -> Plan:
    recipe = load_recipe(None, options or ONE_PLANE)
    return make_plan(open_checkpoint(model), recipe, sequence=text_record(SAMPLES))


def run(
    model: Path, store: Path, threads: int = 1, processes: Processes | None = None, plan: Plan | None = None,
    **others: Any,
) -> Outcome:  # fmt: skip
    runner = functools.partial(run_local, workers=2 if processes else 1, processes=processes)
    chain = in_sequence(open_checkpoint(model), SAMPLES, str(store), runner, threads=threads)
    return compress(plan or planned(model), str(store), runner=chain, **others)


def seen(decoder: Any, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what the last layer's gate_up and down read, and the residual stream that down adds to."""
    last = decoder.layers[-1]
    down, gate_up = Watched(last.down), Watched(last.gate_up)
    decoder.layers[-1] = replace(last, down=down, gate_up=gate_up)
    cache = decoder.new_cache(samples.shape[1])
    streams: list[np.ndarray] = []
    for sample in samples:
        cache.rewind()
        after = decoder._advance(sample, cache).stream
        streams.append(after - down.matrix(down.seen[-1]))
    read, written, stream = (np.concatenate(kept).astype(np.float64) for kept in (gate_up.seen, down.seen, streams))
    return read, written, stream


@pytest.mark.parametrize("options", [ONE_PLANE, BELLS])
def test_statistics_are_those_of_the_layers_as_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    tensors, random = tiny_tensors(), np.random.default_rng(0)
    for name in tensors:  # uneven columns, so that a transformation has something to do
        if name.startswith("model.layers.") and tensors[name].shape[-1] == 64 and tensors[name].ndim == 2:
            uneven = np.exp(random.standard_normal(64)).astype(np.float32)
            tensors[name] = (tensors[name].astype(np.float32) * uneven).astype(tensors[name].dtype)
    tiny_model = write_model(tmp_path / "model", tensors, tiny_config())
    monkeypatch.setattr("bincompress.calibration.collect._PART_TOKENS", 64)  # three parts
    written: dict[str, dict[str, np.ndarray]] = {}
    monkeypatch.setattr(Statistics, "remove", lambda self: None)
    write = Statistics.write

    def noted(self: Statistics, key: str, tensors: list[str], tokens: int, arrays: dict[str, np.ndarray]) -> None:
        written[key] = arrays
        write(self, key, tensors, tokens, arrays)

    monkeypatch.setattr(Statistics, "write", noted)
    assert run(tiny_model, tmp_path / "store", plan=planned(tiny_model, **options)).complete
    assert len(written) == 8
    assert {key.split(".")[-2] for key, arrays in written.items() if "lack" in arrays} == {"o_proj", "down_proj"}
    middle, x, stream = seen(load_decoder(str(tmp_path / "store"), 1, ActivationSettings(16)).decoder, SAMPLES)
    exact_middle, exact_x, exact_stream = seen(load_checkpoint(tiny_model), SAMPLES)
    down = load_checkpoint(tiny_model).layers[-1].down
    lack = exact_stream + down((exact_x - x).astype(np.float32)) - stream
    if options["method"] == "dbellquant":  # of the input as it is before anything is folded into the norm
        store, norm = open_store(str(tmp_path / "store")), "model.layers.1.post_attention_layernorm.weight"
        folded = load_checkpoint(tiny_model).layers[1].post_norm / store.read_plain(norm)[0].float32().reshape(-1)
        assert np.std(np.log(folded)) > 0.01
        middle = middle * folded
    for key, name, expected in (
        ("gate_proj", "hessian", middle.T @ middle),
        ("gate_proj", "drift", (exact_middle - middle).T @ middle),
        ("down_proj", "hessian", x.T @ x),
        ("down_proj", "lack", lack.T @ x),
    ):
        found, expected = written[f"model.layers.1.mlp.{key}.weight"][name], expected / len(x)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), err_msg=key + name)
    absmax = written["model.layers.1.mlp.down_proj.weight"]["absmax"]
    np.testing.assert_allclose(absmax, np.abs(x).max(axis=0), rtol=1e-4)
    assert not np.any(written["model.layers.0.self_attn.q_proj.weight"]["drift"])  # nothing is packed before it


def test_the_aim_is_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    x, exact_x = random.standard_normal((2, 200, 8))
    stream, weights = random.standard_normal((200, 5)), random.standard_normal((5, 8)).astype(np.float32)
    lack = (exact_x - x) @ weights.T + stream
    hessian, drift, lack_mean = ((a.T @ x / len(x)).astype(np.float32) for a in (x, exact_x - x, lack))
    monkeypatch.setattr("bincompress.methods.rounding.asymmetric._SHARE", 1.0)
    monkeypatch.setattr("bincompress.methods.rounding.curvature._DAMPING", 1e-9)
    known, absmax = curvature(hessian), np.abs(x).max(axis=0)
    for inputs, outputs in (
        (Inputs("x", hessian, absmax, drift=drift), exact_x @ weights.T),
        (Inputs("x", hessian, absmax, lack=lack_mean), exact_x @ weights.T + stream),
    ):
        expected = np.linalg.lstsq(x, outputs, rcond=None)[0].T
        np.testing.assert_allclose(asymmetric_target(weights, known, inputs), expected, rtol=1e-3, atol=1e-4)
    assert asymmetric_target(weights, known, Inputs("x", hessian, absmax)) is weights


@pytest.mark.parametrize("options", [ONE_PLANE, BELLS, {"compensate": True}])
def test_bytes_do_not_depend_on_threads_and_workers(
    tiny_model: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, processes: Processes,
    options: dict[str, Any],
) -> None:  # fmt: skip
    monkeypatch.setattr("bincompress.calibration.collect._PART_TOKENS", 64)
    plan = planned(tiny_model, **options)
    first = run(tiny_model, tmp_path / "one", plan=plan)
    assert (first.done, first.complete) == (21, True)
    assert run(tiny_model, tmp_path / "two", threads=3, processes=processes, plan=plan).complete
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert problems(tmp_path / "one") == {}
    assert run(tiny_model, tmp_path / "one", plan=plan).unchanged == 21
    assert {path.name for path in tmp_path.iterdir()} == {"model", "one", "two"}


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("jobs", "options"), [(3, ONE_PLANE), (13, ONE_PLANE), (16, ONE_PLANE), (11, BELLS), (12, BELLS)]
)
def test_an_interrupted_run_goes_on(
    tiny_model: Path, tmp_path: Path, tree: Tree, jobs: int, options: dict[str, Any]
) -> None:
    plan, count = planned(tiny_model, **options), itertools.count(1)

    def stop(report: JobReport) -> None:
        if next(count) == jobs:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(tiny_model, tmp_path / "store", plan=plan, on_report=stop)
    done: list[str] = []
    outcome = run(tiny_model, tmp_path / "store", plan=plan, on_report=lambda report: done.append(report.status))
    assert (len(done), outcome.unchanged, outcome.complete) == (21, jobs, True)
    run(tiny_model, tmp_path / "undisturbed", plan=plan)
    assert tree(tmp_path / "store") == tree(tmp_path / "undisturbed")
    assert not (tmp_path / "store.sequence").exists()


def dies_at(monkeypatch: pytest.MonkeyPatch, method: str, after: Callable[[Statistics], None]) -> None:
    def dies(self: Statistics, *arguments: object) -> None:
        after(self)
        raise StoppedError

    monkeypatch.setattr(Statistics, method, dies)


@pytest.mark.parametrize("damage", ["lost", "not whole", "changed"])
def test_a_damaged_stream_is_not_gone_on_with(
    tiny_model: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with monkeypatch.context() as patch:
        dies_at(patch, "remove_work", lambda found: None)
        with pytest.raises(StoppedError):
            run(tiny_model, tmp_path / "store")
    node = tmp_path / "store.sequence" / "work" / "stream-1"
    chunks = [path for path in (node / "c").rglob("*") if path.is_file()]
    if damage == "changed":
        chunks[0].write_bytes(chunks[0].read_bytes()[:-9])
    else:  # killed before the mark that it is whole: chunks may be missing, which zarr reads as zeros
        chunks[0].unlink()
    if damage == "not whole":
        metadata = json.loads((node / "zarr.json").read_text())
        (node / "zarr.json").write_text(json.dumps({**metadata, "attributes": {}}))
    assert run(tiny_model, tmp_path / "store").complete
    run(tiny_model, tmp_path / "undisturbed")
    assert tree(tmp_path / "store") == tree(tmp_path / "undisturbed")


def begin_removal(found: Statistics) -> None:
    mark_beginning(files_at(found.url), STATISTICS, 1)


@pytest.mark.parametrize("moment", [begin_removal, lambda found: shutil.rmtree(Path(found.url) / "inputs")])
def test_a_kill_while_statistics_are_removed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: Callable[[Statistics], None]
) -> None:
    with monkeypatch.context() as patch:
        dies_at(patch, "remove", moment)
        with pytest.raises(StoppedError):
            run(tiny_model, tmp_path / "store")
    outcome = run(tiny_model, tmp_path / "store")
    assert (outcome.unchanged, outcome.complete) == (21, True)
    assert not (tmp_path / "store.sequence").exists()


def test_what_changes_in_a_complete_store_is_calibrated_again(tiny_model: Path, tmp_path: Path, tree: Tree) -> None:
    run(tiny_model, tmp_path / "store")
    before = tree(tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "tensors" / "model.layers.0.mlp.up_proj.weight")
    outcome = run(tiny_model, tmp_path / "store")
    assert (outcome.done, outcome.unchanged, outcome.complete) == (1, 20, True)
    assert tree(tmp_path / "store") == before


def test_what_is_not_its_own_is_left_alone(tiny_model: Path, tmp_path: Path, tree: Tree) -> None:
    place = tmp_path / "store.sequence"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds something else, and no statistics"):
        run(tiny_model, tmp_path / "store")
    assert (place / "notes.txt").read_text() == "mine"
    shutil.rmtree(place)
    collect(open_checkpoint(tiny_model), SAMPLES, str(place), runner=run_in_threads(1))
    before = tree(place)
    with pytest.raises(StoreError, match="the folder holds others; move or remove them"):
        run(tiny_model, tmp_path / "store")
    assert tree(place) == before


def test_what_hangs_on_a_failed_tensor_is_not_begun(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 5] = np.nan
    broken = write_model(tmp_path / "model", tensors, tiny_config())
    outcome = run(broken, tmp_path / "store")
    assert not outcome.complete
    assert len(outcome.failures) == 9  # it, the down_proj after it, and the second layer
    assert "nan at row 3, column 5" in outcome.failures[name]
    assert (
        f"not started: it is calibrated on the output of {name}"
        in outcome.failures["model.layers.0.mlp.down_proj.weight"]
    )
    kept = make_plan(open_checkpoint(broken), load_recipe(None, ONE_PLANE, (name,)), sequence=text_record(SAMPLES))
    with pytest.raises(TensorError, match="inputs are not finite on this text"):
        run(broken, tmp_path / "kept", plan=kept)


@pytest.mark.slow
@pytest.mark.needs_shared
def test_one_plane_loses_less_in_sequence(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(DEMO_MODEL)
    samples = choose_samples(checkpoint, (SHARED / "data" / "calib.txt").read_text()[:200_000], 12, 256)
    recipe = load_recipe(None, ONE_PLANE)
    found = collect(checkpoint, samples, str(tmp_path / "stats"), runner=run_in_threads(1))
    compress(make_plan(checkpoint, recipe, statistics=found), str(tmp_path / "alone"))
    chain = in_sequence(checkpoint, samples, str(tmp_path / "sequence"), run_local)
    plan = make_plan(checkpoint, recipe, sequence=text_record(samples))
    compress(plan, str(tmp_path / "sequence"), runner=chain)
    text = choose_samples(checkpoint, (SHARED / "data" / "valid.txt").read_text()[:50_000], 1, 512)[0]
    alone, sequence = (
        evaluate(load_decoder(str(tmp_path / name), 1, ActivationSettings(16)).decoder, text, 512, 1).perplexity
        for name in ("alone", "sequence")
    )
    assert sequence < 0.9 * alone


def test_jobs_of_one_input_are_handed_over_together(tiny_model: Path, tmp_path: Path) -> None:
    stages: list[set[str]] = []

    def noted(jobs: Sequence[Job]) -> Generator[JobReport, None, None]:
        stages.append({job.name.removeprefix("model.layers.") for job in jobs})
        yield from run_local(jobs)

    chain = in_sequence(open_checkpoint(tiny_model), SAMPLES, str(tmp_path / "store"), noted)
    compress(planned(tiny_model), str(tmp_path / "store"), runner=chain)
    assert stages[1:3] == [
        {f"0.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")}, {"0.self_attn.o_proj.weight"},
    ]  # fmt: skip
    assert len(stages) == 9


@pytest.mark.slow
def test_the_command_line(run: Run, letters_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The scheduler picks the next process to run on this core, and the page cache holds files. " * 40)
    store, stats = tmp_path / "store", tmp_path / "stats"
    options = ("--sequential", text, "--samples", 4, "--context", 64, "--compensate", "--scale-bits", 8)
    code, out, err = run("compress", letters_model, store, *options, "--json")
    assert (code, json.loads(out)["done"]) == (0, 21), err
    assert "256 tokens are few for inputs of 160 columns" in err
    code, out, err = run("compress", letters_model, store, *options)
    assert (code, "21 already complete" in out) == (0, True), err
    assert run("report", store, "--out", tmp_path / "report.html")[0] == 0
    assert '"context": 64' in (tmp_path / "report.html").read_text()
    code, out, err = run("compress", letters_model, tmp_path / "dry", *options, "--dry-run")
    assert (code, "core-hours" in out, "--sequential also runs 256 tokens" in out) == (0, True, True), err
    dry = ("--compensate", "--dry-run", "--json")
    assert "give a longer text" in run("compress", DEMO_MODEL, tmp_path / "dry", *options[:2], *dry)[2]
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "config.json").write_bytes((DEMO_MODEL / "config.json").read_bytes())  # no tokenizer to ask
    more, most = (
        json.loads(run("compress", tmp_path / "shapes", tmp_path / "dry", *options[:2], *given, *dry)[1])
        for given in (("--samples", 4), ())
    )
    added = most["collecting_memory_bytes"] - more["collecting_memory_bytes"]
    assert added == (64 - 4) * 512 * 4 * (6 * 256 + 2 * 768)
    assert run("calibrate", letters_model, stats, "--text", text, "--samples", 4, "--context", 64)[0] == 0
    code, out, err = run(
        "compress", letters_model, tmp_path / "spread", *options, "--stats", stats, "--target-bits", 2, "--json"
    )
    assert (code, json.loads(out)["total"]["binary"]["stored_bits"] <= 2) == (0, True), err
    sequential = ("--sequential", text, "--samples", 2, "--context", 64)
    for arguments, message in (
        ((*sequential,), "--sequential needs a method that uses calibration; add --compensate"),
        ((*sequential, "--compensate", "--stats", stats), "leave --stats out"),
        ((*sequential, "--compensate", "--target-bits", 2), "give it --stats STATS too"),
        ((*sequential, "--compensate", "--samples", 10**6), "give a longer text, or --samples"),
        (("--compensate", "--samples", 4), "--samples is for --sequential"),
        (("--sequential", tmp_path / "none", "--compensate"), "not readable as UTF-8 text"),
        (("--compensate",), "or give --sequential FILE"),
    ):
        code, _, err = run("compress", letters_model, tmp_path / "x", *arguments)
        assert (code, message in err) == (2, True), err
    code, _, err = run("compress", letters_model, store, *options[:2], "--samples", 5, *options[4:])
    assert (code, "was started with other settings: statistics" in err) == (2, True), err
