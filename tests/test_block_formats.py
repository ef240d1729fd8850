"""Kernels of quantized blocks: equal to their NumPy twins and to the gguf package."""

from typing import Any

import numpy as np
import pytest

from bincompress.sources.gguf.blocks import _KERNELS
from cpu_kernels.quantize import block_formats
from cpu_kernels.reference import block_formats as reference


def blocks_of(kind: str, count: int) -> Any:
    """Return random blocks with scales that are finite, and these."""
    size, _, places = _KERNELS[kind]
    random = np.random.default_rng(count)
    blocks = random.integers(0, 256, (count, size)).astype(np.uint8)
    halves = [random.standard_normal(count).astype(np.float16) for _ in places]
    for place, half in zip(places, halves, strict=True):
        blocks[:, place : place + 2] = half[:, None].view(np.uint8)
    return blocks, [half.astype(np.float32) for half in halves]


@pytest.mark.parametrize("kind", _KERNELS)
@pytest.mark.parametrize("count", [1, 3, 64])
def test_kernels_equal_their_twins_and_the_package(kind: str, count: int) -> None:
    blocks, halves = blocks_of(kind, count)
    values = np.empty((count, _KERNELS[kind][1]), np.float32)
    getattr(block_formats, kind.lower())(blocks, *halves, values)
    np.testing.assert_array_equal(values, getattr(reference, kind.lower())(blocks, *halves))
    gguf = pytest.importorskip("gguf")
    np.testing.assert_array_equal(values, gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
