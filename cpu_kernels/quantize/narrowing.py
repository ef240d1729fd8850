"""Where can the limits of the best groups of a large float32 matrix lie? Counts by bit pattern, and rows of windows.

Float32 magnitudes sort as their bit patterns do. A *cell* is a range of 2 ** shift patterns; cells in which no limit
can lie stay whole, the others are counted again in 32 parts. `narrowed_groups` in the methods runs this to single
patterns.
"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import inline, kernel, out, view

F8, I4, I8, U1, U4, U8 = numba.float64, numba.int32, numba.int64, numba.uint8, numba.uint32, numba.uint64

FIRST_SHIFT = 15  # of the patterns without their sign: 65,536 cells
PARTS_SHIFT = 5
MAGNITUDE = np.uint32(0x7FFFFFFF)
_TILE = 2048


@kernel(U8(view(U4, 1), out(U8, 2)))
def count_cells(bits, table):
    """Count float32 magnitudes by cells of 2 ** FIRST_SHIFT patterns and return how many are zero.

    table: uint64 (65,536, 3), zeros on entry; becomes the number, the sum and the sum of squares of the patterns'
    places in their cell, which are exact (up to 2 ** 34 weights).
    """
    zeros = np.uint64(0)
    for i in range(bits.size):
        key = bits[i] & MAGNITUDE
        place = np.uint64(key & np.uint32((1 << FIRST_SHIFT) - 1))
        cell = key >> np.uint32(FIRST_SHIFT)
        table[cell, 0] += np.uint64(1)
        table[cell, 1] += place
        table[cell, 2] += place * place
        zeros += np.uint64(key == 0)
    return zeros


@inline
def _part(key, slot, shift, table):
    """Count a pattern in its part of a cell that is split; return the part."""
    part = np.int64(slot) << PARTS_SHIFT | np.int64(key >> np.uint32(shift) & np.uint32((1 << PARTS_SHIFT) - 1))
    place = np.uint64(key & np.uint32((1 << shift) - 1))
    table[part, 0] += np.uint64(1)
    table[part, 1] += place
    table[part, 2] += place * place
    return part


@kernel(I8(view(U4, 1), view(I4, 1), I8, out(U8, 2), out(U4, 1), out(I4, 1)))
def split_first(bits, slots, shift, table, keys, parts):
    """Count the magnitudes of the cells that are split in their parts of 2 ** shift patterns; return how many.

    slots: int32 (65,536), which rows of the table a cell's parts have, -1 for cells that stay whole. table: uint64
    (32 * cells split, 3), as in `count_cells`. keys, parts: become the non-zero magnitudes and their rows.
    """
    found = 0
    for i in range(bits.size):
        key = bits[i] & MAGNITUDE
        slot = slots[key >> np.uint32(FIRST_SHIFT)]
        if slot >= 0 and key != 0:
            keys[found] = key
            parts[found] = _part(key, slot, shift, table)
            found += 1
    return found


@kernel(I8(out(U4, 1), out(I4, 1), view(I4, 1), I8, out(U8, 2)))
def split_again(keys, parts, slots, shift, table):
    """Do what `split_first` does for the parts that are split further, in place; return how many are left."""
    found = 0
    for i in range(keys.size):
        slot = slots[parts[i]]
        if slot >= 0:
            key = keys[i]
            keys[found] = key
            parts[found] = _part(key, slot, shift, table)
            found += 1
    return found


@inline
def _spread(count, first, second, start, end):
    """Return the sum of squared distances to their mean of atoms start .. end - 1; 0 where there are none."""
    if end <= start:
        return 0.0
    total = first[end] - first[start]
    return max(0.0, (second[end] - second[start]) - total * total / (count[end] - count[start]))


@kernel(
    numba.void(
        view(F8, 1), view(F8, 1), view(F8, 1), view(I8, 1), view(I8, 1), I8, view(F8, 2), out(F8, 2), out(I4, 2)
    )
)  # fmt: skip
def window_rows(count, first, second, low, high, empty, less, costs, choices):
    """Find the least cost of the groups left of each limit that lies in its window of edges between atoms.

    low, high: int64 (limits), the first and the last edge of each limit. empty: 1 where groups may be empty, else 0.
    less, costs, choices: (limits, widest window). less[r, j]: how much less it costs to have limit r at low[r] + j.
    costs, choices: become the least cost of all groups to the left, and the edge of limit r - 1 for it.
    The cost obeys the quadrangle inequality whatever `less` is, so that the best edge of the limit before never moves
    left: divide and conquer, as in `grouping.next_row`.
    """
    stack = np.empty((128, 4), np.int64)
    for j in range(low[0], high[0] + 1):
        costs[0, j - low[0]] = _spread(count, first, second, 0, j) - less[0, j - low[0]]
    for r in range(1, low.size):
        stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = low[r], high[r], low[r - 1], high[r - 1]
        depth = 1
        while depth > 0:
            depth -= 1
            begin, end, left, right = stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3]
            middle = (begin + end) // 2
            least = np.inf
            start = left
            for i in range(left, min(right, middle - 1 + empty) + 1):
                cost = costs[r - 1, i - low[r - 1]] + _spread(count, first, second, i, middle)
                if cost < least:
                    least = cost
                    start = i
            costs[r, middle - low[r]] = least - less[r, middle - low[r]]
            choices[r, middle - low[r]] = start
            if begin < middle:
                stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = begin, middle - 1, left, start
                depth += 1
            if middle < end:
                stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = middle + 1, end, start, right
                depth += 1


@kernel(numba.void(view(U4, 1), view(U4, 1), U1, out(U1, 1)))
def codes_by_limits(bits, upper, zero_code, codes):
    """Write how many of the limits each float32 magnitude is above, `zero_code` for zeros.

    bits: uint32 (n); upper: uint32 (groups - 1), the greatest pattern of each group but the last; codes: uint8 (n).
    """
    for begin in range(0, bits.size, _TILE):
        end = min(begin + _TILE, bits.size)
        for i in range(begin, end):
            codes[i] = 0
        for group in range(upper.size):
            limit = upper[group]
            for i in range(begin, end):
                codes[i] += np.uint8((bits[i] & MAGNITUDE) > limit)
        for i in range(begin, end):
            codes[i] = zero_code if (bits[i] & MAGNITUDE) == 0 else codes[i]
