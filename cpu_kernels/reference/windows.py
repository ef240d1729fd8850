"""What the kernels of windows of limits mean: their NumPy twins, written for reading."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Sums = tuple[Floats, Floats, Floats]


def spread(sums: Sums, start: int, end: int) -> float:
    """Return the sum of squared distances to their mean of atoms start .. end - 1; 0 where there are none."""
    if start == end:
        return 0.0
    count, first, second = (float(part[end] - part[start]) for part in sums)
    return second - first * first / count


def cost_rows(sums: Sums, low: Places, high: Places, empty: bool, less: list[Floats]) -> list[Floats]:
    """Return for each edge of each limit's window the least cost of the groups to its left, `less` subtracted."""
    rows: list[Floats] = []
    for r in range(low.size):
        edges = range(low[r], high[r] + 1)
        if r == 0:
            row = [spread(sums, 0, j) for j in edges]
        else:
            before = [(i, rows[-1][i - low[r - 1]]) for i in range(low[r - 1], high[r - 1] + 1)]
            row = [
                min((cost + spread(sums, i, j) for i, cost in before if i < j or (empty and i == j)), default=np.inf)
                for j in edges
            ]
        rows.append(np.array(row) - less[r])
    return rows


def best_cost(sums: Sums, low: Places, high: Places) -> float:
    """Return the least cost of groups, none empty, whose limits lie in their windows."""
    nothing = [np.zeros(b - a + 1) for a, b in zip(low, high, strict=True)]
    last = cost_rows(sums, low, high, False, nothing)[-1]
    atoms = sums[0].size - 1
    return min(float(cost) + spread(sums, int(low[-1]) + place, atoms) for place, cost in enumerate(last))


def apart(sums: Sums, bottom: Floats, top: Floats, edge: int, before: int, after: int) -> float:
    """Return how far apart the means beside a limit can be that lies in an atom beside an edge."""
    count, first, _ = sums
    atoms = bottom.size
    below, above = bottom[min(before, atoms - 1)], top[max(after - 1, 0)]
    if edge - 1 > before:
        below = (first[edge - 1] - first[before]) / (count[edge - 1] - count[before])
    if edge + 1 < after:
        above = (first[after] - first[edge + 1]) / (count[after] - count[edge + 1])
    most, least = top[min(edge, atoms - 1)], bottom[max(edge - 1, 0)]
    return 2 * max(min(float(most - below), float(above - least)), 0.0)


def possible_windows(
    sums: Sums, width: Floats, bottom: Floats, top: Floats, allowed: float, low: Places, high: Places
) -> Places:
    """Return the first and the last edge (2, limits) beside which each limit of groups of the allowed cost can lie."""
    atoms, number = width.size, low.size
    wide = np.maximum(np.append(0.0, width), np.append(width, 0.0))  # of the atoms beside an edge
    less = []
    for r in range(number):
        before = max(int(low[r - 1]) - 1, 0) if r else 0
        after = min(int(high[r + 1]) + 1, atoms) if r + 1 < number else atoms
        less.append(
            np.array([wide[j] * apart(sums, bottom, top, j, before, after) for j in range(low[r], high[r] + 1)])
        )
    left = cost_rows(sums, low, high, True, less)
    mirrored: Sums = tuple(part[-1] - part[::-1] for part in sums)  # type: ignore[assignment]
    right = cost_rows(mirrored, atoms - high[::-1], atoms - low[::-1], True, [part[::-1] for part in less[::-1]])
    found = np.empty((2, number), np.int64)
    for r in range(number):
        possible = np.flatnonzero(left[r] + right[number - 1 - r][::-1] + less[r] <= allowed)
        found[:, r] = (low[r] + possible[0], low[r] + possible[-1]) if possible.size else (low[r], high[r])
    return found
