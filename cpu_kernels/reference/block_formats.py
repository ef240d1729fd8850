"""The kernels of cpu_kernels/quantize/block_formats.py in NumPy: a block's bytes taken apart, a field at a time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def q8_0(blocks: Bytes, scales: Floats) -> Floats:
    """Return values (n, 32) of blocks (n, 34) and their scales (n,)."""
    values: Floats = scales[:, None] * blocks[:, 2:].view(np.int8).astype(np.float32)
    return values


def q5_0(blocks: Bytes, scales: Floats) -> Floats:
    """Return values (n, 32) of blocks (n, 22) and their scales (n,)."""
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    codes = _nibbles(blocks[:, 6:]) + 16 * fifth.astype(np.int32)
    values: Floats = scales[:, None] * (codes - 16).astype(np.float32)
    return values


def q4_k(blocks: Bytes, scales: Floats, minima: Floats) -> Floats:
    """Return values (n, 256) of blocks (n, 144), their scales and minima (n,)."""
    first, second, third = (blocks[:, at : at + 4].astype(np.int32) for at in (4, 8, 12))
    steps = np.concatenate([first & 63, (third & 15) + (first >> 6) * 16], axis=1)
    least = np.concatenate([second & 63, (third >> 4) + (second >> 6) * 16], axis=1)
    codes = np.concatenate([_nibbles(blocks[:, at : at + 32]) for at in range(16, 144, 32)], axis=1)
    scaled = (scales[:, None] * steps.astype(np.float32))[:, :, None] * codes.reshape(-1, 8, 32).astype(np.float32)
    values: Floats = scaled - (minima[:, None] * least.astype(np.float32))[:, :, None]
    return values.reshape(-1, 256)


def q6_k(blocks: Bytes, scales: Floats) -> Floats:
    """Return values (n, 256) of blocks (n, 210) and their scales (n,)."""
    low = np.concatenate([_nibbles(blocks[:, at : at + 64]) for at in (0, 64)], axis=1)
    high = blocks[:, 128:192].astype(np.int32).reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6]).reshape(1, 1, 4, 1)
    codes = low + 16 * (high & 3).reshape(-1, 256) - 32
    steps = scales[:, None] * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values: Floats = np.repeat(steps, 16, axis=1) * codes.astype(np.float32)
    return values


def _nibbles(pairs: Bytes) -> NDArray[Any]:
    """Return the lower halves of bytes, then the upper ones."""
    return np.concatenate([pairs & 15, pairs >> 4], axis=1).astype(np.int32)
