"""Which signs of a factor should change? Coordinate descent on a quadratic error, a row of signs after the other.

A row i of signs (r) stands for scale[i] * signs[i]; Z is all of them. The error is
tr(Z gram Z^T coupling) - 2 tr(Z target^T); `gradient` is half its gradient, coupling Z gram - target.
"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import kernel, out, view

F4, I1 = numba.float32, numba.int8


@kernel(
    numba.int64(out(I1, 2), view(F4, 1), out(F4, 2), view(F4, 2), view(F4, 2), out(F4, 2), numba.int64)
)  # fmt: skip
def flip_signs(signs, scale, gradient, gram, coupling, changes, passes):
    """Flip every sign that lowers the error when it is looked at, and return how many flips there were.

    signs: int8 (n, r), overwritten. scale: float32 (n,). gradient: float32 (n, r), kept up to date. gram: (r, r),
    symmetric. coupling: (n, n), symmetric, or (0, 0) for rows that do not depend on each other. changes: (n, r),
    overwritten: the change of Z gram, for rows outside of these. passes: at most over a row, until nothing flips.
    """
    count, rank = signs.shape
    own = np.float32(1)
    flips = 0
    for i in range(count):
        row, slope, change = signs[i], gradient[i], changes[i]
        for k in range(rank):
            change[k] = np.float32(0)
        if coupling.shape[0]:
            own = coupling[i, i]
        for _ in range(passes):
            before = flips
            for k in range(rank):
                # The change of Z at this place, and of the error: 2 step slope + step^2 gram own.
                step = np.float32(np.float32(-2) * scale[i] * np.float32(row[k]))
                if step * (np.float32(2) * slope[k] + step * gram[k, k] * own) < np.float32(0):
                    row[k] = np.int8(-row[k])
                    flips += 1
                    weights = gram[k]
                    felt = np.float32(step * own)
                    for j in range(np.uint64(rank)):
                        slope[j] += felt * weights[j]
                        change[j] += step * weights[j]
            if flips == before:
                break
        for later in range(coupling.shape[0]):
            if later != i:
                other, share = gradient[later], coupling[later, i]
                for j in range(np.uint64(rank)):
                    other[j] += share * change[j]
    return flips
