"""How often does each magnitude occur in a matrix of 16-bit floats, and which is the greatest?"""

from typing import Any

import numba
import numpy as np

from cpu_kernels.jit.compiler import kernel, out, view
from cpu_kernels.quantize.intrinsics import above, four_items

MAGNITUDES = 1 << 15  # of any 16-bit float, the sign bit cleared


@kernel(numba.void(view(numba.uint16, 1), out(numba.uint32, 2)))
def count_magnitudes(bits, counts):
    """Count the magnitudes of 16-bit floats: counts[0, m] becomes the number of items with `bits & 0x7fff == m`.

    counts: uint32 (4, MAGNITUDES), zeros on entry; rows 1 to 3 are scratch.
    """
    # Neighbours often hold the same magnitude; four histograms keep one increment from waiting for the last. Four
    # weights a load: 0.53 ns a weight, 0.77 with a load each (Xeon with AVX-512).
    mask = np.uint64(0x7FFF)
    one = np.uint32(1)
    whole = bits.size // 4 * 4
    for i in range(0, whole, 4):
        four = four_items(bits, i)
        counts[0, four & mask] += one
        counts[1, (four >> np.uint64(16)) & mask] += one
        counts[2, (four >> np.uint64(32)) & mask] += one
        counts[3, (four >> np.uint64(48)) & mask] += one
    for i in range(whole, bits.size):
        counts[0, bits[i] & np.uint16(0x7FFF)] += np.uint32(1)
    for m in range(counts.shape[1]):
        counts[0, m] += counts[1, m] + counts[2, m] + counts[3, m]


def _greatest(bits, magnitude):
    greatest = bits.dtype.type(0)
    for i in range(bits.size):
        greatest = max(greatest, bits[i] & magnitude)
    return greatest


_GREATEST = {
    width: kernel(item(view(item, 1), item))(_greatest) for width, item in ((2, numba.uint16), (4, numba.uint32))
}


def greatest_magnitude(bits: Any) -> int:
    """Return the greatest magnitude pattern of flat uint16 or uint32 float patterns (0 if there are none)."""
    return int(_GREATEST[bits.itemsize](bits, bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)))


def _find_zeros(bits, magnitude, places):
    found = 0
    whole = bits.size // 64 * 64
    for start in range(0, whole, 64):
        # Nearly every word of 64 weights has none: one compare tells.
        if above(bits, start, magnitude, bits.dtype.type(0)) != np.uint64(0xFFFFFFFFFFFFFFFF):
            for i in range(start, start + 64):
                if bits[i] & magnitude == 0:
                    if found < places.size:
                        places[found] = i
                    found += 1
    for i in range(whole, bits.size):
        if bits[i] & magnitude == 0:
            if found < places.size:
                places[found] = i
            found += 1
    return found


_ZEROS = {
    width: kernel(numba.int64(view(item, 1), item, out(numba.uint64, 1)))(_find_zeros)
    for width, item in ((2, numba.uint16), (4, numba.uint32))
}


def find_zeros(bits: Any, places: Any) -> int:
    """Return how many of flat uint16 or uint32 float patterns are zero; places (uint64) takes the first of them."""
    return int(_ZEROS[bits.itemsize](bits, bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1), places))
