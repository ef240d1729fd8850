"""Every kind of kernel against its NumPy twin, in a minute: for each Numba release, and for plain njit.

It needs NumPy, Numba, filelock and pytest alone (.ci/numba_versions), and runs again where Numba's private API is not
as expected (test_numba_private.py).
"""

from typing import Any

import numpy as np
import pytest

from cpu_kernels.decoder.attention import ATTEND, BLOCK, NO_WINDOW, padded, scratch_size, work_items
from cpu_kernels.jit import addresses, kernel_cache, numba_private
from cpu_kernels.matmul.activations import quantize
from cpu_kernels.matmul.prepacking import kernels, prepack
from cpu_kernels.matmul.products import TokenProduct, multiply
from cpu_kernels.parallel.workers import Workers
from cpu_kernels.quantize.packing import pack_codes, words_for
from cpu_kernels.quantize.unpacking import expand
from cpu_kernels.reference import attention, planes, products

# Compiling takes seconds for each: a quick run tries the best alone.
EACH_KERNEL = [kernels()[0], *(pytest.param(name, marks=pytest.mark.slow) for name in kernels()[1:])]


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("kernel", EACH_KERNEL)
def test_products_of_blocks_and_of_single_tokens_equal_their_twin(kernel: str, bits: int) -> None:
    random = np.random.default_rng(bits)
    rows, cols = 130, 300
    packed = random.integers(0, 1 << 64, (2, rows, words_for(cols)), np.uint64)
    packed[..., -1] &= np.uint64((1 << cols % 64) - 1)
    scale, offset = np.ones((2, rows, 3), np.float32), np.ones((rows, 3), np.float32)
    matrix = prepack(packed, scale, 128, cols, offset, kernel=kernel)
    x = np.rint(random.uniform(-9, 9, (5, cols))).astype(np.float32)
    x[:, 0] = {8: 127, 6: 31}[bits]  # so that the scale is 1 and all sums are integers
    expected = products.multiply(packed, scale, 128, cols, products.quantize(x, bits, "token"), offset)
    with Workers(3) as workers:
        np.testing.assert_array_equal(multiply(matrix, quantize(x, bits), pool=workers), expected)
        single = TokenProduct(matrix, bits, "token", workers)
        for _ in range(3):
            for t in range(5):
                np.testing.assert_array_equal(single(x[t : t + 1]), expected[t : t + 1])
    alone = TokenProduct(matrix, bits, "token", Workers(1))
    np.testing.assert_array_equal(alone(x[:1]), expected[:1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_attention_is_near_its_twin(dtype: type) -> None:
    random = np.random.default_rng(0)
    tokens, heads, kv_heads, dim, first = 5, 4, 2, 16, 40
    positions = -(-(first + tokens) // BLOCK) * BLOCK
    keys, values = random.standard_normal((2, first + tokens, kv_heads, dim)).astype(dtype)
    queries = random.standard_normal((tokens, heads, dim), np.float32)
    kept_keys: Any = np.zeros((kv_heads, positions // BLOCK, dim, BLOCK), dtype)
    kept_values: Any = np.zeros((kv_heads, positions, padded(dim)), dtype)
    for position in range(first + tokens):
        kept_keys[:, position // BLOCK, :, position % BLOCK] = keys[position]
        kept_values[:, position, :dim] = values[position]
    bits = np.dtype(np.uint16 if dtype is np.float16 else np.float32)
    result = np.empty((tokens, heads * dim), np.float32)
    ATTEND[bits](
        queries.reshape(tokens, -1), heads, kept_keys.view(bits), kept_values.view(bits), first, NO_WINDOW,
        0, work_items(tokens, heads, kv_heads), np.zeros(scratch_size(dim), np.float32), result,
    )  # fmt: skip
    expected = attention.attend(queries, keys.astype(np.float32), values.astype(np.float32), first)
    np.testing.assert_allclose(result, expected.reshape(tokens, -1), atol=2e-6)


def test_planes_and_weights_equal_their_twins() -> None:
    random = np.random.default_rng(1)
    rows, cols = 3, 130
    codes = random.integers(0, 8, (rows, cols)).astype(np.uint8)
    packed = np.empty((3, rows, words_for(cols)), np.uint64)
    pack_codes(codes.ravel(), cols, packed)
    np.testing.assert_array_equal(packed, planes.pack_bits((codes >> np.arange(3)[:, None, None] & 1).astype(bool)))
    coef = random.standard_normal((3, rows, 2), np.float32)
    weights = np.empty((rows, cols), np.float32)
    expand(packed, coef, np.array([1, 2, 7], np.uint64), 128, weights)
    np.testing.assert_array_equal(weights, planes.expand(packed, coef, [1, 2, 7], 128, cols))


def test_kernels_are_kept_and_called_natively_where_numba_is_as_expected() -> None:
    expected = numba_private.PROBLEM is None
    assert addresses.NATIVE_CALLS is expected
    assert kernel_cache.cache_is_kept() is expected
