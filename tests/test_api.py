"""The Python API: what the command line does is one call each, with typed results and progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import bincompress
from bincompress import api
from bincompress.compression.options import MethodSettings
from bincompress.compression.placement import Placement
from bincompress.compression.progress import Progress
from bincompress.errors import BincompressError, RecipeError, StoreError
from bincompress.methods import embeddings
from bincompress.methods import options as method_options
from tests.conftest import DEMO_MODEL

TEXT = "The scheduler picks the next task that is ready to run, and the kernel switches to it. " * 40


def test_names_are_imported_when_asked_for() -> None:
    for name in bincompress.__all__:
        assert getattr(bincompress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        bincompress.compres  # noqa: B018


def test_compress_tells_its_progress_and_returns_what_came_of_it(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = bincompress.compress(tiny_model, tmp_path / "store", groups=4, block=64, progress=seen.append)
    assert (result.done, result.unchanged, result.failures, result.complete) == (21, 0, {}, True)
    assert result.total["binary"]["stored_bits"] == pytest.approx(4.1834, abs=1e-3)
    assert [s.done for s in seen] == list(range(22))
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert {s.report.name for s in seen if s.report} == set(result.tensors)
    again = bincompress.compress(tiny_model, tmp_path / "store", groups=4, block=64, placement=Placement(workers=2))
    assert (again.done, again.unchanged) == (0, 21)
    assert bincompress.verify(tmp_path / "store").ok
    assert bincompress.inspect(tmp_path / "store")["tensors"] == result.tensors
    assert (bincompress.export(tmp_path / "store", tmp_path / "folder") / "config.json").is_file()


def test_a_plan_is_made_from_headers_alone(tiny_model: Path) -> None:
    planned = bincompress.plan(tiny_model, method="xnor", block="row", keep=["*.mlp.*"])
    assert {t.settings.method for t in planned.plan.tensors} == {"xnor", "keep"}
    assert planned.plan.source_bytes > 4 * planned.plan.peak_memory / 1e9


@pytest.mark.parametrize("name", ["gruops", "headers_only"])
def test_an_unknown_name_is_refused_alike_wherever_it_is_given(tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {name: 2}
    nowhere = tmp_path / "nowhere"
    calls: dict[str, Callable[[], object]] = {
        "compress": lambda: api.compress(nowhere, tmp_path / "store", **given),
        "compress_several": lambda: api.compress_several(nowhere, {}, **given),
        "plan": lambda: api.plan(nowhere, **given),
        "plan_several": lambda: api.plan_several(nowhere, {}, **given),
        "fit": lambda: api.fit(nowhere, 1, **given),
    }
    if name == "headers_only":  # of these it is a parameter
        calls = {call: calls[call] for call in ("compress", "compress_several")}
    told = set()
    for call in calls.values():
        with pytest.raises(
            RecipeError, match=f"^options: unknown key '{name}'; known: .*groups.*keep.*target_bits"
        ) as no:
            call()
        told.add(str(no.value))
    assert len(told) == 1


def test_settings_are_typed_as_methods_declare_them() -> None:
    typed = get_type_hints(MethodSettings)
    assert set(typed) <= {"method", "embeddings", *method_options()}
    for name, owners in method_options().items():
        own = {choice for _, option in owners for choice in option.choices}
        kinds = {option.kind for _, option in owners if not option.choices}
        if name in typed:  # a contributor's setting need not be
            assert set(get_args(typed[name])) == own
            assert not kinds or typed[name] in kinds
    assert set(get_args(typed["embeddings"])) <= set(embeddings())


def test_batch_returns_a_result_for_each_store(tiny_model: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "models.toml"
    stores = [str(tmp_path / name) for name in ("one", "two")]
    manifest.write_text("".join(f'[[model]]\nsource = "{tiny_model}"\nstore = "{store}"\n' for store in stores))
    results = bincompress.batch(manifest)
    assert list(results) == stores
    assert all(result.complete and result.done == 21 for result in results.values())


def test_parameters_that_contradict_each_other_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for parameters, message in (
        ({"samples": 4}, "--samples is for --sequential TEXT"),
        ({"placement": Placement(address="auto")}, "--address is for --runner ray"),
        ({"placement": Placement(runner="ray", workers=2)}, "--workers is for --runner local"),
        ({"target_bits": 2.25}, "--compensate and --stats"),
    ):
        with pytest.raises(BincompressError, match=message):
            bincompress.compress(tiny_model, store, **parameters)
    with pytest.raises(StoreError, match="no such store"):
        bincompress.verify(tmp_path / "nothing")


def test_calibrate_compress_and_evaluate_a_model_with_a_tokenizer(tmp_path: Path) -> None:
    text, stats, store = tmp_path / "text.txt", str(tmp_path / "stats"), tmp_path / "store"
    text.write_text(TEXT)
    counted: list[tuple[int, int]] = []
    collected = bincompress.calibrate(
        DEMO_MODEL, stats, text, samples=4, context=64, threads=1, progress=lambda *seen: counted.append(seen)
    )
    assert (collected.tokens, len(collected.inputs)) == (256, 28)
    assert counted[-1][0] == counted[-1][1]
    result = bincompress.compress(
        DEMO_MODEL, store, stats=stats, compensate=True, keep=["*.mlp.*", "*.self_attn.o_proj*"]
    )
    assert result.complete
    found = bincompress.evaluate(store, text, context=32, windows=4, baseline=DEMO_MODEL, threads=1)
    assert found.baseline_perplexity is not None
    assert found.baseline_perplexity < found.perplexity < 3 * found.baseline_perplexity
    assert bincompress.evaluate(DEMO_MODEL, text, context=32, windows=4, threads=1).perplexity == pytest.approx(
        found.baseline_perplexity
    )
