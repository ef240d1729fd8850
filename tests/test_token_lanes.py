"""Products of many tokens, whose lanes are tokens: equal to the lookup kernel to the last bit, and exact sums."""

import itertools

import numpy as np
import pytest

from cpu_kernels.jit import cpu_features
from cpu_kernels.matmul import token_lanes
from cpu_kernels.matmul.activations import Per, quantize
from cpu_kernels.matmul.prepacking import prepack
from cpu_kernels.matmul.products import multiply
from cpu_kernels.parallel.workers import Workers
from cpu_kernels.reference.products import multiply as multiply_reference

pytestmark = pytest.mark.skipif(
    token_lanes.CODE not in cpu_features.shuffle_sets(), reason="the CPU lacks AVX-512BW, for which the kernel is"
)

CASES = {
    "k-tiles of 128": (130, 300, 128, 2, False, np.float16, None),
    "k-tiles of 64": (70, 130, 64, 1, True, np.float16, None),
    "plane weights, one block": (65, 200, 200, 4, True, np.float32, (8.0, 4.0, 2.0, 1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_token_has_the_numbers_that_it_has_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cols, block, planes, has_offset, dtype, weights = CASES[case]
    random = np.random.default_rng(len(case))
    blocks = -(-cols // block)
    bits = random.integers(0, 2**64, (planes, rows, -(-cols // 64)), dtype=np.uint64)
    scale = random.random((rows, blocks) if weights else (planes, rows, blocks)).astype(dtype)
    offset = random.random((rows, blocks)).astype(dtype) if has_offset else None
    matrix = prepack(bits, scale, block, cols, offset, plane_weights=weights)
    x = (3 * random.standard_normal((76, cols))).astype(np.float32)
    x[:, :5] = 100.0  # the largest sums
    settings: list[tuple[int, Per]] = [(8, "segment"), (6, "token")]
    for width, per in settings:
        of_all = quantize(x, width, per)
        with Workers(2) as workers:
            found = multiply(matrix, of_all, pool=workers)
        with monkeypatch.context() as patch:
            patch.setattr(token_lanes, "FEWEST", 1000)
            expected = multiply(matrix, quantize(x, width, per))
        assert np.array_equal(found, expected)
        for tokens in (12, 16, 18, 31, 33, 45):  # each size of a block, and a rest
            assert np.array_equal(multiply(matrix, quantize(x[:tokens], width, per)), expected[:tokens])
        wide = scale.astype(np.float32)
        shifts = None if offset is None else offset.astype(np.float32)
        exact = multiply_reference(bits, wide, block, cols, of_all, shifts, weights)
        assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max()


def test_a_token_that_is_not_finite_disturbs_no_other() -> None:
    random = np.random.default_rng(1)
    bits = random.integers(0, 2**64, (2, 64, 2), dtype=np.uint64)
    matrix = prepack(bits, random.random((2, 64, 1)).astype(np.float16), 128, 128)
    x = random.standard_normal((20, 128)).astype(np.float32)
    usual = multiply(matrix, quantize(x))
    x[3, 7] = np.nan
    found = multiply(matrix, quantize(x))
    assert np.isnan(found[3]).all()
    assert np.array_equal(np.delete(found, 3, axis=0), np.delete(usual, 3, axis=0))


def test_tokens_are_parted_into_blocks_of_which_none_has_too_few() -> None:
    for tokens in range(12, 200):
        found = token_lanes.blocks(tokens)
        assert found[0][0] == 0
        assert all(before[1] == after[0] for before, after in itertools.pairwise(found))
        assert all(token_lanes.FEWEST <= stop - start <= token_lanes.LANES for start, stop in found)
        assert 0 <= tokens - found[-1][1] < token_lanes.FEWEST
