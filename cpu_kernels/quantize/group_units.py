"""How are the magnitudes of many row-blocks (or rows) grouped, by any solver and any number of groups?"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import inline, kernel, out, view
from cpu_kernels.quantize.grouping import merge_greedily, solve_exactly

F8, U1, U4 = numba.float64, numba.uint8, numba.uint32


@inline
def _radix_sort(keys, other, size, counts):
    """Sort `size` keys; returns whether the sorted ones are in `other`. A byte that all keys share costs one pass."""
    swapped = False
    for shift in range(0, 32, 8):
        source = other if swapped else keys
        target = keys if swapped else other
        counts[:] = 0
        for i in range(size):
            counts[(source[i] >> np.uint32(shift)) & np.uint32(0xFF)] += 1
        if counts[(source[0] >> np.uint32(shift)) & np.uint32(0xFF)] == size:
            continue
        total = 0
        for digit in range(256):
            total, counts[digit] = total + counts[digit], total
        for i in range(size):
            digit = (source[i] >> np.uint32(shift)) & np.uint32(0xFF)
            target[counts[digit]] = source[i]
            counts[digit] += 1
        swapped = not swapped
    return swapped


@inline
def _atoms(order, values, size, window, count, first, second):
    """Fill the prefix sums: an atom a distinct magnitude (window 0) or `window` magnitudes. Returns their number."""
    atoms = 0
    total = 0.0
    squares = 0.0
    count[0] = 0.0
    first[0] = 0.0
    second[0] = 0.0
    for i in range(size):
        value = np.float64(values[i])
        total += value
        squares += value * value
        last = i + 1 == size
        if last or (window > 0 and (i + 1) % window == 0) or (window == 0 and order[i + 1] != order[i]):
            atoms += 1
            count[atoms] = i + 1
            first[atoms] = total
            second[atoms] = squares
    return atoms


@inline
def _lambda(values, first, count, atoms, size, lam, normalized):
    """Return lambda, or n (l_min + lam (l_max - l_min)) for the normalised objective of the paper."""
    if not normalized:
        return lam
    half = size // 2
    if half == 0:
        return 0.0
    low = 0.0
    for i in range(half):
        low += np.float64(values[i])
    apart = (first[atoms] - low) / (size - half) - low / half
    gap = np.float64(values[1]) - np.float64(values[0])
    least = gap * gap / (3.0 * size)
    return size * (least + lam * (size * apart * apart / 12.0 - least))


@inline
def _group_of(key, upper, quota, groups):
    """Return the group of a key and take its place there: the first whose greatest key is not below it and has room."""
    low = 0
    high = groups - 1
    while low < high:
        middle = (low + high) // 2
        if key <= upper[middle]:
            high = middle
        else:
            low = middle + 1
    while key == upper[low] and quota[low] == 0:
        low += 1
    if key == upper[low]:
        quota[low] -= 1
    return low


@inline
def _assign(keys, size, order, count, bounds, groups, upper, quota, codes, base):
    """Write the group of every key. Of equal keys on both sides of a limit, the first in column order go below."""
    for group in range(groups):
        begin = int(count[bounds[group]])
        end = int(count[bounds[group + 1]])
        upper[group] = order[end - 1]
        place = end
        while place > begin and order[place - 1] == upper[group]:
            place -= 1
        quota[group] = end - place
    for i in range(size):
        codes[base + i] = _group_of(keys[i], upper, quota, groups)


@kernel(
    numba.void(
        view(U4, 1), numba.int64, numba.int64, numba.int64, numba.int64, numba.boolean, F8, numba.boolean,
        out(U1, 1), out(F8, 4),
    )
)  # fmt: skip
def group_units(bits, cols, block, most, window, exact, lam, normalized, codes, sums):
    """Group the magnitudes of every row-block of float32 weights into at most `most` groups.

    bits: uint32 (rows * cols), finite float32 patterns. block: columns of a row-block (cols for rows). exact:
    Algorithm 1, otherwise greedy merging of windows of `window` magnitudes (1: Algorithm 2, more: Algorithm 3).
    codes: uint8 (rows * cols), becomes the group of every weight, ascending in magnitude.
    sums: float64 (3, most, rows, blocks), becomes size, sum and sum of squares per group; empty groups are zero.
    """
    rows, blocks = sums.shape[2], sums.shape[3]
    keys, order, other = np.empty(block, np.uint32), np.empty(block, np.uint32), np.empty(block, np.uint32)
    counts = np.empty(256, np.int64)
    count, first, second = np.empty(block + 1), np.empty(block + 1), np.empty(block + 1)
    bounds = np.empty(max(most, 1) + 1, np.int64)
    upper, quota = np.empty(most, np.uint32), np.empty(most, np.int64)
    table = block + 1 if exact else 1
    solved, choices = np.empty((2, table)), np.empty((most + 1, table), np.int32)
    stack = np.empty((128, 4), np.int64)
    heap = 1 if exact else block // window + 2
    heap_keys, heap_places = np.empty(2 * heap), np.empty((2 * heap, 3), np.int32)
    ends, starts = np.empty(heap + 1, np.int32), np.empty(heap + 1, np.int32)
    sums[:] = 0.0
    for row in range(rows):
        for b in range(blocks):
            base = row * cols + b * block
            size = min(block, cols - b * block)
            for i in range(size):
                keys[i] = bits[base + i] & np.uint32(0x7FFFFFFF)
                order[i] = keys[i]
            ordered = other if _radix_sort(order, other, size, counts) else order
            values = ordered.view(np.float32)
            atoms = _atoms(ordered, values, size, 0 if exact else window, count, first, second)
            cost = _lambda(values, first, count, atoms, size, lam, normalized)
            if exact:
                groups = solve_exactly(count, first, second, atoms, cost, most, solved, choices, stack, bounds)
            else:
                groups = merge_greedily(
                    count, first, second, atoms, cost, most, heap_keys, heap_places, ends, starts, bounds
                )
            _assign(keys, size, ordered, count, bounds, groups, upper, quota, codes, base)
            for group in range(groups):
                sums[0, group, row, b] = count[bounds[group + 1]] - count[bounds[group]]
                sums[1, group, row, b] = first[bounds[group + 1]] - first[bounds[group]]
                sums[2, group, row, b] = second[bounds[group + 1]] - second[bounds[group]]


@kernel(numba.void(view(U4, 1), view(U4, 1), out(numba.int64, 1), out(U1, 1)))
def assign_groups(keys, upper, quota, codes):
    """Write the group of every magnitude key of a whole matrix, as `group_units` does for row-blocks.

    keys: uint32 (n); upper: uint32 (groups), the greatest key of each group; quota: int64 (groups), how many of the
    keys equal to upper[g] are in group g (used up); codes: uint8 (n).
    """
    for i in range(keys.size):
        codes[i] = _group_of(keys[i], upper, quota, upper.size)
