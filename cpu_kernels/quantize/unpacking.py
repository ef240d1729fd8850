"""How do planes and coefficients become weights again?

W[r, c] = sum over terms t of coef[t, r, c // block] * product of the +-1 planes in term t, at (r, c)
"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import kernel, out, view
from cpu_kernels.jit.llvm import as_float32
from cpu_kernels.quantize.intrinsics import add_signed

U8, F4 = numba.uint64, numba.float32
_I13, _KEPT, _FIELD, _LARGEST = (np.int32(number) for number in (13, -0x70002000, 0x0F800000, 0x70000000))


@kernel(numba.void(view(U8, 3), view(F4, 3), view(U8, 1), numba.int64, out(F4, 2)))
def expand(planes, coef, terms, block, weights):
    """Compute the weights that planes stand for, summed in float32 in the order of the terms.

    planes: uint64 (planes, rows, words); coef: float32 (terms, rows or 1, blocks or 1); terms: uint64 bit masks over
    planes; block: columns per coefficient, a multiple of 64 or at least cols; weights: float32 (rows, cols).
    """
    rows, cols = weights.shape
    flat = weights.reshape(rows * cols)
    buffer = np.empty(64, np.float32)
    # Loops, because an assignment of a slice to a slice takes Numba 4 seconds to compile.
    for i in range(flat.size):
        flat[i] = np.float32(0.0)
    one_row = coef.shape[1] == 1
    for row in range(rows):
        coef_row = 0 if one_row else row
        for word in range(planes.shape[2]):
            start = row * cols + 64 * word
            length = min(64, cols - 64 * word)
            b = 64 * word // block
            if length < 64:
                for i in range(64):
                    buffer[i] = np.float32(0.0)
            for t in range(terms.size):
                # The product of planes is +1 where an even number of them is -1: an exclusive or, begun with all ones.
                signs = np.uint64(0xFFFFFFFFFFFFFFFF)
                for plane in range(planes.shape[0]):
                    if (terms[t] >> np.uint64(plane)) & np.uint64(1):
                        signs ^= ~planes[plane, row, word]
                if length == 64:
                    add_signed(flat, start, signs, coef[t, coef_row, b])
                else:
                    add_signed(buffer, 0, signs, coef[t, coef_row, b])
            if length < 64:
                for i in range(length):
                    flat[start + i] = buffer[i]


@kernel(numba.void(view(U8, 3), view(F4, 1), out(F4, 2)))
def look_up_levels(planes, levels, weights):
    """Look up the weights of planes whose coefficients the whole matrix shares: one level for each pattern of bits.

    planes: uint64 (at most 16 planes, rows, words); levels: float32 (2 ** planes), where bit p of a place is the bit of
    plane p; weights: float32 (rows, cols), overwritten. As `expand`, in a time that does not grow with the terms.
    """
    cols = weights.shape[1]
    codes = np.empty(64, np.uint64)
    for row in range(planes.shape[1]):
        for word in range(planes.shape[2]):
            for j in range(64):
                codes[j] = np.uint64(0)
            for plane in range(planes.shape[0]):
                bits = planes[plane, row, word]
                for j in range(64):
                    codes[j] |= ((bits >> np.uint64(j)) & np.uint64(1)) << np.uint64(plane)
            for j in range(min(64, cols - 64 * word)):
                weights[row, 64 * word + j] = levels[codes[j]]


@kernel(numba.void(view(numba.int16, 1), numba.float64, out(F4, 1)))
def widen(bits, factor, values):
    """Write values[i] = float16 number i times factor, rounded once; bits: their patterns (n), values: (n)."""
    for i in range(values.size):
        # Exponent and fraction moved into float32's fields are the number times 2 ** -112; a full exponent stays full.
        wide = np.int32(np.int32(np.int32(bits[i]) << _I13) & _KEPT)
        full = np.int32(wide & _FIELD) == _FIELD
        single = as_float32(np.uint32(wide | _LARGEST if full else wide))
        values[i] = np.float32(np.float64(single) * (factor if full else factor * 2.0**112))
