"""The exact groups of a large float32 matrix without sorting it: only where a limit can lie are magnitudes looked at.

Magnitudes are counted in cells, ranges of bit patterns. With cells as atoms the exact solver gives a cost U that the
optimum does not exceed, and bounds from below exclude places for its limits, as follows. Let the optimum have means
m[k], so that limit k lies half way between m[k] and m[k + 1], D apart; let it part a cell of n magnitudes with mean c
and squared distances S to c. The optimum costs the sum over magnitudes of the least squared distance to a mean, x ** 2
plus a concave function f of x with slopes that fall by 2 D at the limit. So the cell's sum of f is at least n f(c)
less D times its sum of |x - c|, and that sum is at most sqrt(n S). With the cell given as a whole to the mean that is
nearer to c, the cost is therefore at most D sqrt(n S) higher. Where the least cost of groups of whole cells, less that
for all limits, is above U, the limit has no place in the cells beside that edge. D is at most twice the distance of
the limit to either mean, and the mean of a group is not below that of the magnitudes from the first place of the limit
before it. The cells that remain are split in 32, until they are single patterns: the exact solver over those is exact
over all.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.quantize.narrowing import (
    FIRST_SHIFT,
    PARTS_SHIFT,
    count_cells,
    split_again,
    split_first,
    window_rows,
)

_EPSILON = 2.0**-53
_SHRINKS = 0.7
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Cells:
    """Ranges of float32 patterns without sign that hold magnitudes, ascending, with their sums; all (cells)."""

    base: NDArray[np.uint32]  # the first pattern
    top: NDArray[np.uint32]  # the last pattern
    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]
    spread: NDArray[np.float64]  # squared distances to the cell's mean
    row: NDArray[np.int64]  # of the table that it was counted in last; -1 for cells that stay whole

    def prefixes(self) -> tuple[NDArray[np.float64], ...]:
        """Return the prefix sums (cells + 1) of the number, the magnitudes and their squares."""
        parts = self.counts.astype(np.float64), self.sums, self.squares
        return tuple(np.concatenate([[0.0], np.cumsum(part)]) for part in parts)


@dataclass(frozen=True)
class Narrowed:
    """Cells, with each limit of the best groups between two of them."""

    cells: Cells
    limits: NDArray[np.int64]  # (groups + 1), in cells
    zeros: int


def narrowed_groups(bits: NDArray[np.uint32], groups: int) -> Narrowed | None:
    """Return the exact groups, without lambda, of the non-zero magnitudes of float32 patterns (n).

    None where the magnitudes are too few or too alike for this to be of use, or not all finite.
    """
    table = np.zeros((1 << 31 - FIRST_SHIFT, 3), np.uint64)
    zeros = int(count_cells(bits, table))
    table[0, 0] -= np.uint64(zeros)
    if np.any(table[_INFINITY >> FIRST_SHIFT :, 0]):
        return None
    cells = _counted(np.arange(table.shape[0], dtype=np.uint32) << np.uint32(FIRST_SHIFT), FIRST_SHIFT, table)
    if cells.base.size < 4 * groups:
        return None
    low, high = np.zeros(groups - 1, np.int64), np.full(groups - 1, cells.base.size)
    shift, rows = FIRST_SHIFT, table.shape[0]
    keys, parts = np.empty(0, np.uint32), np.empty(0, np.int32)
    while True:
        limits, cost = _best_edges(cells, low, high)
        if shift == 0 or groups == 1:
            return Narrowed(cells, limits, zeros)
        low, high = _narrowest(cells, low, high, cost)
        low, high = np.maximum(low - 1, 0), np.minimum(high, cells.base.size - 1)  # the cells beside these edges
        split = _inside(low, high, cells.base.size) & (cells.row >= 0)
        slots = np.full(rows, -1, np.int32)
        slots[cells.row[split]] = np.arange(np.count_nonzero(split))
        first = shift == FIRST_SHIFT
        shift -= PARTS_SHIFT
        table = np.zeros((np.count_nonzero(split) << PARTS_SHIFT, 3), np.uint64)
        rows = table.shape[0]
        if first:
            held = int(cells.counts[split].sum())
            keys, parts = np.empty(held, np.uint32), np.empty(held, np.int32)
            split_first(bits, slots, shift, table, keys, parts)
        else:
            left = split_again(keys, parts, slots, shift, table)
            keys, parts = keys[:left], parts[:left]
        finer = _refined(cells, split, shift, table)
        low = np.searchsorted(finer.base, cells.base[low])
        high = np.searchsorted(finer.base, cells.top[high], side="right")
        cells = finer
        if shift == 0 and 2 * np.count_nonzero(cells.row >= 0) < keys.size:
            return None  # many equal magnitudes: few atoms, and costs that tie


def _narrowest(
    cells: Cells, low: NDArray[np.int64], high: NDArray[np.int64], cost: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the windows of `_windows`, again while they shrink: narrower ones bound the distances of means better."""
    while True:
        width = np.sum(high - low)
        low, high = _windows(cells, low, high, cost)
        if np.sum(high - low) >= _SHRINKS * width:
            return low, high


def _counted(base: NDArray[np.uint32], shift: int, table: NDArray[np.uint64]) -> Cells:
    """Return the cells of a table that hold magnitudes."""
    row = np.flatnonzero(table[:, 0])
    base = base[row]
    number, places, squares = table[row].T.astype(np.float64)
    start = base.view(np.float32).astype(np.float64)
    step = np.ldexp(1.0, np.maximum(base >> np.uint32(23), 1).astype(np.int32) - 150)  # between neighbouring patterns
    return Cells(
        base,
        base + np.uint32((1 << shift) - 1),
        table[row, 0].astype(np.int64),
        number * start + step * places,
        number * start**2 + 2 * start * step * places + step**2 * squares,
        # A bound from above: of one magnitude it is next to nothing, however the squares are rounded.
        step**2 * (np.maximum(squares - places**2 / number, 0.0) + 8 * _EPSILON * squares),
        row,
    )


def _refined(cells: Cells, split: NDArray[np.bool_], shift: int, table: NDArray[np.uint64]) -> Cells:
    """Return the cells with some of them replaced by their parts."""
    steps = np.arange(1 << PARTS_SHIFT, dtype=np.uint32) << np.uint32(shift)
    parts = _counted((cells.base[split][:, None] + steps).reshape(-1), shift, table)
    order = np.argsort(np.concatenate([cells.base[~split], parts.base]), kind="stable")

    def joined(name: str) -> Any:
        whole = np.full(np.count_nonzero(~split), -1) if name == "row" else getattr(cells, name)[~split]
        return np.concatenate([whole, getattr(parts, name)])[order]

    return Cells(*(joined(name) for name in ("base", "top", "counts", "sums", "squares", "spread", "row")))


def _inside(low: NDArray[np.int64], high: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """Return which cells lie in a window."""
    ends = np.zeros(size + 1, np.int64)
    np.add.at(ends, low, 1)
    np.add.at(ends, high + 1, -1)
    return np.cumsum(ends[:-1]) > 0


def _rows(
    sums: tuple[NDArray[np.float64], ...], low: NDArray[np.int64], high: NDArray[np.int64], less: Any = None
) -> Any:
    shape = low.size, int(np.max(high - low)) + 1
    costs, choices = np.full(shape, np.inf), np.zeros(shape, np.int32)
    window_rows(*sums, low, high, int(less is not None), np.zeros(shape) if less is None else less, costs, choices)
    return costs, choices


def _best_edges(cells: Cells, low: NDArray[np.int64], high: NDArray[np.int64]) -> tuple[NDArray[np.int64], float]:
    """Return the limits of the best groups with every limit at an edge in its window, and their cost."""
    sums, last, number = cells.prefixes(), cells.base.size, low.size
    limits = np.zeros(number + 2, np.int64)
    limits[-1] = last
    if number == 0:
        return limits, 0.0
    order = np.arange(1, number + 1)
    low, high = np.maximum(low, order), np.minimum(high, last - number - 1 + order)
    costs, choices = _rows(sums, low, high)
    edges = np.arange(low[-1], high[-1] + 1)
    count, first, second = (part[-1] - part[edges] for part in sums)
    whole = costs[-1, : edges.size] + second - first**2 / count
    limits[-2] = edges[np.argmin(whole)]
    for r in range(number - 1, 0, -1):
        limits[r] = choices[r, limits[r + 1] - low[r]]
    return limits, float(np.min(whole))


def _apart(cells: Cells, sums: Any, edges: Any, before: int, after: int) -> NDArray[np.float64]:
    """Return how far apart the means beside a limit at these edges can be, the limits beside it within before, after.

    The limit lies in a cell beside the edge; before, after: the first and the last edge that the others can lie at.
    """
    size = cells.base.size
    count, first, _ = sums
    bottom, top = (part.view(np.float32).astype(np.float64) for part in (cells.base, cells.top))
    least, most = bottom[np.clip(edges - 1, 0, size - 1)], top[np.clip(edges, 0, size - 1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        below = (first[np.maximum(edges - 1, 0)] - first[before]) / (count[np.maximum(edges - 1, 0)] - count[before])
        above = (first[after] - first[np.minimum(edges + 1, size)]) / (
            count[after] - count[np.minimum(edges + 1, size)]
        )
    below = np.where(edges - 1 > before, below, bottom[min(before, size - 1)])
    above = np.where(edges + 1 < after, above, top[max(after - 1, 0)])
    return np.asarray(2 * np.maximum(np.minimum(most - below, above - least), 0.0))


def _windows(
    cells: Cells, low: NDArray[np.int64], high: NDArray[np.int64], cost: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and the last edge beside which each limit of groups of no more than this cost can lie."""
    sums, size, number = cells.prefixes(), cells.base.size, low.size
    width = np.concatenate([[0.0], np.sqrt(cells.counts * cells.spread), [0.0]])
    width = np.maximum(width[:-1], width[1:])  # of the cells beside an edge
    begin, end = np.maximum(low - 1, 0), np.minimum(high + 1, size)
    less = np.zeros((number, int(np.max(high - low)) + 1))
    mirrored_less = np.zeros_like(less)
    for r in range(number):
        edges = np.arange(low[r], high[r] + 1)
        before, after = begin[r - 1] if r else 0, end[r + 1] if r + 1 < number else size
        less[r, : edges.size] = _apart(cells, sums, edges, int(before), int(after)) * width[edges]
        mirrored_less[number - 1 - r, : edges.size] = less[r, : edges.size][::-1]
    left, _ = _rows(sums, low, high, less)
    mirrored: Any = tuple(np.ascontiguousarray(part[-1] - part[::-1]) for part in sums)
    right, _ = _rows(mirrored, size - high[::-1], size - low[::-1], mirrored_less)
    # Rounding: of each prefix sum a share of _EPSILON an addition, of each group's cost a few of the whole sum.
    allowed = cost + 4 * (size + 4 * number) * _EPSILON * float(sums[2][-1])
    first, last = np.empty_like(low), np.empty_like(high)
    for r in range(number):
        count = int(high[r] - low[r]) + 1
        bound = left[r, :count] + right[number - 1 - r, :count][::-1] + less[r, :count]
        possible = np.flatnonzero(bound <= allowed)
        first[r], last[r] = low[r] + possible[0], low[r] + possible[-1]
    return first, last
