"""Which values does each stretch of a row hold, where they are at most four, and which of its levels is each weight?"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from cpu_kernels.jit.compiler import kernel, out, view

F4, U1, U2, U4 = numba.float32, numba.uint8, numba.uint16, numba.uint32

MOST_LEVELS = 4  # a count of one more means: more than these


def _find_levels(bits, negative, top, cols, step, levels, counts):
    zero = bits.dtype.type(0)
    for row in range(levels.shape[0]):
        for unit in range(levels.shape[1]):
            start = row * cols + unit * step
            stop = row * cols + min(cols, (unit + 1) * step)
            # The next greater pattern each time: passes without branches, which vectorise.
            least = top
            for i in range(start, stop):
                value = zero if bits[i] == negative else bits[i]
                least = min(least, value)
            number = 0
            while least != top:
                if number == MOST_LEVELS:
                    number += 1
                    break
                levels[row, unit, number] = least
                number += 1
                following = top
                for i in range(start, stop):
                    value = zero if bits[i] == negative else bits[i]
                    following = min(following, value if value > least else top)
                least = following
            counts[row, unit] = number


def _merge_levels(levels, counts, factor, merged, merged_counts):
    for row in range(merged.shape[0]):
        for unit in range(merged.shape[1]):
            number = 0
            for part in range(unit * factor, min(levels.shape[1], (unit + 1) * factor)):
                if counts[row, part] > MOST_LEVELS:
                    number = MOST_LEVELS + 1
                    break
                for k in range(counts[row, part]):
                    value = levels[row, part, k]
                    known = False
                    for j in range(number):
                        known = known or merged[row, unit, j] == value
                    if known:
                        continue
                    if number == MOST_LEVELS:
                        number += 1
                        break
                    merged[row, unit, number] = value
                    number += 1
                if number > MOST_LEVELS:
                    break
            merged_counts[row, unit] = number


def _per_width(body: Callable[..., None], signature: Callable[[Any], Any]) -> dict[int, Callable[..., None]]:
    """Declare a kernel for two-byte and for four-byte items."""
    return {2: kernel(signature(U2))(body), 4: kernel(signature(U4))(body)}


_FIND = _per_width(
    _find_levels,
    lambda item: numba.void(view(item, 1), item, item, numba.int64, numba.int64, out(item, 3), out(U1, 2)),
)
_MERGE = _per_width(
    _merge_levels,
    lambda item: numba.void(view(item, 3), view(U1, 2), numba.int64, out(item, 3), out(U1, 2)),
)


def find_levels(bits: Any, cols: int, step: int, levels: Any, counts: Any) -> None:
    """Find the different values of every `step` columns of a row, -0 being 0.

    bits: uint16 or uint32 float patterns (rows * cols); levels: the same dtype (rows, units, 4), counts: uint8 (rows,
    units). Of a unit with more than four values the count is five, and its levels are four of them.
    """
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    _FIND[bits.itemsize](bits, sign, np.iinfo(bits.dtype).max, cols, step, levels, counts)


def merge_levels(levels: Any, counts: Any, factor: int, merged: Any, merged_counts: Any) -> None:
    """Join `factor` neighbouring units to one; arrays as of `find_levels`, merged ones with fewer units."""
    _MERGE[levels.itemsize](levels, counts, factor, merged, merged_counts)


@kernel(numba.int64(view(F4, 2), numba.int64, view(F4, 3), out(U1, 2)))
def level_codes(weights, step, levels, codes):
    """Write which level of its unit each weight is, the first of equal ones, and return how many are none of them.

    weights: float32 (rows, cols); levels: float32 (rows, units of `step` columns, levels); codes: uint8 (rows, cols).
    """
    missing = 0
    for row in range(weights.shape[0]):
        for unit in range(levels.shape[1]):
            start = unit * step
            stop = min(weights.shape[1], start + step)
            for col in range(start, stop):
                code = np.uint8(255)
                for k in range(levels.shape[2] - 1, -1, -1):
                    code = np.uint8(k) if weights[row, col] == levels[row, unit, k] else code
                codes[row, col] = code
            for col in range(start, stop):
                missing += codes[row, col] == np.uint8(255)
    return missing
