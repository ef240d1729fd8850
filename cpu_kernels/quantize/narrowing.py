"""Where can the limits of the best groups of a large float32 matrix lie? Counts by bit pattern, and rows of windows.

Float32 magnitudes sort as their bit patterns do. A *cell* is a range of 2 ** shift patterns, with a shift for each
*octave*, the patterns of one exponent; cells in which no limit can lie stay whole, the others are counted again in 8
parts. `narrowed_groups` in the methods runs this to single patterns.
"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import inline, kernel, out, view
from cpu_kernels.quantize.intrinsics import above, lowest_bit

F4, F8, I1, I4, I8 = numba.float32, numba.float64, numba.int8, numba.int32, numba.int64
U1, U4, U8 = numba.uint8, numba.uint32, numba.uint64

PARTS_SHIFT = 3
MAGNITUDE = np.uint32(0x7FFFFFFF)
OCTAVE_SHIFT = 23
OCTAVES = 256
WIDEST_SHIFT = 18  # of cells that are counted
MOST_COUNTED = 1 << 20  # weights: their number and the sum of their places in an octave fit one 64-bit integer
_NUMBER_SHIFT = 43
LOOKUP_SHIFT = 15
_WORD = 64
_LANES = 16


@inline
def _cell(key, shifts, first):
    """Return the number of the cell that a magnitude is in."""
    octave = key >> np.uint32(OCTAVE_SHIFT)
    return np.uint32(first[octave] + (key >> shifts[octave]))  # without sign: an index that may be negative is slower


@kernel(I8(view(U4, 1), view(U4, 1), view(U4, 1), out(U8, 1), out(I4, 1), out(F8, 2)))
def count_cells(bits, shifts, first, scratch, cells, sums):
    """Count float32 magnitudes by cells of 2 ** shift patterns (at most 2 ** WIDEST_SHIFT); return how many hold any.

    bits: uint32 (at most MOST_COUNTED). shifts: uint32 (256), of each octave; first: uint32 (256), what is added to
    `magnitude >> shift` there, modulo 2 ** 32, to make the cells' numbers. scratch: uint64 (cells of all octaves),
    zeros on entry and after it. cells: int32, become the numbers of these cells; sums: float64 (2, cells), how many
    patterns are in each, and the sum of their places in the octave.
    """
    # One addition a weight for both sums.
    one = np.uint64(1 << _NUMBER_SHIFT)
    for i in range(bits.size):
        key = bits[i] & MAGNITUDE
        scratch[_cell(key, shifts, first)] += one | np.uint64(key & np.uint32((1 << OCTAVE_SHIFT) - 1))
    found = 0
    for cell in range(scratch.size):
        both = scratch[cell]
        if both:
            cells[found] = cell
            sums[0, found] = np.float64(both >> np.uint64(_NUMBER_SHIFT))
            sums[1, found] = np.float64(both & np.uint64((1 << _NUMBER_SHIFT) - 1))
            found += 1
            scratch[cell] = np.uint64(0)
    return found


@kernel(F8(view(F4, 1)))
def sum_of_squares(values):
    """Return the sum of squares, in float64 and always in the same order."""
    sums = np.zeros(_LANES)
    whole = values.size // _LANES * _LANES
    for i in range(0, whole, _LANES):
        for lane in range(_LANES):
            value = np.float64(values[i + lane])
            sums[lane] += value * value
    total = 0.0
    for i in range(whole, values.size):
        total += np.float64(values[i]) * np.float64(values[i])
    for lane in range(_LANES):
        total += sums[lane]
    return total


@inline
def _part(key, slot, shift, table):
    """Count a pattern in its part of a cell that is split; return the part."""
    part = np.int64(slot) << PARTS_SHIFT | np.int64(key >> shift & np.uint32((1 << PARTS_SHIFT) - 1))
    place = np.uint64(key & np.uint32((np.uint32(1) << shift) - np.uint32(1)))
    table[part, 0] += np.uint64(1)
    table[part, 1] += place
    table[part, 2] += place * place
    return part


@inline
def _inside(bits, begin, low, high):
    """Return which of 64 magnitudes are in one of the ranges of patterns above low up to high, as bits of a word."""
    word = np.uint64(0)
    for r in range(low.size):
        word |= above(bits, begin, MAGNITUDE, low[r]) & ~above(bits, begin, MAGNITUDE, high[r])
    return word


@kernel(I8(view(U4, 1), view(U4, 1), view(U4, 1), view(I1, 1), view(I1, 1), view(U4, 1), view(U4, 1), out(U4, 1)))
def find_keys(bits, shifts, first, split, near, low, high, keys):
    """Find the non-zero magnitudes of the cells that are split; return how many.

    shifts, first: as in `count_cells`; split: int8 (cells), 1 for a cell that is split, else 0; near: int8 (2 **
    (31 - LOOKUP_SHIFT)), 1 for a range of 2 ** LOOKUP_SHIFT patterns that has patterns of such a cell, else 0. low,
    high: the non-zero patterns of these cells as ranges, above low up to high, if they are few; empty otherwise. keys:
    uint32 (n + 1), become the magnitudes.
    """
    found = 0
    whole = bits.size // _WORD * _WORD if low.size else 0
    for begin in range(0, whole, _WORD):  # 0.3 ns a weight where one range is narrow; a lookup for each takes 1 ns
        word = _inside(bits, begin, low, high)
        while word:
            keys[found] = bits[begin + lowest_bit(word)] & MAGNITUDE
            found += 1
            word &= word - np.uint64(1)
    # A lookup by a fixed shift first: the cell's own takes 2 ns.
    maybe = found
    for i in range(whole, bits.size):
        key = bits[i] & MAGNITUDE
        keys[maybe] = key
        maybe += near[key >> np.uint32(LOOKUP_SHIFT)]
    for i in range(found, maybe):
        key = keys[i]
        keys[found] = key
        found += np.int64(split[_cell(key, shifts, first)] & (key != 0))
    return found


@kernel(numba.void(view(U4, 1), view(U4, 1), view(U4, 1), view(I4, 1), view(U4, 1), out(U8, 2), out(I4, 1)))
def split_first(keys, shifts, first, slots, part_shifts, table, parts):
    """Count magnitudes in the parts of their cells.

    shifts, first: as in `count_cells`. slots: int32 (cells), which rows of the table a cell's parts have. part_shifts:
    uint32 (slots): a part has 2 ** shift patterns. table: uint64 (8 * slots, 3), zeros on entry; becomes the number,
    the sum and the sum of squares of the patterns' places in the part. parts: become the magnitudes' rows.
    """
    for i in range(keys.size):
        slot = slots[_cell(keys[i], shifts, first)]
        parts[i] = _part(keys[i], slot, part_shifts[slot], table)


@kernel(I8(out(U4, 1), out(I4, 1), view(I4, 1), view(U4, 1), out(U8, 2)))
def split_again(keys, parts, slots, part_shifts, table):
    """Do what `split_first` does for the parts that are split further, in place; return how many are left.

    slots: int32 (parts), -1 for parts that stay whole.
    """
    found = 0
    for i in range(keys.size):
        slot = slots[parts[i]]
        if slot >= 0:
            key = keys[i]
            keys[found] = key
            parts[found] = _part(key, slot, part_shifts[slot], table)
            found += 1
    return found


@kernel(numba.void(view(U4, 1), view(U4, 1), U1, out(U1, 1)))
def codes_by_limits(bits, upper, zero_code, codes):
    """Write how many of the limits each float32 magnitude is above, `zero_code` for zeros.

    bits: uint32 (n); upper: uint32 (at most 255), ascending: the greatest pattern of each group but the last; codes:
    uint8 (n).
    """
    # A lookup by cell tells the limits below the cell, and the first in it: 0.6 ns a weight, for any number of limits.
    cells = 1 << 31 - LOOKUP_SHIFT
    below, inside = np.empty(cells, np.uint8), np.empty(cells, np.uint32)
    limit = 0
    for cell in range(cells):
        last = np.uint32(cell << LOOKUP_SHIFT | (1 << LOOKUP_SHIFT) - 1)
        below[cell] = limit
        inside[cell] = upper[limit] if limit < upper.size and upper[limit] < last else last
        while limit < upper.size and upper[limit] <= last:
            limit += 1
    for i in range(bits.size):
        key = bits[i] & MAGNITUDE
        cell = key >> np.uint32(LOOKUP_SHIFT)
        codes[i] = below[cell] + np.uint8(key > inside[cell])
    # Where a cell has several limits, its magnitudes above the first look on.
    several = False
    for limit in range(1, upper.size):
        several |= upper[limit] >> np.uint32(LOOKUP_SHIFT) == upper[limit - 1] >> np.uint32(LOOKUP_SHIFT)
    if several:
        for i in range(bits.size):
            while codes[i] < upper.size and (bits[i] & MAGNITUDE) > upper[codes[i]]:
                codes[i] += np.uint8(1)
    for i in range(bits.size):
        codes[i] = zero_code if (bits[i] & MAGNITUDE) == 0 else codes[i]
