"""Do the kernels of windows of limits find what their NumPy twins find, and are codes by limits the limits below?"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.quantize.packing import pack_by_limits
from cpu_kernels.quantize.windows import best_edges, possible_windows
from cpu_kernels.reference import windows as reference
from cpu_kernels.reference.planes import pack_bits

_SEEDS = st.integers(0, 2**32 - 1)


def atoms_of(random: np.random.Generator, size: int) -> tuple[reference.Sums, NDArray[np.float64], list[NDArray]]:  # type: ignore[type-arg]
    """Return the prefix sums of atoms of magnitudes, their widths, and their least and greatest values."""
    values = [np.sort(random.uniform(i, i + 1, random.integers(1, 4))) for i in range(size)]
    parts = [np.array([float(each.size) for each in values])]
    parts += [np.array([np.sum(each**power) for each in values]) for power in (1, 2)]
    sums = tuple(np.concatenate([[0.0], np.cumsum(part)]) for part in parts)
    width = np.array([np.sqrt(each.size * np.sum((each - each.mean()) ** 2)) for each in values])
    return sums, width, [np.array([each[0] for each in values]), np.array([each[-1] for each in values])]  # type: ignore[return-value]


def windows_of(random: np.random.Generator, size: int, number: int) -> tuple[reference.Places, reference.Places]:
    """Return windows of edges, both ends ascending, that have room for groups of an atom each."""
    first, last = (np.sort(random.choice(np.arange(1, size), number, replace=False)) for _ in range(2))
    return np.minimum(first, last), np.maximum(first, last)


@given(_SEEDS, st.integers(3, 60), st.integers(1, 6))
def test_best_edges_have_the_least_cost_of_all_within_the_windows(seed: int, size: int, number: int) -> None:
    random = np.random.default_rng(seed)
    sums, *_ = atoms_of(random, size)
    low, high = windows_of(random, size, min(number, size - 1))
    limits = np.empty(low.size + 2, np.int64)
    cost = best_edges(*sums, low, high, limits)
    assert cost == pytest.approx(reference.best_cost(sums, low, high), rel=1e-9, abs=1e-9)
    groups = [reference.spread(sums, a, b) for a, b in itertools.pairwise(limits.tolist())]
    assert cost == pytest.approx(sum(groups), rel=1e-9, abs=1e-9)
    assert (limits[0], limits[-1]) == (0, size)
    assert np.all((low <= limits[1:-1]) & (limits[1:-1] <= high) & (limits[:-2] < limits[1:-1]))


@given(_SEEDS, st.integers(3, 60), st.integers(1, 6), st.sampled_from([0.0, 0.1, 1.0]))
def test_possible_windows_are_those_of_the_twin(seed: int, size: int, number: int, more: float) -> None:
    random = np.random.default_rng(seed)
    sums, width, [bottom, top] = atoms_of(random, size)
    low, high = windows_of(random, size, min(number, size - 1))
    allowed = reference.best_cost(sums, low, high) * (1 + more) + 1e-6
    found = np.empty((2, low.size), np.int64)
    possible_windows(*sums, width, bottom, top, allowed, low, high, found)
    near = [
        reference.possible_windows(sums, width, bottom, top, allowed + apart, low, high) for apart in (-1e-8, 1e-8)
    ]  # a cost may tie with the allowed one
    assert any(np.array_equal(found, each) for each in near)


@pytest.mark.parametrize("limits", [0, 1, 3, 7, 15])
@pytest.mark.parametrize("cols", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("zero_code", [-1, 0, 5])
def test_codes_packed_by_limits_count_the_limits_below(limits: int, cols: int, zero_code: int) -> None:
    random = np.random.default_rng(cols + limits)
    bits = random.standard_normal(3 * cols).astype(np.float32).view(np.uint32)
    if zero_code >= 0:
        bits[::5] = 0
        bits[::10] |= np.uint32(1 << 31)  # -0
    upper = np.sort(np.abs(random.standard_normal(limits)).astype(np.float32).view(np.uint32))
    keys = bits & np.uint32(0x7FFFFFFF)
    codes = np.searchsorted(upper, keys, side="left")
    if zero_code >= 0:
        codes[keys == 0] = zero_code
    planes = np.full((4, 3, -(-cols // 64)), 0xFFFF, np.uint64)
    pack_by_limits(bits, cols, upper, zero_code, planes)
    for plane in range(4):
        np.testing.assert_array_equal(planes[plane], pack_bits((codes >> plane & 1).astype(bool).reshape(3, cols)))
