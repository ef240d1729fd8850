"""What is the best split of every row-block's magnitudes into two groups? Sorted side by side, one lane a row.

32 rows are sorted at once by Batcher's network (lane-wise minimum and maximum of whole vectors), then all splits are
tried with running sums: no branch depends on the data.
"""

import functools
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from cpu_kernels.jit.compiler import inline, kernel, out, view
from cpu_kernels.jit.llvm import as_float32
from cpu_kernels.quantize.intrinsics import LANES, order_rows

F8, U2, U4 = numba.float64, numba.uint16, numba.uint32


@functools.cache
def sorting_network(size: int) -> NDArray[np.int64]:
    """Return the comparators (pairs of positions) of Batcher's odd-even merge sort for a power of two.

    int64 (comparators, 2). Source: Batcher 1968; Knuth, The Art of Computer Programming, 5.2.2, Algorithm M.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"size {size} is not a power of two")
    pairs = []
    span = 1
    while span < size:
        step = span
        while step >= 1:
            for start in range(step % span, size - step, 2 * step):
                for i in range(start, start + min(step, size - start - step)):
                    if i // (2 * span) == (i + step) // (2 * span):
                        pairs.append((i, i + step))
            step //= 2
        span *= 2
    return np.array(pairs, np.int64).reshape(-1, 2)


@inline
def gather_magnitudes(bits, magnitude, cols, row, rows, start, length, keys):
    """Put the magnitudes of columns start .. start + length - 1 of LANES rows into the columns of keys, padded high."""
    for lane in range(LANES):
        base = min(row + lane, rows - 1) * cols + start
        for j in range(length):
            keys[j, lane] = bits[base + j] & magnitude
    for j in range(length, keys.shape[0]):
        for lane in range(LANES):
            keys[j, lane] = magnitude


@inline
def _sums(keys, shift, length, total, squares):
    total[:] = 0.0
    squares[:] = 0.0
    for j in range(length):
        for lane in range(LANES):
            value = np.float64(as_float32(np.uint32(keys[j, lane]) << shift))
            total[lane] += value
            squares[lane] += value * value


@inline
def _normalized_lambda(keys, shift, length, share, total, lam):
    """Set lam to n (l_min + share (l_max - l_min)) per lane: the normalised objective of the paper, times n."""
    half = length // 2
    low = np.zeros(LANES)
    for j in range(half):
        for lane in range(LANES):
            low[lane] += np.float64(as_float32(np.uint32(keys[j, lane]) << shift))
    for lane in range(LANES):
        if half > 0:
            smallest = np.float64(as_float32(np.uint32(keys[0, lane]) << shift))
            gap = np.float64(as_float32(np.uint32(keys[1, lane]) << shift)) - smallest
            apart = (total[lane] - low[lane]) / (length - half) - low[lane] / half
            least = gap * gap / (3.0 * length)
            lam[lane] = length * (least + share * (length * apart * apart / 12.0 - least))
        else:
            lam[lane] = 0.0


@inline
def _best_split(keys, shift, length, inverse, lam, total, running, score, cut, low):
    """Find the split of least cost per lane: cut magnitudes in the small group, whose sum is low."""
    for lane in range(LANES):
        running[lane] = 0.0
        score[lane] = (total[lane] * total[lane] - lam[lane]) * inverse[length]
        cut[lane] = length
        low[lane] = total[lane]
    for j in range(length - 1):
        left = inverse[j + 1]
        right = inverse[length - 1 - j]
        for lane in range(LANES):
            here = running[lane] + np.float64(as_float32(np.uint32(keys[j, lane]) << shift))
            rest = total[lane] - here
            running[lane] = here
            # Cost is (sum of squares) minus this; equal magnitudes stay in one group.
            gain = (here * here - lam[lane]) * left + (rest * rest - lam[lane]) * right
            better = (gain > score[lane]) & (keys[j, lane] != keys[j + 1, lane])
            score[lane] = gain if better else score[lane]
            cut[lane] = j + 1 if better else cut[lane]
            low[lane] = here if better else low[lane]


def _split_blocks(bits, magnitude, shift, cols, block, network, lam, normalized, thresholds, sums):
    rows, blocks = thresholds.shape
    keys = np.empty((block, LANES), bits.dtype)
    total, squares, running, score, low = (
        np.empty(LANES),
        np.empty(LANES),
        np.empty(LANES),
        np.empty(LANES),
        np.empty(LANES),
    )
    lams = np.full(LANES, lam)
    cut = np.empty(LANES, np.int64)
    inverse = np.empty(block + 1)
    inverse[0] = 0.0
    for j in range(1, block + 1):
        inverse[j] = 1.0 / j
    for row in range(0, rows, LANES):
        for b in range(blocks):
            length = min(block, cols - b * block)
            gather_magnitudes(bits, magnitude, cols, row, rows, b * block, length, keys)
            for pair in range(network.shape[0]):
                order_rows(keys, network[pair, 0], network[pair, 1])
            _sums(keys, shift, length, total, squares)
            if normalized:
                _normalized_lambda(keys, shift, length, lam, total, lams)
            _best_split(keys, shift, length, inverse, lams, total, running, score, cut, low)
            for lane in range(min(LANES, rows - row)):
                thresholds[row + lane, b] = keys[cut[lane] - 1, lane]
                sums[0, row + lane, b] = cut[lane]
                sums[1, row + lane, b] = low[lane]
                sums[2, row + lane, b] = total[lane] - low[lane]
                sums[3, row + lane, b] = squares[lane]


_SPLIT = {
    width: kernel(
        numba.void(
            view(item, 1), item, numba.uint32, numba.int64, numba.int64, view(numba.int64, 2), F8, numba.boolean,
            out(item, 2), out(F8, 3),
        )
    )(_split_blocks)
    for width, item in ((2, U2), (4, U4))
}  # fmt: skip


def split_blocks(bits: Any, cols: int, block: int, lam: float, normalized: bool, thresholds: Any, sums: Any) -> None:
    """Split the magnitudes of every row-block into at most two groups of least cost.

    bits: uint16 (bfloat16) or uint32 (float32) bit patterns (rows * cols), finite; block: a power of two.
    thresholds: same dtype (rows, blocks), becomes the greatest magnitude of the small group (of all, if one group).
    sums: float64 (4, rows, blocks), becomes the small group's size, its sum, the large group's sum, the sum of squares.
    Source: Algorithm 1 (exact) with two groups.
    """
    item = bits.dtype.type
    magnitude = item((1 << (8 * bits.itemsize - 1)) - 1)
    shift = np.uint32(32 - 8 * bits.itemsize)
    _SPLIT[bits.itemsize](
        bits, magnitude, shift, cols, block, sorting_network(block), lam, normalized, thresholds, sums
    )
