"""Are the groups those that the paper's objective and algorithms give?"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bincompress.methods import make_settings, method_named
from bincompress.methods.rounding import whole_matrix
from bincompress.methods.rounding.narrowed import narrowed_groups
from bincompress.sources.checkpoint import open_checkpoint, read_weight
from cpu_kernels.quantize.group_units import group_units
from cpu_kernels.quantize.grouping import exact_groups, merged_groups
from cpu_kernels.quantize.two_groups import sorting_network, split_blocks
from tests.conftest import SHARED, as_weight


def cost_of(magnitudes: NDArray[np.float64], limits: list[int], lam: float) -> float:
    """The paper's objective, from its definition."""
    groups = [magnitudes[a:b] for a, b in itertools.pairwise(limits)]
    return float(sum(group.size * group.var() + lam / group.size for group in groups))


def prefixes(atoms: list[NDArray[np.float64]]) -> tuple[NDArray[np.float64], ...]:
    return tuple(
        np.concatenate([[0.0], np.cumsum([float(np.sum(atom**power)) for atom in atoms])]) for power in (0, 1, 2)
    )


def exhaustive(atoms: list[NDArray[np.float64]], most: int, lam: float) -> float:
    ordered = np.concatenate(atoms)
    ends = np.cumsum([atom.size for atom in atoms])
    least = np.inf
    for groups in range(1, min(most, len(atoms)) + 1):
        for inner in itertools.combinations(ends[:-1], groups - 1):
            least = min(least, cost_of(ordered, [0, *inner, ordered.size], lam))
    return float(least)


def plain_merging(magnitudes: NDArray[np.float64], most: int, window: int, lam: float) -> list[int]:
    """Algorithms 2 (window 1) and 3, unoptimised: all adjacent pairs looked at anew for every merge."""
    limits = [*range(0, magnitudes.size, window), magnitudes.size]
    _, first, second = prefixes([np.array([m]) for m in magnitudes])

    def merged(i: int) -> float:
        begin, end = limits[i], limits[i + 2]
        total = first[end] - first[begin]
        return float((second[end] - second[begin]) - total * total / (end - begin) + lam / (end - begin))

    while len(limits) - 1 > most:
        del limits[1 + min(range(len(limits) - 2), key=lambda i: (merged(i), i))]
    return limits


magnitudes_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=11)


@given(magnitudes_strategy, st.integers(1, 6), st.sampled_from([0.0, 0.5, 20.0, 400.0]))
def test_exact_is_the_optimum_over_groupings_of_distinct_magnitudes(values: list[int], most: int, lam: float) -> None:
    ordered = np.sort(np.array(values, np.float64))
    atoms = [ordered[ordered == value] for value in np.unique(ordered)]
    bounds = np.empty(most + 1, np.int64)
    groups = exact_groups(*prefixes(atoms), lam, most, bounds)
    ends = np.concatenate([[0], np.cumsum([atom.size for atom in atoms])])
    found = cost_of(ordered, list(ends[bounds[: groups + 1]]), lam)
    assert found <= exhaustive(atoms, most, lam) * (1 + 1e-9) + 1e-9


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 4))
def test_without_lambda_no_split_of_equal_magnitudes_is_better(values: list[int], most: int) -> None:
    ordered = np.sort(np.array(values, np.float64))
    atoms = [ordered[ordered == value] for value in np.unique(ordered)]
    assert exhaustive(atoms, most, 0.0) <= exhaustive([np.array([v]) for v in ordered], most, 0.0) + 1e-9


def test_with_lambda_a_split_of_equal_magnitudes_can_be_better() -> None:
    """Why the exact solver says what it is exact over: groupings that keep equal magnitudes together."""
    ordered = np.array([1.0] * 10 + [1.0995] * 100 + [1.199] * 10)
    together = min(cost_of(ordered, limits, 1.0) for limits in ([0, 120], [0, 10, 120], [0, 110, 120]))
    assert cost_of(ordered, [0, 60, 120], 1.0) < together


@given(magnitudes_strategy, st.integers(1, 5))
def test_halving_finds_the_same_cost_as_the_table(values: list[int], most: int) -> None:
    ordered = np.sort(np.array(values, np.float64))
    sums = prefixes([ordered[ordered == value] for value in np.unique(ordered)])
    table = whole_matrix.exact_limits(sums[0], sums[1], sums[2], 0.3, most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_matrix, "_TABLE_LIMIT", 0)
        halved = whole_matrix.exact_limits(sums[0], sums[1], sums[2], 0.3, most)

    def cost(limits: NDArray[np.int64]) -> float:
        return cost_of(ordered, [int(sums[0][i]) for i in limits], 0.3)

    assert cost(halved) == pytest.approx(cost(table), rel=1e-12)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 8), st.sampled_from([1, 2, 5]))
def test_merging_is_the_papers(values: list[int], most: int, window: int) -> None:
    ordered = np.sort(np.array(values, np.float64))
    atoms = [ordered[i : i + window] for i in range(0, ordered.size, window)]
    bounds = np.empty(most + 1, np.int64)
    groups = merged_groups(*prefixes(atoms), 0.7, most, bounds)
    limits = [min(window * int(b), ordered.size) for b in bounds[: groups + 1]]
    assert limits == plain_merging(ordered, most, window, 0.7)


def test_merging_takes_the_cheapest_merged_group_not_the_least_increase() -> None:
    # {1, 1.1} costs less merged than {5, 5}... unless the pair on the right is equal: the key is the merged cost.
    sums = prefixes([np.array([v]) for v in (1.0, 1.1, 5.0, 5.0)])
    bounds = np.empty(4, np.int64)
    assert merged_groups(*sums, 0.0, 3, bounds) == 3
    assert bounds.tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("solver", "window"), [("greedy", 1), ("windowed", 3)])
def test_merged_matrix_assigns_by_rank_even_where_equal_magnitudes_are_parted(
    dtype: str, solver: str, window: int
) -> None:
    random = np.random.default_rng(3)
    values = random.integers(1, 6, (6, 20)) * random.choice([-1.0, 1.0], (6, 20))
    settings = make_settings("wgm", groups=7, block="matrix", solver=solver, window=window)  # type: ignore[arg-type]
    found = method_named("wgm").binarize(as_weight(values, dtype), settings)
    ordered = np.sort(np.abs(values).reshape(-1))
    limits = plain_merging(ordered, 7, window, 0.0)
    assert found.squared_error == pytest.approx(cost_of(ordered, limits, 0.0), abs=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(0.0, False), (0.02, False), (0.02, True)]), st.integers(1, 200))
def test_two_groups_per_block_are_the_general_solvers(seed: int, cost_of_size: tuple[float, bool], cols: int) -> None:
    lam, normalized = cost_of_size
    values = np.random.default_rng(seed).standard_normal((35, cols))
    weight = as_weight(np.round(values * 8) / 8 if seed % 2 else values, "BF16")
    blocks = -(-cols // 64)
    thresholds, sums = np.empty((35, blocks), np.uint16), np.empty((4, 35, blocks))
    split_blocks(weight.flat, cols, 64, lam, normalized, thresholds, sums)
    general, codes = np.empty((3, 2, 35, blocks)), np.empty(weight.bits.size, np.uint8)
    group_units(weight.float32().view(np.uint32).reshape(-1), cols, 64, 2, 1, True, lam, normalized, codes, general)

    def cost(size: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(size > 0, -(total**2) / np.maximum(size, 1), 0.0)

    lengths = np.minimum(64, cols - 64 * np.arange(blocks))
    if lam == 0:
        fast = cost(sums[0], sums[1]) + cost(lengths - sums[0], sums[2])
        slow = cost(general[0, 0], general[1, 0]) + cost(general[0, 1], general[1, 1])
        np.testing.assert_allclose(fast, slow, rtol=1e-9, atol=1e-9)
    else:
        np.testing.assert_array_equal(sums[0], general[0, 0])


def blocks_one_by_one(
    weight: NDArray[np.float32], block: int, most: int, lam: float
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The exact groups of every row-block, each sorted alone and solved by the scalar search."""
    rows, cols = weight.shape
    codes = np.empty(weight.shape, np.uint8)
    sums = np.zeros((3, most, rows, -(-cols // block)))
    for row, start in itertools.product(range(rows), range(0, cols, block)):
        magnitudes = np.abs(weight[row, start : start + block])
        ordered = np.sort(magnitudes)
        ends = np.append(np.flatnonzero(np.diff(ordered)) + 1, ordered.size)
        values = ordered.astype(np.float64)
        count, first, second = (np.concatenate([[0.0], np.cumsum(values**power)[ends - 1]]) for power in (0, 1, 2))
        bounds = np.empty(most + 1, np.int64)
        limits = bounds[: exact_groups(count, first, second, lam, most, bounds) + 1]
        codes[row, start : start + block] = np.searchsorted(ordered[ends[limits[1:] - 1] - 1], magnitudes)
        for part, prefix in enumerate((count, first, second)):
            sums[part, : limits.size - 1, row, start // block] = np.diff(prefix[limits])
    return codes, sums


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.4]), st.integers(1, 300), st.sampled_from([64, 128, 256, 300]),
    st.integers(1, 20),
)  # fmt: skip
def test_groups_of_row_blocks_are_the_scalar_searchs_to_the_bit(
    seed: int, lam: float, cols: int, block: int, most: int
) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal((34, cols))
    # Values with ties, of equal magnitudes and of equal costs, as often as without.
    values = (values, np.round(values * 8) / 8, np.round(values * 50) * 0.1, np.round(values * 2))[seed % 4]
    weight = values.astype(np.float32)
    block = min(block, cols) if block == 300 else block
    codes, sums = np.empty(weight.size, np.uint8), np.empty((3, most, 34, -(-cols // block)))
    group_units(weight.view(np.uint32).reshape(-1), cols, block, most, 1, True, lam, False, codes, sums)
    expected_codes, expected_sums = blocks_one_by_one(weight, block, most, lam)
    np.testing.assert_array_equal(codes.reshape(weight.shape), expected_codes)
    np.testing.assert_array_equal(sums, expected_sums)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 256])
def test_sorting_network_sorts_every_sequence_of_zeros_and_ones_it_is_given(size: int) -> None:
    # By the 0-1 principle a network that sorts these sorts everything; random ones stand for all above 8 keys.
    random = np.random.default_rng(0)
    cases = np.array(list(itertools.product([0, 1], repeat=size))) if size <= 8 else random.integers(0, 2, (4000, size))
    for low, high in sorting_network(size):
        pair = np.sort(cases[:, [low, high]], axis=1)
        cases[:, [low, high]] = pair
    assert np.all(np.diff(cases, axis=1) >= 0)


def test_normalized_lambda_spans_from_every_weight_its_own_group_to_one_group() -> None:
    values = np.random.default_rng(1).standard_normal((1, 64))
    weight = as_weight(values, "F32")

    def groups(share: float) -> int:
        settings = make_settings("wgm", groups=64, block="matrix", lam=share, lam_normalized=True)
        return int(method_named("wgm").binarize(weight, settings).groups)

    assert groups(0.0) > 30
    assert groups(1.0) <= 2
    assert groups(0.0) >= groups(0.01) >= groups(0.5) >= groups(1.0)


@pytest.mark.needs_shared
def test_exact_is_never_above_the_papers_algorithms_on_a_trained_model() -> None:
    for source in open_checkpoint(SHARED / "models" / "doclm-29m").tensors.values():
        if ".layers.3." not in source.name or len(source.shape) != 2:
            continue
        weight = read_weight(source)

        def error(solver: str, weight=weight) -> float:  # type: ignore[no-untyped-def]
            settings = make_settings("wgm", groups=32, block="matrix", solver=solver, window=64)  # type: ignore[arg-type]
            return float(method_named("wgm").binarize(weight, settings).squared_error)

        exact = error("exact")
        assert exact <= error("windowed"), source.name
        if "k_proj" in source.name:  # it takes seconds for each
            assert exact <= error("greedy"), source.name


@pytest.mark.parametrize("seed", range(12))
def test_groups_of_a_large_float32_matrix_are_those_of_all_its_magnitudes_sorted(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(seed)
    normal = random.standard_normal((80, 90)) * 0.05
    values = (normal, normal**3, np.where(normal > 0, 0.3 + normal, normal - 1), random.uniform(-1, 1, normal.shape))
    weight = as_weight(values[seed % 4], "F32")
    weight.bits[::9, ::5] = 0
    groups = (2, 3, 4, 8, 16, 32)[seed % 6]
    settings = make_settings("wgm", groups=groups, block="matrix")
    narrowed = narrowed_groups(weight.flat, groups)
    assert narrowed is not None
    monkeypatch.setattr(whole_matrix, "_NARROWED", 0)
    found = method_named("wgm").binarize(weight, settings)
    monkeypatch.setattr(whole_matrix, "_NARROWED", weight.bits.size + 1)
    expected = method_named("wgm").binarize(weight, settings)
    np.testing.assert_array_equal(found.tensor.planes, expected.tensor.planes)
    np.testing.assert_array_equal(found.tensor.numbers, expected.tensor.numbers)
    np.testing.assert_array_equal(found.tensor.listed_index, expected.tensor.listed_index)
    assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-7)
    assert found.notes == expected.notes


def test_magnitudes_that_are_alike_or_not_finite_are_left_to_the_sorting_solver() -> None:
    random = np.random.default_rng(0)
    alike = as_weight(np.round(random.standard_normal((80, 90)) * 20) * 0.01, "F32")
    assert narrowed_groups(alike.flat, 4) is None
    values = random.standard_normal((80, 90))
    values[3, 4] = np.inf
    assert narrowed_groups(as_weight(values, "F32").flat, 4) is None
