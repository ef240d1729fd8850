"""Are float32 magnitudes counted, found and told apart as NumPy does it?"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.quantize.narrowing import PARTS_SHIFT, codes_by_limits, count_cells, split_first, sum_of_squares
from tests.conftest import as_weight

_MAGNITUDE = np.uint32(0x7FFFFFFF)


def patterns(seed: int, size: int) -> NDArray[np.uint32]:
    random = np.random.default_rng(seed)
    values = random.standard_normal(size) * 10.0 ** random.integers(-30, 30, size)
    return as_weight(np.where(random.random(size) < 0.1, 0.0, values)[None], "F32").flat


@given(st.integers(0, 2**32 - 1), st.integers(0, 300), st.sampled_from([13, 15]))
def test_cells_hold_the_number_and_the_places_of_their_magnitudes(seed: int, size: int, shift: int) -> None:
    bits = patterns(seed, size)
    scratch, cells, sums = np.zeros(1 << 31 - shift, np.uint64), np.empty(size, np.int32), np.empty((2, size))
    found = count_cells(bits, np.uint32(shift), scratch, cells, sums)
    keys = bits & _MAGNITUDE
    expected, inverse, counts = np.unique(keys >> np.uint32(shift), return_inverse=True, return_counts=True)
    places = np.zeros(expected.size)
    np.add.at(places, inverse, (keys & np.uint32((1 << shift) - 1)).astype(np.float64))
    np.testing.assert_array_equal(cells[:found], expected)
    np.testing.assert_array_equal(sums[:, :found], [counts, places])
    assert not scratch.any()


@given(st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_the_sum_of_squares_is_that_of_float64(seed: int, size: int) -> None:
    values = np.clip(patterns(seed, size).view(np.float32), -1e15, 1e15).astype(np.float32)
    assert sum_of_squares(values) == pytest.approx(float(np.sum(values.astype(np.float64) ** 2)), rel=1e-12)


@pytest.mark.parametrize("by_ranges", [True, False])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_magnitudes_of_cells_that_are_split_are_found_by_ranges_and_by_lookup(size: int, by_ranges: bool) -> None:
    bits = as_weight(np.random.default_rng(size).standard_normal((1, size)), "F32").flat.copy()
    bits[::7] = 0
    one = int(np.float32(1.0).view(np.uint32)) >> 15
    split = np.array([0, *range(one - 200, one - 100), one + 3])
    slots = np.full(1 << 16, -1, np.int32)
    slots[split] = np.arange(split.size)
    edges = np.array([[0, 1 << 15], [one - 200 << 15, one - 100 << 15], [one + 3 << 15, one + 4 << 15]]) - 1
    edges[0, 0] = 0  # zeros are left out
    low, high = np.ascontiguousarray(edges.T[:, : 3 if by_ranges else 0]).astype(np.uint32)
    table = np.zeros((split.size << PARTS_SHIFT, 3), np.uint64)
    keys, parts = np.empty(size + 1, np.uint32), np.empty(size + 1, np.int32)
    shift = 15 - PARTS_SHIFT
    found = split_first(bits, np.uint32(15), slots, low, high, shift, table, keys, parts)
    magnitudes = bits & _MAGNITUDE
    expected = magnitudes[np.isin(magnitudes >> np.uint32(15), split) & (magnitudes > 0)]
    np.testing.assert_array_equal(keys[:found], expected)
    part = (slots[expected >> np.uint32(15)] << PARTS_SHIFT) + (expected >> np.uint32(shift) & np.uint32(7)).astype(int)
    np.testing.assert_array_equal(parts[:found], part)
    np.testing.assert_array_equal(table[:, 0], np.bincount(part, minlength=len(table)))
    places = (expected & np.uint32((1 << shift) - 1)).astype(np.float64)
    np.testing.assert_array_equal(table[:, 1], np.bincount(part, places, len(table)))
    np.testing.assert_array_equal(table[:, 2], np.bincount(part, places**2, len(table)))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60), st.lists(st.integers(0, 2**31 - 1), max_size=9))
def test_codes_by_limits_count_the_limits_below(bits: list[int], limits: list[int]) -> None:
    patterns, upper = np.array(bits, np.uint32), np.sort(np.array(limits, np.uint32))
    codes = np.empty(patterns.size, np.uint8)
    codes_by_limits(patterns, upper, 77, codes)
    keys = patterns & np.uint32(0x7FFFFFFF)
    np.testing.assert_array_equal(codes, np.where(keys == 0, 77, np.searchsorted(upper, keys, side="left")))


def test_several_limits_may_lie_next_to_each_other() -> None:
    bits = np.arange(5000, 5400, dtype=np.uint32) | np.uint32(1 << 31)
    upper = np.array([4000, 5001, 5002, 5002, 5003, 5200, (1 << 15) - 1, 1 << 20], np.uint32)
    codes = np.empty(bits.size, np.uint8)
    codes_by_limits(bits, upper, 77, codes)
    np.testing.assert_array_equal(codes, np.searchsorted(upper, bits & _MAGNITUDE, side="left"))
