"""Are float32 magnitudes counted, found and told apart as NumPy does it?"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bincompress.methods.rounding.cells import Grid
from cpu_kernels.quantize.narrowing import (
    LOOKUP_SHIFT,
    PARTS_SHIFT,
    codes_by_limits,
    count_cells,
    find_keys,
    split_again,
    split_first,
    sum_of_squares,
)
from tests.conftest import as_weight

_MAGNITUDE = np.uint32(0x7FFFFFFF)


def cell_of(keys: NDArray[np.uint32], grid: Grid) -> NDArray[np.int64]:
    """Return the numbers of the cells that magnitudes are in."""
    octave = keys >> np.uint32(23)
    cells: NDArray[np.int64] = (grid.first[octave] + (keys >> grid.shifts[octave])).astype(np.int64)
    return cells


def patterns(seed: int, size: int) -> NDArray[np.uint32]:
    random = np.random.default_rng(seed)
    values = random.standard_normal(size) * 10.0 ** random.integers(-30, 30, size)
    return as_weight(np.where(random.random(size) < 0.1, 0.0, values)[None], "F32").flat


@given(
    st.integers(0, 2**32 - 1), st.integers(0, 300), st.sampled_from([8, 13, 18]), st.sampled_from([1e-20, 1.0, 9e30])
)
def test_cells_hold_the_number_and_the_places_of_their_magnitudes(
    seed: int, size: int, shift: int, typical: float
) -> None:
    bits, grid = patterns(seed, size), Grid.around(typical, shift)
    scratch, cells, sums = np.zeros(grid.size, np.uint64), np.empty(size, np.int32), np.empty((2, size))
    found = count_cells(bits, grid.shifts, grid.first, scratch, cells, sums)
    keys = bits & _MAGNITUDE
    expected, inverse, counts = np.unique(cell_of(keys, grid), return_inverse=True, return_counts=True)
    places = np.zeros(expected.size)
    np.add.at(places, inverse, (keys & np.uint32((1 << 23) - 1)).astype(np.float64))
    np.testing.assert_array_equal(cells[:found], expected)
    np.testing.assert_array_equal(sums[:, :found], [counts, places])
    assert not scratch.any()
    base, shifts = grid.base(expected)
    assert np.all((base[inverse] <= keys) & (keys - base[inverse] < np.uint32(1) << shifts[inverse]))


@given(st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_the_sum_of_squares_is_that_of_float64(seed: int, size: int) -> None:
    values = np.clip(patterns(seed, size).view(np.float32), -1e15, 1e15).astype(np.float32)
    assert sum_of_squares(values) == pytest.approx(float(np.sum(values.astype(np.float64) ** 2)), rel=1e-12)


@pytest.mark.parametrize("by_ranges", [True, False])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_magnitudes_of_cells_that_are_split_are_found_by_ranges_and_by_lookup(size: int, by_ranges: bool) -> None:
    bits = as_weight(np.random.default_rng(size).standard_normal((1, size)), "F32").flat.copy()
    bits[::7] = 0
    grid = Grid.around(1.0, 15)
    one = int(cell_of(np.array([1.0], np.float32).view(np.uint32), grid)[0])
    split = np.array([0, *range(one - 100, one - 50), one + 3])
    slots = np.full(grid.size, -1, np.int32)
    slots[split] = np.arange(split.size)
    base, shifts = grid.base(split)
    first, last = base[[0, 1, -1]], (base + ((np.uint32(1) << shifts) - np.uint32(1)))[[0, -2, -1]]
    ranges = 3 if by_ranges else 0
    low = (np.maximum(first, np.uint32(1)) - np.uint32(1))[:ranges]  # zeros are left out
    near = np.zeros(1 << 31 - LOOKUP_SHIFT, np.int8)
    for begin, end in zip(first >> np.uint32(LOOKUP_SHIFT), last >> np.uint32(LOOKUP_SHIFT), strict=True):
        near[begin : end + 1] = 1
    keys = np.empty(size + 1, np.uint32)
    chosen = (slots >= 0).astype(np.int8)
    keys = keys[: find_keys(bits, grid.shifts, grid.first, chosen, near, low, last[:ranges].copy(), keys)]
    magnitudes = bits & _MAGNITUDE
    expected = magnitudes[np.isin(cell_of(magnitudes, grid), split) & (magnitudes > 0)]
    np.testing.assert_array_equal(keys, expected)
    part_shifts = np.maximum(shifts.astype(int) - PARTS_SHIFT, 0).astype(np.uint32)
    table, parts = np.zeros((split.size << PARTS_SHIFT, 3), np.uint64), np.empty(keys.size, np.int32)
    split_first(keys, grid.shifts, grid.first, slots, part_shifts, table, parts)
    check_parts(keys, slots[cell_of(keys, grid)], part_shifts, table, parts)
    again = np.where(np.arange(len(table)) % 3 == 1, np.arange(len(table)) // 3, -1).astype(np.int32)
    finer = np.full(len(table), 2, np.uint32)
    slot = again[parts]
    second = np.zeros((len(table) << PARTS_SHIFT, 3), np.uint64)
    left = split_again(keys, parts, again, finer, second)
    np.testing.assert_array_equal(keys[:left], expected[slot >= 0])
    check_parts(keys[:left], slot[slot >= 0], finer, second, parts[:left])


def check_parts(
    keys: NDArray[np.uint32], slot: NDArray[np.int32], shifts: NDArray[np.uint32], table: NDArray[np.uint64],
    parts: NDArray[np.int32],
) -> None:  # fmt: skip
    """Compare the parts of magnitudes, whose cells have slots, and what is counted in them with NumPy's."""
    part = (slot << PARTS_SHIFT) + (keys >> shifts[slot] & np.uint32(7)).astype(int)
    np.testing.assert_array_equal(parts, part)
    places = (keys & ((np.uint32(1) << shifts[slot]) - np.uint32(1))).astype(np.float64)
    for column, what in enumerate((np.ones(keys.size), places, places**2)):
        np.testing.assert_array_equal(table[:, column], np.bincount(part, what, len(table)))


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
