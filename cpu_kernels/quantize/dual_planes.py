"""Two {0, 1} planes with a positive and a negative scale: which step to begin with, and which planes fit the scales?"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import kernel, out, view

F4, F8, U1 = numba.float32, numba.float64, numba.uint8

TRIALS = 24  # steps tried, evenly spaced up to the greatest magnitude


@kernel(numba.void(view(F4, 2), numba.int64, out(F4, 2)))
def rounding_steps(weights, block, steps):
    """Find the step s of every row-block whose levels -s, 0, s and 2 s are nearest to its weights, in squared error.

    weights: float32 (rows, cols); steps: float32 (rows, blocks), overwritten. Tried are TRIALS shares of the greatest
    magnitude; the best of them is fitted to the weights as they were rounded with it.
    """
    for row in range(weights.shape[0]):
        for b in range(steps.shape[1]):
            start = b * block
            stop = min(start + block, weights.shape[1])
            greatest = np.float32(0.0)
            for col in range(start, stop):
                greatest = max(greatest, abs(weights[row, col]))
            best = np.float32(0.0)
            gained = np.float32(0.0)
            for trial in range(1, TRIALS + 1):
                step = greatest * np.float32(trial) / np.float32(TRIALS)
                if not step > np.float32(0.0):
                    break
                inverse = np.float32(1.0) / step
                along = np.float32(0.0)
                squares = np.float32(0.0)
                for col in range(start, stop):
                    level = min(np.float32(2.0), max(np.float32(-1.0), np.rint(weights[row, col] * inverse)))
                    along += level * weights[row, col]
                    squares += level * level
                # Fitted to these levels, the step leaves |w| ** 2 - along ** 2 / squares.
                if along > np.float32(0.0) and along * along > gained * squares:
                    gained = along * along / squares
                    best = along / squares
            steps[row, b] = best


@kernel(F8(view(F4, 2), numba.int64, view(F4, 2), view(F4, 2), out(U1, 2)))
def dual_planes(weights, block, large, small, codes):
    """Write b1 + 2 * b2 of every weight for scales a1 (large) and a2 (small), and return the squared error.

    weights: float32 (rows, cols); large, small: float32 (rows, blocks), of any sign; codes: uint8 (rows, cols),
    overwritten. b1 * a1 + b2 * a2 is the nearest of 0, a1, a2 and a1 + a2. Of two that are equally near it is the one
    with fewer ones; of a1 and a2 the one of smaller magnitude.

    Let a be the scale of greater magnitude (a1 where both have the same) and b the other. Seen in the direction of a,
    the levels 0 and b lie before a and a + b, so a is in beyond half of a + b; then b is in where the rest lies beyond
    b / 2 in the direction of b. Where a1 >= 0 >= a2 and a1 + a2 >= 0 these are the paper's formulas.
    """
    error = 0.0
    one, half = np.float32(1.0), np.float32(0.5)
    for row in range(weights.shape[0]):
        for unit in range(large.shape[1]):
            first, second = large[row, unit], small[row, unit]
            first_way = -one if first < np.float32(0.0) else one
            second_way = one if second > np.float32(0.0) else -one
            first_code, second_code = np.uint8(1), np.uint8(2)
            if abs(second) > abs(first):
                first, second = second, first
                first_way, second_way = second_way, first_way
                first_code, second_code = second_code, first_code
            first_limit, second_limit = first_way * ((first + second) * half), second_way * (second * half)
            start = unit * block
            for col in range(start, min(start + block, weights.shape[1])):
                rest = weights[row, col]
                code = np.uint8(0)
                if first_way * rest > first_limit:
                    code = first_code
                    rest -= first
                if second_way * rest > second_limit:
                    code |= second_code
                    rest -= second
                codes[row, col] = code
                error += np.float64(rest) * np.float64(rest)
    return error
