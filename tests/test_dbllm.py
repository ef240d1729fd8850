"""DB-LLM's two {0, 1} planes: the paper's formulas written out, the format without loss, and what the report says."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bincompress.compression.recipe import load_recipe
from bincompress.methods import Binarized, dbllm, make_settings
from bincompress.methods.rounding.coefficients import from_float16
from bincompress.store.store import open_store
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.dual_planes import TRIALS, dual_planes, rounding_steps
from cpu_kernels.reference import planes as reference
from tests.conftest import Run, as_weight

NAME = "model.layers.1.mlp.down_proj.weight"


def ones(found: Binarized, cols: int) -> np.ndarray:
    """The {0, 1} planes, (2, rows, cols)."""
    bits = np.unpackbits(found.tensor.planes.view(np.uint8), axis=2, count=cols, bitorder="little")
    return bits.reshape(2, -1, cols)


def scales(found: Binarized, cols: int) -> np.ndarray:
    """a1 and a2 of every weight, float32 (2, rows, cols)."""
    return np.repeat(from_float16(found.tensor.numbers, found.tensor.exponent), found.tensor.block, axis=2)[:, :, :cols]


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    rows, cols = draw(st.integers(1, 4)), draw(st.sampled_from([1, 63, 64, 65, 130]))
    values = draw(npst.arrays(np.float32, (rows, cols), elements=st.floats(-2, 2, width=32)))
    return as_weight(values, draw(st.sampled_from(["BF16", "F16", "F32"])))


@given(weights(), st.sampled_from([64, "row"]))
def test_planes_are_those_of_the_formulas(weight: Weight, block: int | str) -> None:
    found = dbllm.binarize(weight, make_settings("dbllm", block=block))  # type: ignore[arg-type]
    cols = weight.shape[1]
    w, (a1, a2) = weight.float32(), scales(found, cols)
    b1 = (w - (a1 + a2) / 2 > 0).astype(np.float32)
    b2 = (-(w - a1 * b1 - a2 / 2) > 0).astype(np.float32)
    assert np.array_equal(ones(found, cols), np.stack([b1, b2]))
    error = np.sum((w.astype(np.float64) - a1 * b1 - a2 * b2) ** 2)
    assert found.squared_error == pytest.approx(float(error), rel=1e-5, abs=1e-9)
    assert np.all(a1 >= 0)
    assert np.all(a2 <= 0)


def coded(w: np.ndarray, a1: float, a2: float) -> list[int]:
    """b1 + 2 * b2 of a row of weights."""
    codes = np.empty((1, w.size), np.uint8)
    scales = [np.full((1, 1), scale, np.float32) for scale in (a1, a2)]
    dual_planes(np.ascontiguousarray(w[None], np.float32), w.size, *scales, codes)
    return [int(code) for code in codes[0]]


@pytest.mark.parametrize(
    ("a1", "a2", "ascending"),
    [
        (2.0, -1.0, (2, 0, 3, 1)),  # the paper's start: -1, 0, 1, 2
        (1.0, -2.0, (2, 3, 0, 1)),  # the sum is negative: -2, -1, 0, 1
        (-1.0, 2.0, (1, 0, 3, 2)),  # training has swapped the signs
        (-2.0, 1.0, (1, 3, 0, 2)),
        (1.0, 3.0, (0, 1, 2, 3)),  # both of one sign
        (-1.0, -3.0, (3, 2, 1, 0)),
    ],
)
def test_levels_of_any_signs_are_met_and_ties_take_fewer_ones(a1: float, a2: float, ascending: tuple[int, ...]) -> None:
    levels = np.array([a1 * (code & 1) + a2 * (code >> 1) for code in ascending])
    assert coded(levels, a1, a2) == list(ascending)
    between = (levels[1:] + levels[:-1]) / 2
    assert coded(between - 1 / 64, a1, a2) == list(ascending[:-1])
    assert coded(between + 1 / 64, a1, a2) == list(ascending[1:])
    # Of two as near: fewer ones, and of a1 and a2 the lesser magnitude.
    rank = {0: (0, 0.0), 1: (1, abs(a1)), 2: (1, abs(a2)), 3: (2, 0.0)}
    assert coded(between, a1, a2) == [min(p, key=rank.__getitem__) for p in itertools.pairwise(ascending)]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 63, 64, 65, 130]), st.sampled_from([64, 256]))
def test_every_weight_gets_the_nearest_level_for_scales_of_any_sign(seed: int, cols: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((3, cols)).astype(np.float32)
    # Of 11 bits and one order, as the store has them, so that sums and differences are exact in float32.
    scales = (rng.choice([-1, 1], (2, 3, -(-cols // block))) * rng.integers(1, 2048, (2, 3, -(-cols // block)))) / 512
    a1, a2 = scales.astype(np.float32)
    codes = np.empty(w.shape, np.uint8)
    error = dual_planes(w, block, a1, a2, codes)
    assert np.array_equal(codes, reference.dual_planes(w, block, a1, a2))
    units = np.arange(cols) // block
    of_code = np.stack([a1[:, units] * (code & 1) + a2[:, units] * (code >> 1) for code in range(4)]).astype(np.float64)
    distance = np.abs(w - of_code)
    chosen = np.take_along_axis(distance, codes[None].astype(np.intp), 0)[0]
    assert np.array_equal(chosen, distance.min(0))
    assert error == pytest.approx(float(np.sum(chosen**2)), rel=1e-6)
    ones = np.bitwise_count(np.arange(4))[:, None, None]
    assert not np.any((distance == chosen) & (ones < np.bitwise_count(codes)))


def test_planes_are_chosen_anew_where_training_made_the_sum_negative() -> None:
    w = np.linspace(-2, 2, 130, dtype=np.float32)[None].repeat(2, 0)
    scales = np.array([[[0.75] * 3, [1.5] * 3], [[-1.5] * 3, [-0.75] * 3]], np.float32)  # the sum: -0.75, 0.75
    bits = np.unpackbits(
        dbllm.choose_planes(as_weight(w, "F32"), scales, 64).view(np.uint8), axis=2, count=130, bitorder="little"
    )
    found = scales[0, :, :1] * bits[0] + scales[1, :, :1] * bits[1]
    for row, levels in enumerate(([-1.5, -0.75, 0, 0.75], [-0.75, 0, 0.75, 1.5])):
        nearest = np.abs(w[row] - np.array(levels)[:, None]).min(0)
        assert np.array_equal(np.abs(w[row] - found[row]), nearest)


def test_the_start_is_rounding_to_two_bits() -> None:
    w = np.random.default_rng(0).standard_normal((3, 192)).astype(np.float32)
    steps = np.empty((3, 3), np.float32)
    rounding_steps(w, 64, steps)
    for row in range(3):
        for unit in range(3):
            block = w[row, 64 * unit : 64 * (unit + 1)].astype(np.float64)
            fits = []
            for trial in range(1, TRIALS + 1):
                levels = np.clip(np.rint(block / (np.abs(block).max() * trial / TRIALS)), -1, 2)
                step = levels @ block / (levels @ levels)
                fits.append((np.sum((block - step * levels) ** 2), step))
            assert steps[row, unit] == pytest.approx(min(fits)[1], rel=1e-5)
    found = dbllm.binarize(as_weight(w, "F32"), make_settings("dbllm", block=64))
    a1, a2 = from_float16(found.tensor.numbers, found.tensor.exponent)
    assert np.array_equal(a1, -2 * a2)


def test_only_two_scales_are_stored_and_the_formula_gives_the_levels(
    run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    assert run("compress", tiny_model, tmp_path / "store", "--method", "dbllm")[0] == 0
    assert run("verify", tmp_path / "store")[0] == 0
    store = open_store(str(tmp_path / "store"))
    attributes, arrays = store.complete_attributes(NAME), dict(store.stored_arrays(NAME))
    assert attributes["settings"] == {"method": "dbllm", "block": 64}
    assert attributes["terms"] == [0, 1, 2]
    assert attributes["mix"] == [[0.5, 0.5], [0.5, 0.0], [0.0, 0.5]]
    assert arrays["coef"].shape == (2, 64, 3)
    found = Binarized(store.read_packed(NAME), 0, 0, 0, 0)
    b1, b2 = ones(found, 160)
    a1, a2 = scales(found, 160)
    from bincompress.tensors.dequantize import dequantize

    assert np.allclose(dequantize(store.read_packed(NAME)), a1 * b1 + a2 * b2, rtol=0, atol=1e-7)


def test_the_report_tells_zeros_and_saved_additions(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    run("compress", tiny_model, tmp_path / "store", "--method", "dbllm")
    store = open_store(str(tmp_path / "store"))
    report, planes = store.complete_attributes(NAME)["report"], dict(store.stored_arrays(NAME))["planes"]
    bits = np.unpackbits(planes.view(np.uint8), axis=2, count=160, bitorder="little")
    zeros = [float(np.mean(plane == 0)) for plane in bits]
    assert report["plane_zeros"] == pytest.approx(zeros, rel=1e-5)
    assert report["additions_saved"] == pytest.approx(np.mean(zeros), rel=1e-5)
    assert np.mean(zeros) > 0.5
    total = json.loads(run("inspect", tmp_path / "store", "--json")[1])["total"]
    assert 0.5 < total["additions_saved"] < 0.7
    assert "hardware that skips zeros would save" in run("inspect", tmp_path / "store")[1]


def test_a_matrix_of_zeros_has_empty_planes() -> None:
    found = dbllm.binarize(as_weight(np.zeros((2, 70)), "BF16"), make_settings("dbllm", block=64))
    assert not found.tensor.planes.any()
    assert found.squared_error == 0


def test_block_64_unless_given() -> None:
    assert load_recipe(None, {"method": "dbllm"}).settings_for("w").block == 64
    assert load_recipe(None, {"method": "dbllm", "block": "row"}).settings_for("w").block == "row"
    assert "per row or row-block, found block matrix" in make_settings("dbllm", block="matrix").problem((4, 64))
