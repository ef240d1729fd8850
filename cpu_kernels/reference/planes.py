"""What the kernels mean: their NumPy twins, written for reading."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def unpack_planes(planes: NDArray[np.uint64], cols: int) -> NDArray[np.int8]:
    """Return planes (planes, rows, words) as +1 and -1, int8 (planes, rows, cols)."""
    words = np.ascontiguousarray(planes).view(np.uint8)
    bits = np.unpackbits(words, axis=-1, bitorder="little", count=cols)
    return (2 * bits.astype(np.int8) - 1).astype(np.int8)


def pack_bits(bits: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return bits (..., cols) as words (..., words): bit i of word j is column 64 j + i, padding bits are zero."""
    words = -(-bits.shape[-1] // 64)
    octets = np.packbits(bits, axis=-1, bitorder="little")
    padded = np.zeros((*bits.shape[:-1], 8 * words), np.uint8)
    padded[..., : octets.shape[-1]] = octets
    return padded.view("<u8").astype(np.uint64)


def expand(
    planes: NDArray[np.uint64], coef: NDArray[np.float32], terms: Sequence[int], block: int, cols: int
) -> NDArray[np.float32]:
    """Return the weights that planes and coefficients stand for, float32 (rows, cols)."""
    signs = unpack_planes(planes, cols)
    blocks = np.arange(cols) // block
    weights = np.zeros(signs.shape[1:], np.float32)
    for mask, term in zip(terms, coef, strict=True):
        product = np.ones(signs.shape[1:], np.float32)
        for plane in range(planes.shape[0]):
            if mask >> plane & 1:
                product *= signs[plane]
        weights += np.broadcast_to(term[:, blocks], weights.shape) * product
    return weights


def look_up_levels(planes: NDArray[np.uint64], levels: NDArray[np.float32], cols: int) -> NDArray[np.float32]:
    """Return the level of each weight's bits, float32 (rows, cols): bit p of a place in levels is that of plane p."""
    bits = (unpack_planes(planes, cols) > 0).astype(np.int64)
    weights: NDArray[np.float32] = levels[np.tensordot(1 << np.arange(planes.shape[0]), bits, 1)]
    return weights


def dual_planes(
    weights: NDArray[np.float32], block: int, large: NDArray[np.float32], small: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Return b1 + 2 * b2, uint8 (rows, cols), of the level nearest to each weight for scales a1 and a2 of its block."""
    blocks = np.arange(weights.shape[1]) // block
    a1, a2 = large[:, blocks], small[:, blocks]
    swapped = np.abs(a2) > np.abs(a1)
    way1, way2 = np.where(a1 < 0, -1, 1), np.where(a2 > 0, 1, -1)
    (a, b), (way_a, way_b) = (
        (np.where(swapped, two, one), np.where(swapped, one, two)) for one, two in ((a1, a2), (way1, way2))
    )
    has_a = way_a * weights > way_a * (a + b) / np.float32(2)
    has_b = way_b * np.where(has_a, weights - a, weights) > way_b * b / np.float32(2)
    code_a, code_b = np.where(swapped, 2, 1), np.where(swapped, 1, 2)
    codes: NDArray[np.uint8] = (code_a * has_a + code_b * has_b).astype(np.uint8)
    return codes
