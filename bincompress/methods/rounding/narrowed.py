"""The exact groups of a large float32 matrix without sorting it: only where a limit can lie are magnitudes looked at.

Magnitudes are counted in cells, ranges of bit patterns, at first in a few wide ones. With cells as atoms the exact
solver gives a cost U that the optimum does not exceed, and bounds from below exclude places for its limits, as
follows. Let the optimum have means m[k], so that limit k lies half way between m[k] and m[k + 1], D apart; let it
part a cell of n magnitudes with mean c and squared distances S to c. The optimum costs the sum over magnitudes of the
least squared distance to a mean, x ** 2 plus a concave function f of x with slopes that fall by 2 D at the limit. So
the cell's sum of f is at least n f(c) less D times its sum of |x - c|, and that sum is at most sqrt(n S). With the
cell given as a whole to the mean that is nearer to c, the cost is therefore at most D sqrt(n S) higher. Where the
least cost of groups of whole cells, less that for all limits, is above U, the limit has no place in the cells beside
that edge. D is at most twice the distance of the limit to either mean, and the mean of a group is not below that of
the magnitudes from the first place of the limit before it. The cells that remain are split, until they are single
patterns: the exact solver over those is exact over all.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.rounding.cells import EPSILON, Cells, Finest, among, first_cells, merged, refined
from cpu_kernels.quantize.narrowing import PARTS_SHIFT, sum_of_squares, window_rows

_SHRINKS = 0.7
# Of cells: from the widest of which there are enough, to those that the magnitudes are counted in.
_SHIFTS = (18, 16, 13)
_FEW_GROUPS = 4  # for which those of the last shift but one are narrow enough
_CELLS_A_GROUP = 8


@dataclass(frozen=True)
class Narrowed:
    """Cells, with each limit of the best groups between two of them."""

    cells: Cells
    limits: NDArray[np.int64]  # (groups + 1), in cells
    zeros: int
    squares: float  # of all magnitudes


def narrowed_groups(bits: NDArray[np.uint32], groups: int) -> Narrowed | None:
    """Return the exact groups, without lambda, of the non-zero magnitudes of float32 patterns (n).

    None where the magnitudes are too few or too alike for this to be of use, or not all finite.
    """
    possible = _SHIFTS[:-1] if groups <= _FEW_GROUPS else _SHIFTS
    counted = first_cells(bits, possible[-1])
    if counted is None or counted[0].base.size < 4 * groups:
        return None
    first, zeros = counted
    shifts = [shift for shift in possible[:-1] if merged(first, shift).base.size >= _CELLS_A_GROUP * groups]
    shift, *finer_shifts = [*shifts, possible[-1]]
    cells = merged(first, shift) if finer_shifts else first
    low, high = np.zeros(groups - 1, np.int64), np.full(groups - 1, cells.base.size)
    finest = Finest(bits, shift if not finer_shifts else finer_shifts[-1])
    while True:
        limits, cost = _best_edges(cells, low, high)
        if shift == 0 or groups == 1:
            return Narrowed(cells, limits, zeros, float(sum_of_squares(bits.view(np.float32))))
        low, high = _narrowest(cells, low, high, cost)
        low, high = np.maximum(low - 1, 0), np.minimum(high, cells.base.size - 1)  # the cells beside these edges
        split = _inside(low, high, cells.base.size) & (cells.row >= 0)
        if finer_shifts:
            shift = finer_shifts.pop(0)
            parts = among(first, split[np.searchsorted(cells.base, first.base, side="right") - 1])
            parts = merged(parts, shift) if finer_shifts else parts
        else:
            parts, shift = finest.parts(cells, split, shift - PARTS_SHIFT)
        finer = refined(cells, split, parts)
        low = np.searchsorted(finer.base, cells.base[low])
        high = np.searchsorted(finer.base, cells.top[high], side="right")
        cells = finer
        if shift == 0 and 2 * np.count_nonzero(cells.row >= 0) < finest.keys.size:
            return None  # many equal magnitudes: few atoms, and costs that tie


def _narrowest(
    cells: Cells, low: NDArray[np.int64], high: NDArray[np.int64], cost: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the windows of `_windows`, again while they shrink: narrower ones bound the distances of means better."""
    while True:
        width = np.sum(high - low)
        low, high = _windows(cells, low, high, cost)
        if np.sum(high - low) >= _SHRINKS * width or np.sum(high - low) <= low.size:
            return low, high


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


def _apart(
    cells: Cells, sums: Any, edges: NDArray[np.int64], before: NDArray[np.int64], after: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return how far apart the means beside each limit can be at each of its edges, (limits, edges).

    A limit lies in a cell beside its edge; before, after (limits, 1): the first and the last edge that the limits
    beside it can lie at.
    """
    size = cells.base.size
    count, first, _ = sums
    bottom, top = (part.view(np.float32).astype(np.float64) for part in (cells.base, cells.top))
    least, most = bottom[np.clip(edges - 1, 0, size - 1)], top[np.clip(edges, 0, size - 1)]
    left, right = np.maximum(edges - 1, 0), np.minimum(edges + 1, size)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = (first[left] - first[before]) / (count[left] - count[before])
        above = (first[after] - first[right]) / (count[after] - count[right])
    below = np.where(edges - 1 > before, below, bottom[np.minimum(before, size - 1)])
    above = np.where(edges + 1 < after, above, top[np.maximum(after - 1, 0)])
    return np.asarray(2 * np.maximum(np.minimum(most - below, above - least), 0.0))


def _windows(
    cells: Cells, low: NDArray[np.int64], high: NDArray[np.int64], cost: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and the last edge beside which each limit of groups of no more than this cost can lie."""
    sums, size, number = cells.prefixes(), cells.base.size, low.size
    width = np.concatenate([[0.0], np.sqrt(cells.counts * cells.spread), [0.0]])
    width = np.maximum(width[:-1], width[1:])  # of the cells beside an edge
    begin, end = np.maximum(low - 1, 0), np.minimum(high + 1, size)
    before, after = np.append(0, begin[:-1])[:, None], np.append(end[1:], size)[:, None]
    steps = np.arange(int(np.max(high - low)) + 1)
    edges = low[:, None] + steps
    there = edges <= high[:, None]
    edges = np.minimum(edges, high[:, None])
    less = np.where(there, _apart(cells, sums, edges, before, after) * width[edges], 0.0)
    back = np.maximum((high - low)[:, None] - steps, 0)  # the same edges from the last on
    mirrored_less = np.where(there, np.take_along_axis(less, back, axis=1), 0.0)[::-1]
    left, _ = _rows(sums, low, high, less)
    mirrored: Any = tuple(np.ascontiguousarray(part[-1] - part[::-1]) for part in sums)
    right, _ = _rows(mirrored, size - high[::-1], size - low[::-1], np.ascontiguousarray(mirrored_less))
    # Rounding: of each prefix sum a share of EPSILON an addition, of each group's cost a few of the whole sum.
    allowed = cost + 4 * (size + 4 * number) * EPSILON * float(sums[2][-1])
    possible = there & (left + np.take_along_axis(right[::-1], back, axis=1) + less <= allowed)
    return low + possible.argmax(axis=1), low + steps.size - 1 - possible[:, ::-1].argmax(axis=1)
