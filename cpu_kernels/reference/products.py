"""What the product kernels compute, in NumPy: quantization, exact integer sums, and their scaling in float64."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.matmul.activations import LEVELS, SEGMENT, Activations, Per


def quantize(x: NDArray[np.float32], bits: int, per: Per) -> Activations:
    """Quantize x (n, cols) symmetrically to integers of `bits` bits with a scale per token or 128 columns."""
    tokens, cols = x.shape
    segments = -(-cols // SEGMENT)
    padded = np.zeros((tokens, segments, SEGMENT), np.float32)
    padded.reshape(tokens, -1)[:, :cols] = x
    axes = (1, 2) if per == "token" else (2,)
    largest = np.abs(padded).max(axis=axes, keepdims=True)
    finite = np.isfinite(largest)
    level = np.float32(LEVELS[bits])
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(finite, level / largest, np.float32(0))
        step = np.where(finite, largest / level, np.float32(np.nan))
        step = np.where(np.isfinite(inverse), step, np.float32(0))
        inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
        product = np.where(inverse == 0, np.float32(0), padded * inverse)
    q = np.clip(np.rint(product), -level, level).astype(np.int8).reshape(tokens, -1)
    words = q.reshape(tokens, 2 * segments, 64).astype(np.int32)
    scale = np.ascontiguousarray(np.broadcast_to(step[:, :, 0], (tokens, segments)), np.float32)
    return Activations(cols, bits, q, scale, words.sum(2, dtype=np.int32), np.abs(words).sum(2, dtype=np.int32))


def signs(planes: NDArray[np.uint64], cols: int) -> NDArray[np.int64]:
    """Return the +1 and -1 (planes, rows, cols) that packed planes (planes, rows, words) stand for."""
    bits = np.unpackbits(np.ascontiguousarray(planes).view(np.uint8), axis=-1, bitorder="little", count=cols)
    return 2 * bits.astype(np.int64) - 1


def integer_sums(planes: NDArray[np.uint64], activations: Activations) -> NDArray[np.int64]:
    """Return the exact products (planes, n, rows, words) of the +-1 weights with q, summed per 64 columns."""
    count, rows, words = planes.shape
    weights = np.zeros((count, rows, 64 * words), np.int64)
    weights[:, :, : activations.cols] = signs(planes, activations.cols)
    q = activations.q[:, : 64 * words].astype(np.int64)
    sums: NDArray[np.int64] = np.einsum(
        "prwc,nwc->pnrw", weights.reshape(count, rows, words, 64), q.reshape(-1, words, 64)
    )
    return sums


def multiply(
    planes: NDArray[np.uint64],
    scale: NDArray[np.float32],
    block: int,
    cols: int,
    activations: Activations,
    offset: NDArray[np.float32] | None = None,
    plane_weights: Sequence[float] | None = None,
) -> NDArray[np.float64]:
    """Return the products (n, rows) with scale (planes, rows, blocks), or (rows, blocks) with plane_weights."""
    words = planes.shape[2]
    wide = scale.astype(np.float64)
    if plane_weights is not None:
        wide = np.array(plane_weights, np.float64)[:, None, None] * wide
    of_block = np.zeros(words, np.int64) if block >= cols else np.arange(words) * 64 // block
    steps = activations.scale.astype(np.float64)[:, np.arange(words) // 2]  # (n, words)
    sums = integer_sums(planes, activations) * steps[None, :, None]
    result: NDArray[np.float64] = np.einsum("pnrw,prw->nr", sums, wide[:, :, of_block])
    if offset is not None:
        totals = activations.sums[:, :words] * steps
        result = result + totals @ offset.astype(np.float64)[:, of_block].T
    return result
