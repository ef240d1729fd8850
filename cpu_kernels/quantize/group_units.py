"""How are the magnitudes of many row-blocks (or rows) grouped, by any solver and any number of groups?"""

from typing import Any

import numba
import numpy as np

from cpu_kernels.jit.compiler import inline, kernel, out, view
from cpu_kernels.quantize.best_start import CANDIDATES, best_start, best_start_plain
from cpu_kernels.quantize.grouping import first_row, follow_choices, merge_greedily
from cpu_kernels.quantize.intrinsics import LANES, order_rows
from cpu_kernels.quantize.two_groups import gather_magnitudes, sorting_network

F8, U1, U2, U4 = numba.float64, numba.uint8, numba.uint16, numba.uint32

MAGNITUDE = np.uint32(0x7FFFFFFF)
NETWORKS = (64, 128, 256)  # blocks that are sorted side by side
_SPARE = 4  # atoms below where a limit can lie, for groups that cost the same up to rounding


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
def _best_start(count, first, second, lam, best, row, end, left, right):
    if lam == 0.0:
        return best_start_plain(best, count, first, second, row, lam, end, left, right)
    return best_start(best, count, first, second, row, lam, end, left, right)


@inline
def _schedule(entries, searches, held):
    """Return the order of the searches for a row of so many entries, made if the table does not hold it.

    searches: int32 (slots, entries, 3); becomes in the slot, level by level, the entry (from 1) that is searched for
    and the two entries whose choices bound its search. held: int64 (slots), the entries that each slot is for.
    """
    order = searches[entries % held.size]
    if held[entries % held.size] == entries:
        return order
    held[entries % held.size] = entries
    # Until its turn comes, a search is the range of entries that it is the middle of.
    order[0, 1], order[0, 2] = 1, entries
    filled = 1
    for taken in range(entries):
        begin, end = order[taken, 1], order[taken, 2]
        middle = (begin + end) // 2
        order[taken, 0], order[taken, 1], order[taken, 2] = middle, begin - 1, end + 1
        if begin < middle:
            order[filled, 1], order[filled, 2] = begin, middle - 1
            filled += 1
        if middle < end:
            order[filled, 1], order[filled, 2] = middle + 1, end
            filled += 1
    return order


@inline
def _next_row(count, first, second, lam, least, low, atoms, best, row, choice, searches, held):
    """Do what `grouping.next_row` does, level by level, so that the searches of a level wait for none of each other.

    Entries low .. atoms of the row are filled; least: the first entry of the row before. choice has a place on both
    sides of the entries (low - 1 and atoms + 1) for the bounds of the outermost searches.
    """
    choice[low - 1] = least
    choice[atoms + 1] = atoms - 1
    order = _schedule(atoms - low + 1, searches, held)
    for at in range(atoms - low + 1):
        middle = np.int64(order[at, 0]) + low - 1
        left = np.int64(choice[order[at, 1] + low - 1])
        right = min(np.int64(choice[order[at, 2] + low - 1]), middle - 1)
        choice[middle] = _best_start(count, first, second, lam, best, row, middle, left, right)


@inline
def _last_entry(count, first, second, lam, least, low, atoms, best, row, choice):
    """Fill the entry of all atoms alone, of the last row: only the searches that bound its search go before it."""
    begin = low
    left = least
    while True:
        middle = (begin + atoms) // 2
        left = _best_start(count, first, second, lam, best, row, middle, left, min(atoms - 1, middle - 1))
        if middle == atoms:
            break
        begin = middle + 1
    choice[atoms] = left


@inline
def _solve(count, first, second, atoms, lam, most, rows, choices, searches, held, bounds):
    """Return the number of groups of least cost and fill bounds, as `grouping.solve_exactly` to the bit.

    Rows are filled from where their limit can lie: the limits of the best k groups and of the best k + 1 alternate, so
    that limit i of `most` groups is not below limit i - (most - k) of k groups. Eight groups to 128 weights take 2/3
    of the time.
    """
    most = min(most, atoms)
    first_row(count, first, second, lam, 0, atoms, rows[0])
    least = rows[0, atoms]
    groups = 1
    start = 1  # of the entries of the row before
    for k in range(2, most + 1):
        best, row = rows[k % 2], rows[1 - k % 2]
        low = max(k, start + 1)
        known = 2 * k - 1 - most  # of the limits of k - 1 groups
        if known > 0:
            limit = atoms
            for step in range(k - 1, known, -1):
                limit = np.int64(choices[step, limit])
            low = max(low, limit - _SPARE)
        if k == most:
            _last_entry(count, first, second, lam, start, low, atoms, best, row, choices[k])
        else:
            _next_row(count, first, second, lam, start, low, atoms, best, row, choices[k], searches, held)
        start = low
        if row[atoms] < least:
            least = row[atoms]
            groups = k
    follow_choices(choices, groups, atoms, bounds)
    return groups


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


@inline
def _assign_whole(bits, base, size, order, count, bounds, groups, codes):
    """Write the group of every magnitude where no limit parts equal ones: how many groups end below it."""
    for i in range(size):
        codes[base + i] = 0
    for group in range(groups - 1):
        upper = order[int(count[bounds[group + 1]]) - 1]
        for i in range(size):
            codes[base + i] += np.uint8((bits[base + i] & MAGNITUDE) > upper)


@kernel(
    numba.void(
        view(U4, 1), numba.int64, numba.int64, view(numba.int64, 2), numba.int64, numba.int64, numba.boolean, F8,
        numba.boolean, out(U1, 1), out(F8, 4),
    )
)  # fmt: skip
def _group_units(bits, cols, block, network, most, window, exact, lam, normalized, codes, sums):
    rows, blocks = sums.shape[2], sums.shape[3]
    lanes = LANES if network.size else 1
    side = np.empty((block if network.size else 1, LANES), np.uint32)
    keys, order, other = np.empty(block, np.uint32), np.empty(block, np.uint32), np.empty(block, np.uint32)
    counts = np.empty(256, np.int64)
    places = block + 1 + CANDIDATES
    count, first, second = np.empty(places), np.empty(places), np.empty(places)
    bounds = np.empty(max(most, 1) + 1, np.int64)
    upper, quota = np.empty(most, np.uint32), np.empty(most, np.int64)
    table = places if exact else 1
    solved, choices = np.empty((2, table)), np.empty((most + 1, table), np.int32)
    held = np.zeros(block + 1 if network.size else 1, np.int64)
    searches = np.empty((held.size, block if exact else 1, 3), np.int32)
    heap = 1 if exact else block // window + 2
    heap_keys, heap_places = np.empty(2 * heap), np.empty((2 * heap, 3), np.int32)
    ends, starts = np.empty(heap + 1, np.int32), np.empty(heap + 1, np.int32)
    sums[:] = 0.0
    for unit in range((rows + lanes - 1) // lanes * blocks * lanes):
        # The rows of a batch are next to each other in this order, as they are sorted together.
        lane = unit % lanes
        b = unit // lanes % blocks
        row = unit // (lanes * blocks) * lanes + lane
        base = row * cols + b * block
        size = min(block, cols - b * block)
        if network.size:
            if lane == 0:
                gather_magnitudes(bits, MAGNITUDE, cols, row, rows, b * block, size, side)
                for pair in range(network.shape[0]):
                    order_rows(side, network[pair, 0], network[pair, 1])
            if row >= rows:
                continue
            for i in range(size):
                order[i] = side[i, lane]
            ordered = order
        else:
            for i in range(size):
                order[i] = bits[base + i] & MAGNITUDE
            ordered = other if _radix_sort(order, other, size, counts) else order
        values = ordered.view(np.float32)
        atoms = _atoms(ordered, values, size, 0 if exact else window, count, first, second)
        cost = _lambda(values, first, count, atoms, size, lam, normalized)
        if exact:
            groups = _solve(count, first, second, atoms, cost, most, solved, choices, searches, held, bounds)
            _assign_whole(bits, base, size, ordered, count, bounds, groups, codes)
        else:
            groups = merge_greedily(
                count, first, second, atoms, cost, most, heap_keys, heap_places, ends, starts, bounds
            )
            for i in range(size):
                keys[i] = bits[base + i] & MAGNITUDE
            _assign(keys, size, ordered, count, bounds, groups, upper, quota, codes, base)
        for group in range(groups):
            sums[0, group, row, b] = count[bounds[group + 1]] - count[bounds[group]]
            sums[1, group, row, b] = first[bounds[group + 1]] - first[bounds[group]]
            sums[2, group, row, b] = second[bounds[group + 1]] - second[bounds[group]]


def group_units(
    bits: Any, cols: int, block: int, most: int, window: int, exact: bool, lam: float, normalized: bool,
    codes: Any, sums: Any,
) -> None:  # fmt: skip
    """Group the magnitudes of every row-block of float32 weights into at most `most` groups.

    bits: uint32 (rows * cols), finite float32 patterns. block: columns of a row-block (cols for rows). exact:
    Algorithm 1, otherwise greedy merging of windows of `window` magnitudes (1: Algorithm 2, more: Algorithm 3).
    codes: uint8 (rows * cols), becomes the group of every weight, ascending in magnitude.
    sums: float64 (3, most, rows, blocks), becomes size, sum and sum of squares per group; empty groups are zero.
    """
    network = sorting_network(block) if block in NETWORKS else np.empty((0, 2), np.int64)
    _group_units(bits, cols, block, network, most, window, exact, lam, normalized, codes, sums)


@kernel(numba.void(view(U4, 1), view(U4, 1), out(numba.int64, 1), out(U2, 1)))
def assign_groups(keys, upper, quota, codes):
    """Write the group of every magnitude key of a whole matrix, as `group_units` does for row-blocks.

    keys: uint32 (n); upper: uint32 (groups), the greatest key of each group; quota: int64 (groups), how many of the
    keys equal to upper[g] are in group g (used up); codes: uint16 (n).
    """
    for i in range(keys.size):
        codes[i] = _group_of(keys[i], upper, quota, upper.size)
