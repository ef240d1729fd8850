"""Products by tables of six columns: equal to the lookup kernel to the last bit, and exact sums."""

import numpy as np
import pytest

from cpu_kernels.jit import cpu_features
from cpu_kernels.jit.addresses import NATIVE_CALLS
from cpu_kernels.matmul import wide_lookup
from cpu_kernels.matmul.activations import Per, quantize
from cpu_kernels.matmul.chosen import ChosenProducts
from cpu_kernels.matmul.prepacking import prepack
from cpu_kernels.matmul.products import FewTokensProduct, TokenProduct, multiply
from cpu_kernels.parallel.workers import Workers
from cpu_kernels.reference.products import multiply as multiply_reference

pytestmark = pytest.mark.skipif(
    wide_lookup.CODE not in cpu_features.shuffle_sets(), reason="the CPU lacks AVX-512BW, for which the kernel is"
)

CASES = {
    "k-tiles of 128": (130, 300, 128, 2, False, np.float16, None),
    "k-tiles of 64": (70, 130, 64, 1, True, np.float16, None),
    "more tiles than are multiplied at once": (2120, 130, 64, 1, True, np.float16, None),
    "two rows, one tile": (2, 64, 128, 2, True, np.float16, None),
    "plane weights, one block": (65, 200, 200, 4, True, np.float32, (8.0, 4.0, 2.0, 1.0)),
}


@pytest.mark.parametrize(("width", "per"), [(8, "segment"), pytest.param(6, "token", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_each_token_has_the_numbers_that_it_has_alone(
    case: str, width: int, per: Per, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, cols, block, planes, has_offset, dtype, weights = CASES[case]
    random = np.random.default_rng(len(case))
    blocks = -(-cols // block)
    bits = random.integers(0, 2**64, (planes, rows, -(-cols // 64)), dtype=np.uint64)
    scale = random.random((rows, blocks) if weights else (planes, rows, blocks)).astype(dtype)
    offset = random.random((rows, blocks)).astype(dtype) if has_offset else None
    matrix = prepack(bits, scale, block, cols, offset, plane_weights=weights)
    x = (3 * random.standard_normal((35, cols))).astype(np.float32)
    x[:, :5] = 100.0  # the largest sums
    of_all = quantize(x, width, per)
    with Workers(2) as workers:
        found = multiply(matrix, of_all, pool=workers)
        few = FewTokensProduct(matrix, width, per, workers)
        for tokens in (1, 2, 3, 4, 7, 16, 5):
            assert np.array_equal(few(x[:tokens]), found[:tokens])
    monkeypatch.setattr(cpu_features, "is_zen", lambda: False)
    expected = np.concatenate([multiply(matrix, quantize(token, width, per)) for token in x])
    monkeypatch.setattr(cpu_features, "is_zen", lambda: True)
    with Workers(2) as workers:
        one = TokenProduct(matrix, width, per, workers)
        assert np.array_equal(np.concatenate([one(token[None]) for token in x]), expected)
        prepared = quantize(x[:1], width, per)
        assert all(np.array_equal(multiply(matrix, prepared, pool=workers), expected[:1]) for _ in range(2))
    assert np.array_equal(found, expected)
    for tokens in (2, 3, 4, 5, 6, 7, 33):  # whole passes, and each rest
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
    assert np.isnan(multiply(matrix, quantize(x[3]))).all()
    assert np.array_equal(np.delete(found, 3, axis=0), np.delete(usual, 3, axis=0))


@pytest.mark.parametrize("threads", [1, 2])
def test_matrices_of_other_blocks_share_a_token(threads: int) -> None:
    """Their sums of x differ, which offsets are multiplied with; so experts of one layer may have them."""
    random = np.random.default_rng(2)
    x = random.standard_normal((1, 512)).astype(np.float32)
    shared, matrices = quantize(x, 8, "segment"), []
    with Workers(threads) as workers:
        chosen = ChosenProducts(3, 128, 512, workers)
        for number, block in enumerate((128, 256, 512)):
            bits = random.integers(0, 2**64, (2, 128, 8), dtype=np.uint64)
            scale, offset = (random.random((*shape, 128, 512 // block)).astype(np.float16) for shape in ((2,), ()))
            matrices.append(prepack(bits, scale, block, 512, offset))
            assert chosen.put(number, matrices[-1], 8, "segment") == NATIVE_CALLS
        alone = [multiply(matrix, quantize(x, 8, "segment")) for matrix in matrices]
        for matrix, expected in zip(matrices, alone, strict=True):
            assert np.array_equal(multiply(matrix, shared), expected)
        if NATIVE_CALLS:
            assert np.array_equal(chosen(np.arange(3), x), np.concatenate(alone))
