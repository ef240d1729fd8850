"""Are the statistics those of the model's inputs, the same however they are collected, and is every misuse refused?"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.calibration.collect import Calibration, PartRunner, calibrate, choose_samples, run_in_threads
from bincompress.calibration.statistics import Statistics, open_statistics
from bincompress.compression.allocation import Trial, run_trials, spread, spreadable, trial_jobs
from bincompress.compression.allocation import trials_of as trials_with_errors
from bincompress.compression.plan import Plan, make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.compression.runner import Processes, run_local
from bincompress.errors import BincompressError, DamagedError, RecipeError, StoreError, TensorError
from bincompress.inference.load import load_decoder
from bincompress.methods import dbellquant
from bincompress.methods.dbellquant import channel_scale
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import parse
from bincompress.model.packed_linear import ActivationSettings
from bincompress.reporting.inspection import inspect
from bincompress.sources.checkpoint import open_checkpoint
from bincompress.store.export import export
from bincompress.store.store import open_store
from tests.conftest import Run, tiny_config, tiny_tensors, write_model
from tests.runs import problems

Tree = Callable[[Path], dict[str, bytes]]
SAMPLES = np.random.default_rng(5).integers(0, 96, (6, 32))
DOWN = "model.layers.1.mlp.down_proj.weight"


def collect(model: Path, place: Path, threads: int = 1, samples: np.ndarray = SAMPLES, **options: object) -> Statistics:
    return calibrate(open_checkpoint(model), samples, str(place), runner=run_in_threads(threads), **options)  # type: ignore[arg-type]


@pytest.fixture
def statistics(tiny_model: Path, tmp_path: Path) -> Statistics:
    return collect(tiny_model, tmp_path / "stats")


def planned(model: Path, found: Statistics | None, **options: object) -> Plan:
    return make_plan(open_checkpoint(model), load_recipe(None, options), statistics=found)


class Watched:
    """A matrix of a whole decoder that keeps what it is multiplied with."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix
        self.seen: list[np.ndarray] = []
        self.rows, self.cols = matrix.rows, matrix.cols

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.seen.append(x.copy())
        product: np.ndarray = self.matrix(x)
        return product


def test_statistics_are_those_of_the_whole_model(tiny_model: Path, statistics: Statistics) -> None:
    decoder = load_checkpoint(tiny_model)
    names = {"qkv": "self_attn.v_proj", "out": "self_attn.o_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}
    watched: list[Any] = [{key: Watched(getattr(layer, key)) for key in names} for layer in decoder.layers]
    decoder.layers = [replace(layer, **own) for layer, own in zip(decoder.layers, watched, strict=True)]
    cache = decoder.new_cache(32)
    for sample in SAMPLES:
        cache.rewind()
        decoder.states(sample, cache)
    for layer, own in enumerate(watched):
        for key, matrix in own.items():
            x = np.concatenate(matrix.seen).astype(np.float64)
            found = statistics.read(f"model.layers.{layer}.{names[key]}.weight")
            np.testing.assert_allclose(found.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-6 * np.abs(x).max() ** 2)
            np.testing.assert_allclose(found.absmax, np.abs(x).max(axis=0), rtol=1e-5)
    assert len(set(statistics.attributes["inputs"].values())) == 8


def test_bytes_do_not_depend_on_threads(
    tiny_model: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bincompress.calibration.collect._PART_TOKENS", 64)  # three parts
    for threads in (1, 3):
        collect(tiny_model, tmp_path / f"stats-{threads}", threads)
    assert tree(tmp_path / "stats-1") == tree(tmp_path / "stats-3")


class StoppedError(Exception):
    pass


def test_an_interrupted_run_goes_on(
    tiny_model: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == total:  # within the last layer
            raise StoppedError

    with pytest.raises(StoppedError):
        collect(tiny_model, tmp_path / "stats", progress=stop)
    with pytest.raises(StoreError, match="not complete; run the same `bincompress calibrate` again"):
        open_statistics(str(tmp_path / "stats"))
    layers: list[int] = []
    begin = PartRunner.__init__

    def counted(self: PartRunner, work: Calibration, layer: int) -> None:
        layers.append(layer)
        begin(self, work, layer)

    monkeypatch.setattr(PartRunner, "__init__", counted)
    collect(tiny_model, tmp_path / "stats")
    assert layers == [1]
    collect(tiny_model, tmp_path / "undisturbed")
    assert tree(tmp_path / "stats") == tree(tmp_path / "undisturbed")
    assert collect(tiny_model, tmp_path / "stats").complete  # and a complete one is left alone
    assert layers == [1, 0, 1]


def test_other_settings_and_other_things_are_not_overwritten(
    tiny_model: Path, tmp_path: Path, statistics: Statistics
) -> None:
    with pytest.raises(StoreError, match="was begun with another text"):
        collect(tiny_model, tmp_path / "stats", samples=SAMPLES[::-1].copy())
    assert collect(tiny_model, tmp_path / "stats", samples=SAMPLES[:2], overwrite=True).attributes["samples"] == 2
    compress(planned(tiny_model, None), str(tmp_path / "store"))
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="holds no statistics"):
            collect(tiny_model, tmp_path / "store", overwrite=overwrite)
    assert problems(tmp_path / "store") == {}


def test_inputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.layers.1.input_layernorm.weight"][3] = np.inf
    model = write_model(tmp_path / "model", tensors, tiny_config())
    with pytest.raises(TensorError, match=r"layers\.1\.self_attn\.q_proj\.weight: its inputs are not finite"):
        collect(model, tmp_path / "stats")


def test_damage_is_noticed(tiny_model: Path, tmp_path: Path, statistics: Statistics) -> None:
    chunk = next((tmp_path / "stats" / "inputs" / DOWN / "hessian").rglob("c/*/*"))
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamagedError, match="hessian cannot be read"):
        statistics.read(DOWN)
    outcome = compress(planned(tiny_model, statistics, compensate=True), str(tmp_path / "store"))
    assert list(outcome.failures) == [DOWN]
    assert outcome.done == 20


def test_statistics_of_another_model_and_missing_ones_are_refused(
    tiny_model: Path, tmp_path: Path, statistics: Statistics
) -> None:
    other = write_model(tmp_path / "other", tiny_tensors(seed=1), {**tiny_config(), "rope_theta": 5000.0})
    with pytest.raises(RecipeError, match=r"statistics of another model \(model .*\); this is other"):
        planned(other, statistics, compensate=True)
    options: dict[str, Any]
    for options in ({"compensate": True}, {"method": "billm"}, {"method": "dbellquant"}):
        with pytest.raises(RecipeError, match="error compensation needs statistics of the inputs"):
            planned(tiny_model, None, **options)
    for options, message in (
        ({"refine": 2}, "--refine is part of error compensation"),
        ({"scale_bits": 8}, "--scale-bits 8 is part"),
        ({"method": "xnor", "planes": 2}, "--planes is part"),
        ({"compensate": True, "block": "matrix"}, "rows and row-blocks, not on a whole matrix"),
        ({"compensate": True, "groups": 3}, "groups 3: with error compensation 1, 2, 4, 8 or 16"),
        ({"compensate": True, "groups": 4, "scale_bits": 8}, "8-bit scales are for one or two groups"),
        ({"compensate": True, "solver": "greedy"}, "remove --solver and --lambda"),
        ({"method": "dbellquant", "planes": 3}, "planes: expected 1 to 2, found 3"),
        ({"method": "xnor", "planes": 5, "compensate": True}, "planes: expected 1 to 4, found 5"),
        ({"method": "dbellquant", "epsilon": 1.5}, r"epsilon: expected 0 to 1, found 1\.5"),
        ({"method": "billm", "scale_bits": 8}, "8-bit scales have no sign"),
        ({"compensate": True, "scale_bits": 4}, "scale-bits: expected one of 8, 16, found 4"),
        ({"compensate": True, "refine": -1}, "refine: expected at least 0, found -1"),
    ):
        with pytest.raises(RecipeError, match=message):
            planned(tiny_model, statistics, **options)


EVERY = [
    {"compensate": True, "refine": 2},
    {"method": "xnor", "compensate": True, "planes": 3, "scale_bits": 8, "block": 64},
    {"method": "billm"},
    {"method": "dbellquant", "planes": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", EVERY)
def test_stores_are_complete_equal_and_run(
    tiny_model: Path,
    tmp_path: Path,
    statistics: Statistics,
    tree: Tree,
    processes: Processes,
    options: dict[str, object],
) -> None:
    plan = planned(tiny_model, statistics, **options)
    assert compress(plan, str(tmp_path / "one")).complete
    two = compress(plan, str(tmp_path / "two"), runner=lambda jobs: run_local(jobs, workers=2, processes=processes))
    assert (two.complete, compress(plan, str(tmp_path / "one")).unchanged) == (True, 21)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert problems(tmp_path / "one") == {}
    store = open_store(str(tmp_path / "one"))
    found = inspect(store)
    for tensor in plan.tensors:
        assert found["tensors"][tensor.source.name]["stored_bytes"] - tensor.expected_bytes <= 4 * 5 + 64
    # Decoded weights, planes times 8-bit activations, and the exported folder are the same model.
    tokens = SAMPLES[0]
    decoders = [load_decoder(store.url, 1, ActivationSettings(bits)).decoder for bits in (16, 8)]
    decoders.append(load_checkpoint(export(store, tmp_path / "exported")))
    exact, packed, exported = (decoder.logits(tokens, decoder.new_cache(32)) for decoder in decoders)
    size = np.abs(exact).max()
    assert np.abs(packed - exact).max() < 0.05 * size
    assert np.abs(exported - exact).max() < 0.05 * size


def test_matrices_may_be_kept_as_they_are(tiny_model: Path, tmp_path: Path, statistics: Statistics) -> None:
    recipe = load_recipe(None, {"compensate": True}, ("*.0.mlp.down_proj.weight",))
    plan = make_plan(open_checkpoint(tiny_model), recipe, statistics=statistics)
    assert compress(plan, str(tmp_path / "store")).complete
    assert problems(tmp_path / "store") == {}


def test_a_transformation_is_folded_into_the_norm(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    uneven = np.exp(np.random.default_rng(0).standard_normal(64)).astype(np.float32)
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        tensors[name] = (tensors[name].astype(np.float32) * uneven).astype(tensors[name].dtype)
    tiny_model = write_model(tmp_path / "model", tensors, tiny_config())
    statistics = collect(tiny_model, tmp_path / "stats")
    plan = planned(tiny_model, statistics, method="dbellquant", planes=1)
    searched: list[int] = []

    def counted(*given: Any) -> Any:
        searched.append(1)
        return channel_scale(*given)

    with pytest.MonkeyPatch.context() as patch:
        counting = replace(dbellquant.METHOD, channel_scale=counted)
        patch.setattr("bincompress.methods.METHODS", [counting])
        compress(plan, str(tmp_path / "store"))
    assert len(searched) == 4  # once for each norm, not for each of its readers
    store = open_store(str(tmp_path / "store"))
    name = "model.layers.0.input_layernorm.weight"
    before = load_checkpoint(tiny_model).layers[0].input_norm
    after = store.read_plain(name)[0].float32().reshape(-1)
    scale = before / after
    assert np.std(np.log(scale)) > 0.01
    assert "q_proj" in store.complete_attributes(name)["report"]["transformation"]
    # Other weights in the same place, with the same inputs from the same place, are searched anew.
    tensors["model.layers.0.self_attn.k_proj.weight"] *= 2
    for folder in ("model", "stats"):
        shutil.rmtree(tmp_path / folder)
    write_model(tiny_model, tensors, tiny_config())
    changed = planned(tiny_model, collect(tiny_model, tmp_path / "stats"), method="dbellquant", planes=1)
    compress(changed, str(tmp_path / "store2"))
    assert np.any(open_store(str(tmp_path / "store2")).read_plain(name)[0].float32().reshape(-1) != after)
    # Where one reader of the norm is kept as it is, nothing may be folded.
    kept = make_plan(
        open_checkpoint(tiny_model), load_recipe(None, {"method": "dbellquant"}, ("*.0.self_attn.k_proj.weight",)),
        statistics=statistics,
    )  # fmt: skip
    folded = {tensor.source.name for tensor in kept.tensors if tensor.shared}
    assert name not in folded
    assert "model.layers.1.input_layernorm.weight" in folded


def test_an_input_scale_reaches_the_engine(tmp_path: Path) -> None:
    tensors = tiny_tensors(inner=128)
    spread_out = np.exp(np.random.default_rng(0).standard_normal(128)).astype(np.float32)
    for layer in range(2):
        down = f"model.layers.{layer}.mlp.down_proj.weight"
        tensors[down] = (tensors[down].astype(np.float32) * spread_out).astype(tensors[down].dtype)
    model = write_model(tmp_path / "model", tensors, tiny_config(inner=128))
    found = collect(model, tmp_path / "stats")
    recipe = load_recipe(None, {"method": "dbellquant", "planes": 1})
    plan = make_plan(open_checkpoint(model), recipe, {DOWN: ((3, 5), (60, 127))}, statistics=found)
    # 64 rows are too few to pay for a scale a column, so the price is lowered: the way to the engine is what is tested.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bincompress.methods.dbellquant._PAYS", 0.01)
        assert compress(plan, str(tmp_path / "store")).complete
    store = open_store(str(tmp_path / "store"))
    assert store.read_packed(DOWN).in_scale is not None
    assert problems(tmp_path / "store") == {}
    decoders = [load_decoder(store.url, 1, ActivationSettings(bits)).decoder for bits in (16, 8)]
    exact, packed = (decoder.logits(SAMPLES[1], decoder.new_cache(32)) for decoder in decoders)
    assert np.abs(packed - exact).max() < 0.05 * np.abs(exact).max()


def trials_of(plan: Plan) -> dict[str, list[Trial]]:
    tensors = {tensor.source.name: tensor for tensor in spreadable(plan)}
    reports = map(run_trials, trial_jobs(plan, tensors.values()))
    return {report.name: trials_with_errors(tensors[report.name], report) for report in reports}


@pytest.mark.parametrize("bits", [1.6, 2.25, 3.0])
def test_bits_are_spread_within_their_target(
    tiny_model: Path, tmp_path: Path, statistics: Statistics, bits: float
) -> None:
    plan = planned(tiny_model, statistics, compensate=True, scale_bits=8)
    trials = trials_of(plan)
    assert trials_of(plan) == trials  # read back
    recipe = spread(plan, trials, bits)
    chosen = make_plan(plan.checkpoint, recipe, statistics=statistics)
    assert compress(chosen, str(tmp_path / "store")).complete
    found = inspect(open_store(str(tmp_path / "store")))["total"]["binary"]
    assert bits - 0.2 < found["stored_bits"] <= bits
    # No single step that still fits lowers the error.
    least = sum(min(trial.error for trial in own) for own in trials.values())
    assert least >= 0
    for other in (1.0, 0.5):
        with pytest.raises(RecipeError, match="these matrices need at least"):
            spread(plan, trials, other)


def test_more_bits_cost_less_error(tiny_model: Path, statistics: Statistics) -> None:
    plan = planned(tiny_model, statistics, compensate=True, scale_bits=8)
    trials = trials_of(plan)

    def error(bits: float) -> float:
        settings = {o.pattern: dict(o.changes) for o in spread(plan, trials, bits).overrides}
        total = 0.0
        for name, own in trials.items():
            planes, block = settings[name].get("planes", 1), settings[name].get("block", 128)
            (trial,) = [
                trial for trial in own if (trial.settings.record()["planes"], trial.settings.block) == (planes, block)
            ]
            total += trial.error * plan.checkpoint.tensors[name].shape[0] * plan.checkpoint.tensors[name].shape[1]
        return total

    errors = [error(bits) for bits in (1.5, 1.8, 2.2, 2.6, 3.2)]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(RecipeError, match="--target-bits needs --compensate and --stats"):
        spreadable(planned(tiny_model, None))


def test_samples_are_spread_over_the_text() -> None:
    demo = open_checkpoint(Path(__file__).parents[1] / "bincompress" / "demo_model")
    text = "The kernel schedules processes on every core. " * 200
    found = choose_samples(demo, text, 3, 64)
    assert found.shape == (3, 64)
    assert (found[0] >= 0).all()
    with pytest.raises(
        BincompressError, match=r"the text has [\d,]+ tokens; 500 samples of 64 need 32,000: .*--samples"
    ):
        choose_samples(demo, text, 500, 64)
    with pytest.raises(BincompressError, match="give a longer text, or a smaller --context"):
        choose_samples(demo, "short", 1, 64)
    for samples, context in ((0, 64), (1, 1), (1, 10**6)):
        with pytest.raises(BincompressError, match="expected at least 1 sample of 2 to"):
            choose_samples(demo, text, samples, context)
    assert parse(demo.config).context >= 64


@pytest.mark.slow
def test_the_command_line(run: Run, letters_model: Path, tmp_path: Path) -> None:
    model = letters_model
    text = tmp_path / "text.txt"
    text.write_text("The scheduler picks the next process to run on this core, and the page cache holds files. " * 40)
    stats, store = tmp_path / "stats", tmp_path / "store"
    code, out, err = run("calibrate", model, stats, "--text", text, "--samples", 4, "--context", 64, "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == 256
    options = ("--stats", stats, "--compensate", "--scale-bits", 8)
    code, out, err = run("compress", model, store, *options, "--target-bits", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["total"]["binary"]["stored_bits"] <= 2
    code, out, err = run("compress", model, store, *options, "--target-bits", 2)
    assert (code, "already complete" in out) == (0, True), err
    code, _, err = run("compress", model, tmp_path / "other", *options, "--target-bits", 0.5)
    assert (code, "these matrices need at least" in err) == (2, True)
    code, out, err = run("compress", model, tmp_path / "dry", *options, "--dry-run")
    assert (code, "core-hours" in out) == (0, True), err
    for arguments, message in (
        (("calibrate", model, stats, "--text", tmp_path / "none"), "not readable as UTF-8 text"),
        (
            ("calibrate", model, stats, "--text", text, "--samples", 10**6, "--context", 64),
            "give a longer text, or --samples",
        ),
        (("calibrate", model, stats, "--text", text, "--address", "auto"), "--address is for --runner ray"),
        (
            ("calibrate", model, stats, "--text", text, "--runner", "ray", "--threads", 2),
            "--threads is for --runner local",
        ),
        (("compress", model, tmp_path / "x", "--stats", tmp_path / "none", "--compensate"), "no statistics there"),
        (("compress", model, tmp_path / "x", "--stats", store, "--compensate"), "holds no statistics"),
        (("compress", model, tmp_path / "x", "--compensate"), "needs statistics of the inputs"),
    ):
        code, _, err = run(*arguments)
        assert (code, message in err) == (2, True), err
