"""Where can the limits of the best groups of sorted magnitudes lie, and where do they lie at the least cost?

Atoms are cells of magnitudes (`cells.Cells` of the methods), given as prefix sums (atoms + 1) of their number, their
sum and their squares. A limit lies at an edge between two atoms, in its window of edges.
"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import inline, kernel, out, view
from cpu_kernels.quantize.best_start import CANDIDATES, best_start_plain

F8, I8 = numba.float64, numba.int64


@inline
def _spread(count, first, second, start, end):
    """Return the sum of squared distances to their mean of atoms start .. end - 1 (end > start)."""
    total = first[end] - first[start]
    return (second[end] - second[start]) - total * total / (count[end] - count[start])


@inline
def _padded(part, mirrored):
    """Return prefix sums with room for a vector behind them, as they are or from the last atom on."""
    size = part.size - 1
    copy = np.empty(part.size + CANDIDATES)
    for i in range(part.size):
        copy[i] = part[size] - part[size - i] if mirrored else part[i]
    copy[part.size :] = part[size]
    return copy


@inline
def _places(low, high):
    """Return where the edges of each limit are in flat arrays (limits + 1)."""
    places = np.empty(low.size + 1, np.int64)
    places[0] = 0
    for r in range(low.size):
        places[r + 1] = places[r] + high[r] - low[r] + 1
    return places


@inline
def _cost_rows(count, first, second, low, high, places, empty, less, costs, choices):
    """Find the least cost of the groups left of each limit at each of its edges, `less` subtracted, and what gives it.

    count, first, second: padded. places: of each limit's edges in the flat less, costs and choices; choices may be
    empty. empty: 1 where groups may be empty, else 0. The cost obeys the quadrangle inequality whatever `less` is, so
    that the best edge of the limit before never moves left: divide and conquer, level by level, so that the searches of
    a level wait for none of each other.
    """
    before, row = np.empty(count.size), np.empty(count.size)
    widest = 1
    for r in range(low.size):
        widest = max(widest, high[r] - low[r] + 1)
    queue = np.empty((widest + 1, 4), np.int64)
    for j in range(low[0], high[0] + 1):
        row[j] = _spread(count, first, second, 0, j) if j > 0 else 0.0
    for r in range(low.size):
        if r > 0:
            before, row = row, before
            queue[0, 0], queue[0, 1], queue[0, 2], queue[0, 3] = low[r], high[r], low[r - 1], high[r - 1]
            taken, held = 0, 1
            while taken < held:
                begin, end, left, right = queue[taken, 0], queue[taken, 1], queue[taken, 2], queue[taken, 3]
                taken += 1
                middle = (begin + end) // 2
                last = min(right, middle - 1)
                start = left
                if left <= last:
                    start = best_start_plain(before, count, first, second, row, 0.0, middle, left, last)
                else:
                    row[middle] = np.inf
                if empty and left <= middle <= right and before[middle] < row[middle]:
                    row[middle] = before[middle]
                    start = middle
                if choices.size:
                    choices[places[r] + middle - low[r]] = start
                if begin < middle:
                    queue[held, 0], queue[held, 1], queue[held, 2], queue[held, 3] = begin, middle - 1, left, start
                    held += 1
                if middle < end:
                    queue[held, 0], queue[held, 1], queue[held, 2], queue[held, 3] = middle + 1, end, start, right
                    held += 1
        for j in range(low[r], high[r] + 1):
            row[j] -= less[places[r] + j - low[r]]
            costs[places[r] + j - low[r]] = row[j]


@kernel(F8(view(F8, 1), view(F8, 1), view(F8, 1), view(I8, 1), view(I8, 1), out(I8, 1)))
def best_edges(count, first, second, low, high, limits):
    """Return the least cost of groups whose limits lie in their windows, and fill limits (limits + 2) with their edges.

    count, first, second: float64 (atoms + 1). low, high: int64 (limits, one at least), the first and the last edge of
    each limit, so that a group has an atom. limits begin with 0 and end with the number of atoms.
    """
    atoms = count.size - 1
    number = low.size
    places = _places(low, high)
    costs, choices = np.empty(places[number]), np.zeros(places[number], np.int32)
    less = np.zeros(places[number])
    _cost_rows(
        _padded(count, False), _padded(first, False), _padded(second, False), low, high, places, 0, less, costs, choices
    )
    limits[0] = 0
    limits[number + 1] = atoms
    least = np.inf
    for j in range(low[number - 1], high[number - 1] + 1):
        cost = costs[places[number - 1] + j - low[number - 1]] + _spread(count, first, second, j, atoms)
        if cost < least:
            least = cost
            limits[number] = j
    for r in range(number - 1, 0, -1):
        limits[r] = choices[places[r] + limits[r + 1] - low[r]]
    return least


@inline
def _apart(count, first, bottom, top, edge, before, after):
    """Return how far apart the means beside a limit can be that lies in an atom beside an edge.

    before, after: the first and the last edge that the limits beside it can lie at.
    """
    atoms = bottom.size
    below = bottom[min(before, atoms - 1)]
    if edge - 1 > before:
        below = (first[edge - 1] - first[before]) / (count[edge - 1] - count[before])
    above = top[max(after - 1, 0)]
    if edge + 1 < after:
        above = (first[after] - first[edge + 1]) / (count[after] - count[edge + 1])
    most, least = top[min(edge, atoms - 1)], bottom[max(edge - 1, 0)]
    return 2 * max(min(most - below, above - least), 0.0)


@kernel(
    numba.void(
        view(F8, 1), view(F8, 1), view(F8, 1), view(F8, 1), view(F8, 1), view(F8, 1), F8, view(I8, 1), view(I8, 1),
        out(I8, 2),
    )
)  # fmt: skip
def possible_windows(count, first, second, width, bottom, top, allowed, low, high, found):
    """Find the edges beside which each limit of groups of no more than the allowed cost can lie.

    count, first, second: float64 (atoms + 1). width: float64 (atoms), the root of number times squared distances to the
    mean; bottom, top: float64 (atoms), the least and the greatest value that an atom can hold. low, high: int64
    (limits, one at least), windows outside which no limit lies. found: int64 (2, limits), becomes narrower ones.
    Source: bincompress/methods/rounding/narrowed.py says why this leaves the best groups in.
    """
    atoms, number = width.size, low.size
    places = _places(low, high)
    size = places[number]
    less, left, right, choices = np.empty(size), np.empty(size), np.empty(size), np.empty(0, np.int32)
    for r in range(number):
        before = max(low[r - 1] - 1, 0) if r > 0 else 0
        after = min(high[r + 1] + 1, atoms) if r + 1 < number else atoms
        for j in range(low[r], high[r] + 1):
            wide = 0.0
            if j > 0:
                wide = width[j - 1]
            if j < atoms:
                wide = max(wide, width[j])
            less[places[r] + j - low[r]] = wide * _apart(count, first, bottom, top, j, before, after)
    _cost_rows(
        _padded(count, False), _padded(first, False), _padded(second, False), low, high, places, 1, less, left, choices
    )
    mirrored_low, mirrored_high, mirrored_less = np.empty_like(low), np.empty_like(high), np.empty(size)
    for r in range(number):
        mirrored_low[r], mirrored_high[r] = atoms - high[number - 1 - r], atoms - low[number - 1 - r]
    for i in range(size):
        mirrored_less[i] = less[size - 1 - i]
    _cost_rows(
        _padded(count, True), _padded(first, True), _padded(second, True), mirrored_low, mirrored_high,
        _places(mirrored_low, mirrored_high), 1, mirrored_less, right, choices,
    )  # fmt: skip
    for r in range(number):
        found[0, r], found[1, r] = high[r], low[r]
        for j in range(low[r], high[r] + 1):
            at = places[r] + j - low[r]
            if left[at] + right[size - 1 - at] + less[at] <= allowed:
                found[0, r] = min(found[0, r], j)
                found[1, r] = max(found[1, r], j)
        if found[0, r] > found[1, r]:
            found[0, r], found[1, r] = low[r], high[r]
