"""Random packed matrices and tokens, which the tests of laying out and of multiplying share."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.matmul.activations import Activations
from cpu_kernels.matmul.prepacking import kernels
from cpu_kernels.reference import products as reference_products

COLUMNS = [1, 4, 63, 64, 65, 127, 128, 129, 200, 256, 257, 400, 1100]
ROWS = [1, 2, 31, 32, 33, 63, 64, 65, 130]
BLOCKS = [64, 128, 256, 1 << 20]
# Each kernel is compiled for both numbers of bits, and for blocks of 64 columns with 8 bits: half a minute less.
BITS_AND_BLOCKS = [(bits, block) for block in BLOCKS for bits in (6, 8) if (bits, block) != (6, 64)]
KERNELS = kernels()
# Compiling takes seconds for each: a quick run tries the best alone.
EACH_KERNEL = [KERNELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS[1:])]


@dataclasses.dataclass
class Case:
    planes: NDArray[np.uint64]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32] | None
    block: int
    cols: int

    def expected(self, activations: Activations, weights: tuple[float, ...] | None = None) -> NDArray[np.float64]:
        found: NDArray[np.float64] = reference_products.multiply(
            self.planes, self.scale, self.block, self.cols, activations, self.offset, weights
        )
        return found


def make(
    seed: int, rows: int, cols: int, count: int, block: int, offset: bool, ones: bool = False, shared: bool = False
) -> Case:
    rng = np.random.default_rng(seed)
    words = -(-cols // 64)
    planes = rng.integers(0, 1 << 64, (count, rows, words), dtype=np.uint64)
    if cols % 64:
        planes[..., -1] &= np.uint64((1 << cols % 64) - 1)
    blocks = 1 if block >= cols else -(-cols // block)

    def scales(*shape: int) -> NDArray[np.float32]:
        if ones:
            return np.ones(shape, np.float32)
        values = rng.normal(size=shape).astype(np.float16).astype(np.float32)
        return np.ldexp(values, -9)

    scale = scales(rows, blocks) if shared else scales(count, rows, blocks)
    return Case(planes, scale, scales(rows, blocks) if offset else None, block, cols)


def tokens(seed: int, count: int, cols: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    sizes: NDArray[np.float64] = rng.choice([1e-3, 1.0, 50.0], size=(count, 1))
    return (rng.normal(size=(count, cols)) * sizes).astype(np.float32)


def assert_near(found: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-6 * max(np.abs(expected).max(), 1e-30)
