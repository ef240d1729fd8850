"""Which of 2 ** bits evenly spaced levels is nearest to each weight of a row-block?"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import kernel, out, view

F4, F8, U1 = numba.float32, numba.float64, numba.uint8


@kernel(numba.void(view(F4, 2), numba.int64, out(F4, 3)))
def block_ranges(weights, block, ranges):
    """Find the least and the greatest weight of every row-block.

    weights: float32 (rows, cols); ranges: float32 (2, rows, blocks), overwritten.
    """
    for row in range(weights.shape[0]):
        for b in range(ranges.shape[2]):
            start = b * block
            least = weights[row, start]
            most = least
            for col in range(start, min(start + block, weights.shape[1])):
                value = weights[row, col]
                least = value if value < least else least
                most = value if value > most else most
            ranges[0, row, b] = least
            ranges[1, row, b] = most


@kernel(F8(view(F4, 2), numba.int64, F4, view(F4, 3), out(U1, 2)))
def nearest_levels(weights, block, top, coef, codes):
    """Write the code of the nearest level, offset + scale * (2 * code - top), and return the squared error.

    weights: float32 (rows, cols); coef: float32 (2, rows, blocks), scale and offset; codes: uint8 (rows, cols).
    """
    error = 0.0
    for row in range(weights.shape[0]):
        for b in range(coef.shape[2]):
            scale, offset = coef[0, row, b], coef[1, row, b]
            inverse = np.float32(0.5) / scale if scale > np.float32(0.0) else np.float32(0.0)
            middle = np.float32(0.5) * top if scale > np.float32(0.0) else np.float32(0.0)
            start = b * block
            stop = min(start + block, weights.shape[1])
            for col in range(start, stop):
                code = np.rint((weights[row, col] - offset) * inverse + middle)
                code = max(np.float32(0.0), min(top, code))
                codes[row, col] = np.uint8(code)
            for col in range(start, stop):
                level = offset + scale * (np.float32(2.0) * np.float32(codes[row, col]) - top)
                apart = np.float64(weights[row, col]) - np.float64(level)
                error += apart * apart
    return error
