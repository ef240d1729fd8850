"""Do planes have the bytes that the README promises, and do kernels do what their NumPy twins say?"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bincompress.methods import Binarized, Settings, make_settings, method_named
from bincompress.methods.rounding.coefficients import from_float16, to_float16, unwalsh, walsh
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.quantize.counting import MAGNITUDES, count_magnitudes, find_zeros, greatest_magnitude
from cpu_kernels.quantize.packing import pack_by_table, pack_codes, pack_signs, pack_two, words_for
from cpu_kernels.quantize.uniform_levels import block_ranges, nearest_levels
from cpu_kernels.quantize.unpacking import expand, look_up_levels, widen
from cpu_kernels.reference import planes as reference
from tests.conftest import EVERY_METHOD, as_weight

shapes = st.tuples(st.integers(1, 5), st.sampled_from([1, 7, 63, 64, 65, 100, 127, 128, 129, 200, 257]))


def coefficients(found: Binarized) -> np.ndarray:
    coef = np.ldexp(found.tensor.numbers.astype(np.float32), found.tensor.exponent)
    return coef if found.tensor.mix is None else np.einsum("ti,irb->trb", np.array(found.tensor.mix, np.float32), coef)


def test_bit_i_of_word_j_is_column_64_j_plus_i() -> None:
    values = -np.ones((1, 70))
    values[0, [0, 3, 63, 64, 69]] = 1
    plane = np.empty((1, 2), np.uint64)
    pack_signs(as_weight(values, "BF16").flat, 70, plane)
    assert plane.tolist() == [[1 | 1 << 3 | 1 << 63, 1 | 1 << 5]]
    assert plane.astype("<u8").tobytes().hex() == "0900000000000080" + "2100000000000000"


def test_a_golden_row_of_two_planes() -> None:
    """Literal bytes: a change of them is a change of the format."""
    values = np.array([[0.5, -0.5, 2.0, -2.0, 0.5, 2.0]])
    found = method_named("wgm").binarize(as_weight(values, "BF16"), make_settings("wgm", block=64))
    assert found.tensor.planes.tolist() == [[[0b110101]], [[0b100110]]]
    assert found.tensor.numbers.view(np.uint16).reshape(-1).tolist() == [0x3D00, 0x3A00]
    assert (found.tensor.exponent, found.tensor.terms, found.tensor.block) == (0, (1, 2), 64)


@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from(["BF16", "F16", "F32"]))
def test_sign_planes_equal_their_twin_and_padding_bits_are_zero(shape: tuple[int, int], seed: int, dtype: str) -> None:
    weight = as_weight(np.random.default_rng(seed).standard_normal(shape), dtype)
    plane = np.empty((shape[0], words_for(shape[1])), np.uint64)
    pack_signs(weight.flat, shape[1], plane)
    np.testing.assert_array_equal(plane, reference.pack_bits(weight.float32() >= 0))


@given(shapes, st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_code_planes_equal_their_twin(shape: tuple[int, int], seed: int, depth: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << depth, shape).astype(np.uint8)
    planes = np.empty((depth, shape[0], words_for(shape[1])), np.uint64)
    pack_codes(codes.reshape(-1), shape[1], planes)
    expected = np.stack([reference.pack_bits((codes >> p & 1).astype(bool)) for p in range(depth)])
    np.testing.assert_array_equal(planes, expected)
    bits = np.random.default_rng(seed).integers(0, 1 << 16, shape).astype(np.uint16)
    table = np.random.default_rng(seed).integers(0, 1 << depth, MAGNITUDES).astype(np.uint8)
    pack_by_table(bits.reshape(-1), shape[1], table, planes)
    looked_up = table[bits & 0x7FFF]
    expected = np.stack([reference.pack_bits((looked_up >> p & 1).astype(bool)) for p in range(depth)])
    np.testing.assert_array_equal(planes, expected)


@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from(["BF16", "F32"]))
def test_two_planes_equal_their_twin(shape: tuple[int, int], seed: int, dtype: str) -> None:
    weight = as_weight(np.random.default_rng(seed).standard_normal(shape), dtype)
    blocks = -(-shape[1] // 64)
    limits = as_weight(np.full((shape[0], blocks), 0.7), dtype).bits
    planes = np.empty((2, shape[0], words_for(shape[1])), np.uint64)
    pack_two(weight.flat, shape[1], 64, limits, planes)
    values = weight.float32()
    large = np.abs(values) > as_weight([[0.7]], dtype).float32()
    np.testing.assert_array_equal(planes[0], reference.pack_bits(values >= 0))
    np.testing.assert_array_equal(planes[1], reference.pack_bits((values >= 0) == large))


def test_a_block_that_is_no_multiple_of_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        pack_two(np.zeros(100, np.uint16), 100, 50, np.zeros((1, 2), np.uint16), np.zeros((2, 1, 2), np.uint64))


@given(st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_counts_zeros_and_greatest_magnitude(size: int, seed: int) -> None:
    bits = np.random.default_rng(seed).choice(np.array([0, 0x8000, 1, 0x8001, 0x7FFF, 0x3F80], np.uint16), size)
    counts = np.zeros((4, MAGNITUDES), np.uint32)
    count_magnitudes(bits, counts)
    np.testing.assert_array_equal(counts[0], np.bincount(bits & 0x7FFF, minlength=MAGNITUDES))
    zeros = np.flatnonzero(bits & 0x7FFF == 0)
    places = np.full(zeros.size, 99, np.uint64)
    assert find_zeros(bits, places) == zeros.size
    np.testing.assert_array_equal(places, zeros)
    assert greatest_magnitude(bits) == (int((bits & 0x7FFF).max()) if size else 0)


@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from([64, 128, 1000]), st.integers(1, 4))
def test_expanding_equals_the_formula(shape: tuple[int, int], seed: int, block: int, depth: int) -> None:
    random = np.random.default_rng(seed)
    rows, cols = shape
    planes = np.stack([reference.pack_bits(random.random(shape) < 0.5) for _ in range(depth)])
    terms = sorted(set(random.integers(0, 1 << depth, 5).tolist()))
    coef = random.standard_normal((len(terms), rows, -(-cols // block))).astype(np.float32)
    weights = np.empty(shape, np.float32)
    expand(planes, coef, np.array(terms, np.uint64), block, weights)
    np.testing.assert_array_equal(weights, reference.expand(planes, coef, terms, block, cols))


@given(shapes, st.integers(0, 2**32 - 1), st.integers(1, 16))
def test_levels_are_looked_up_as_their_twin_does(shape: tuple[int, int], seed: int, depth: int) -> None:
    random = np.random.default_rng(seed)
    planes = np.stack([reference.pack_bits(random.random(shape) < 0.5) for _ in range(depth)])
    levels = random.standard_normal(1 << depth).astype(np.float32)
    weights = np.empty(shape, np.float32)
    look_up_levels(planes, levels, weights)
    np.testing.assert_array_equal(weights, reference.look_up_levels(planes, levels, shape[1]))


@given(shapes, st.integers(0, 2**32 - 1))
def test_many_terms_of_a_whole_matrix_are_looked_up_as_the_formula_adds_them(shape: tuple[int, int], seed: int) -> None:
    random = np.random.default_rng(seed)
    planes = np.stack([reference.pack_bits(random.random(shape) < 0.5) for _ in range(9)])
    terms = tuple(int(term) for term in random.permutation(512)[:300])
    numbers = random.standard_normal((300, 1, 1)).astype(np.float32)
    packed = PackedTensor(planes, numbers, terms, shape[1], shape)
    assert packed.levels is not None
    expected = reference.expand(planes, numbers, terms, shape[1], shape[1])
    np.testing.assert_allclose(dequantize(packed), expected, atol=1e-4)
    np.testing.assert_array_equal(dequantize(packed, slice(1, 3)), dequantize(packed)[1:3])
    assert replace(packed, terms=terms[:256], numbers=numbers[:256]).levels is None  # as before there were so many
    by_row = replace(packed, numbers=np.broadcast_to(numbers, (300, shape[0], 1)))
    assert shape[0] == 1 or by_row.levels is None


@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]))
def test_uniform_levels_are_the_nearest(shape: tuple[int, int], seed: int, bits: int) -> None:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    blocks = -(-shape[1] // 64)
    ranges = np.empty((2, shape[0], blocks), np.float32)
    block_ranges(values, 64, ranges)
    for unit in range(blocks):
        part = values[:, 64 * unit : 64 * unit + 64]
        np.testing.assert_array_equal(ranges[:, :, unit], [part.min(1), part.max(1)])
    top = np.float32((1 << bits) - 1)
    coef = np.stack([(ranges[1] - ranges[0]) / (2 * top), (ranges[1] + ranges[0]) / 2]).astype(np.float32)
    codes = np.empty(shape, np.uint8)
    error = nearest_levels(values, 64, top, coef, codes)
    scale, offset = (np.repeat(c, 64, axis=1)[:, : shape[1]] for c in coef)
    stored = offset + scale * (2 * codes.astype(np.float32) - top)
    assert np.all(np.abs(values - stored) <= scale * np.float32(1.0001) + 1e-6)
    assert error == pytest.approx(float(np.sum((values - stored).astype(np.float64) ** 2)), rel=1e-4, abs=1e-9)


@given(st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_walsh_coefficients_give_the_levels_back(depth: int, seed: int) -> None:
    levels = np.random.default_rng(seed).standard_normal((1 << depth, 2, 3))
    coef = walsh(levels)
    np.testing.assert_allclose(unwalsh(coef), levels, atol=1e-12)
    for code in range(1 << depth):
        signs = [np.prod([1 if code >> p & 1 else -1 for p in range(depth) if s >> p & 1]) for s in range(1 << depth)]
        np.testing.assert_allclose(np.tensordot(signs, coef, 1), levels[code], atol=1e-12)


@pytest.mark.parametrize("scale", [1e-38, 1e-9, 1.0, 3e4, 1e30])
def test_float16_coefficients_hold_any_scale(scale: float) -> None:
    coef = scale * np.array([1.0, 0.1, -0.01])
    stored, exponent = to_float16(coef)
    np.testing.assert_allclose(from_float16(stored, exponent), coef, rtol=2**-10)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("settings", EVERY_METHOD, ids=lambda s: "-".join(map(str, s.record().values())))
@pytest.mark.parametrize("shape", [(5, 200), (33, 64), (3, 1), (1, 129)])
def test_every_method_says_its_true_error(settings: Settings, dtype: str, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(5).standard_normal(shape) * 0.02
    values[0, : shape[1] // 50] = 0.0
    weight = as_weight(values, dtype)
    found = method_named(settings.method).binarize(weight, settings)
    coef = coefficients(found)
    stored = reference.expand(found.tensor.planes, coef, found.tensor.terms, found.tensor.block, shape[1])
    stored.reshape(-1)[found.tensor.listed_index.astype(np.int64)] = found.tensor.listed_value
    exact = weight.float32().astype(np.float64)
    assert found.squared_norm == pytest.approx(float(np.sum(exact**2)), rel=1e-9)
    assert found.squared_error == pytest.approx(
        float(np.sum((exact - stored) ** 2)), rel=1e-3, abs=1e-6 * found.squared_norm
    )
    if shape[1] % 64:
        assert not np.any(found.tensor.planes[:, :, -1] >> np.uint64(shape[1] % 64))
    expanded = np.empty(shape, np.float32)
    expand(found.tensor.planes, coef, np.array(found.tensor.terms, np.uint64), found.tensor.block, expanded)
    expanded.reshape(-1)[found.tensor.listed_index.astype(np.int64)] = found.tensor.listed_value
    np.testing.assert_array_equal(expanded, stored)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, 8])
def test_zeros_stay_zero_in_a_whole_matrix(groups: int) -> None:
    values = np.random.default_rng(0).standard_normal((40, 70))
    values[:, ::5] = 0.0
    for part in (values, np.where(np.arange(70) == 3, 0.0, values + 10)):
        found = method_named("wgm").binarize(
            as_weight(part, "BF16"), make_settings("wgm", groups=groups, block="matrix")
        )
        stored = reference.expand(found.tensor.planes, coefficients(found), found.tensor.terms, found.tensor.block, 70)
        stored.reshape(-1)[found.tensor.listed_index.astype(np.int64)] = found.tensor.listed_value
        zero = as_weight(part, "BF16").float32() == 0
        assert np.all(np.abs(stored[zero]) < 1e-6)
        assert found.notes["zeros"] == np.count_nonzero(zero)


def test_a_matrix_of_zeros_packs_to_zeros() -> None:
    for settings in EVERY_METHOD:
        found = method_named(settings.method).binarize(as_weight(np.zeros((3, 70)), "BF16"), settings)
        assert found.squared_error == found.squared_norm == 0.0
        assert not np.any(found.tensor.numbers)


def test_the_papers_own_figure_is_nominal_and_leaves_the_groups_out() -> None:
    weight = as_weight(np.random.default_rng(0).standard_normal((64, 256)), "BF16")
    found = method_named("wgm").binarize(weight, make_settings("wgm", groups=32, block="matrix"))
    assert found.nominal_bits == 1 + 16 * 32 / (64 * 256)
    assert found.tensor.planes.nbytes * 8 / weight.bits.size == 6


def test_float16_numbers_are_widened_and_scaled_as_numpy_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for exponent in (-500, -140, -130, -3, 0, 10, 115, 130, 500):
        found = np.empty(every.size, np.float32)
        widen(every.view(np.int16), 2.0**exponent, found)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            expected = np.ldexp(every.astype(np.float32), exponent)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found[expected == 0]), np.signbit(expected[expected == 0]))
