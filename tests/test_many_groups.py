"""Thousands of groups in one matrix, as the grouping paper's nominal bits need: packed, told apart, and run."""

import json
from pathlib import Path

import numpy as np
import pytest

from bincompress.methods import make_settings, method_named
from bincompress.store.store import open_store
from bincompress.tensors.dequantize import dequantize
from tests.conftest import Run, as_weight

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    ("solver", "groups"), [("exact", 257), ("exact", 1000), ("windowed", 700), ("greedy", 2500), ("greedy", 32768)]
)
def test_every_weight_is_the_mean_of_its_group(dtype: str, solver: str, groups: int) -> None:
    random = np.random.default_rng(groups)
    weight = as_weight(random.standard_normal((90, 130)), dtype)
    values = {"window": 3} if solver == "windowed" else {}
    found = method_named("wgm").binarize(
        weight, make_settings("wgm", groups=groups, block="matrix", solver=solver, **values)  # type: ignore[arg-type]
    )  # fmt: skip
    exact, stored = weight.float32(), dequantize(found.tensor)
    assert len(found.tensor.planes) == 1 + (found.groups - 1).bit_length()
    assert np.array_equal(np.sign(exact), np.sign(stored))
    error = float(np.sum((exact.astype(np.float64) - stored) ** 2))
    assert found.squared_error == pytest.approx(error, rel=1e-3, abs=1e-12 * found.squared_norm)
    # A group is a run of the sorted magnitudes: what it holds, the planes tell.
    order = np.argsort(np.abs(exact), axis=None, kind="stable")
    levels = np.abs(stored).reshape(-1)[order]
    assert np.all(np.diff(levels) >= -1e-6)
    distinct = np.unique(np.abs(exact)).size
    assert found.groups == min(groups, distinct if solver == "exact" else weight.bits.size)
    if found.groups >= distinct:
        np.testing.assert_allclose(stored, exact, atol=1e-6)
    assert found.nominal_bits == 1 + 16 * found.groups / weight.bits.size


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("groups", [256, 512, 600])
def test_zeros_have_a_level_beyond_the_last_group(dtype: str, groups: int) -> None:
    """256 groups and zeros are 257 levels: one more than a byte tells apart."""
    values = np.random.default_rng(1).standard_normal((90, 130))
    values[::2, ::2] = 0.0
    weight = as_weight(values, dtype)
    found = method_named("wgm").binarize(weight, make_settings("wgm", groups=groups, block="matrix", solver="greedy"))
    assert found.notes["zeros_as"] == "a level of their own"
    stored = dequantize(found.tensor)
    assert np.all(np.abs(stored[::2, ::2]) < 1e-6)
    error = float(np.sum((weight.float32().astype(np.float64) - stored) ** 2))
    assert found.squared_error == pytest.approx(error, rel=1e-3)


def test_zeros_are_listed_where_every_level_that_planes_can_spell_is_taken() -> None:
    values = np.random.default_rng(2).standard_normal((600, 64))
    values[:60] = 0.0
    found = method_named("wgm").binarize(
        as_weight(values, "F32"), make_settings("wgm", groups=32768, block="matrix", solver="greedy")
    )
    assert found.groups == 32768
    assert len(found.tensor.planes) == 16
    assert found.notes["zeros_as"] == "a list of places"
    assert not np.any(dequantize(found.tensor)[:60])


def test_a_store_of_many_groups_is_told_to_be_slow_and_runs(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    asked = ("--method", "wgm", "--groups", "300", "--block", "matrix")
    line = "no kernel multiplies; the engine decodes their weights for every product"
    code, planned, _ = run("compress", tiny_model, tmp_path / "store", *asked, "--dry-run", "--rate", "1MB")
    assert code == 0
    assert line in planned
    code, text, _ = run("compress", tiny_model, tmp_path / "store", *asked)
    assert code == 0
    assert line in text
    assert "up to 512" in text
    assert run("verify", tmp_path / "store")[0] == 0
    store = open_store(str(tmp_path / "store"))
    packed, report = store.read_packed(NAME), store.complete_attributes(NAME)["report"]
    assert report["groups"] == 300
    # The list of terms is needed to read a weight back, and is as large as the coefficients.
    arrays = sum(array.nbytes + 4 for _, array in store.stored_arrays(NAME))
    assert report["stored_bytes"] == arrays + len(json.dumps(list(packed.terms)))
    text_file = tmp_path / "text.txt"
    text_file.write_text("the quick brown fox jumps over the lazy dog " * 8)
    evaluate = ("--text", text_file, "--context", "16", "--windows", "2", "--baseline", tiny_model)
    code, told, error = run("evaluate", tmp_path / "store", *evaluate)
    assert code == 0, error
    assert "ratio 1.00" in told


def test_few_terms_are_not_told_to_be_slow(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    assert "slow to run" not in run("compress", tiny_model, tmp_path / "store", "--groups", "8", "--block", "64")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--groups", "300"), "groups 300: more than 256 are for a whole matrix; add --block matrix"),
        (("--groups", "32769", "--block", "matrix"), "groups: expected 1 to 32768, found 32769"),
    ],
)
def test_what_planes_cannot_spell_is_refused(
    run: Run, tiny_model: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, error = run("compress", tiny_model, tmp_path / "store", *options)
    assert code == 2
    assert message in error
    assert not (tmp_path / "store").exists()
