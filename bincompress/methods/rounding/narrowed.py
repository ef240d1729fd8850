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
from cpu_kernels.quantize.narrowing import PARTS_SHIFT, sum_of_squares
from cpu_kernels.quantize.windows import best_edges, possible_windows

_SHRINKS = 0.7
# Of cells: from the widest of which there are enough, to those that the magnitudes are counted in.
_SHIFTS = (18, 16, 13)
_FEW_GROUPS = 4  # for which those of the last shift but one are narrow enough
_CELLS_A_GROUP = 8
_NEAR = 24  # cells


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
    limits = np.zeros(groups + 1, np.int64)
    _best_edges(cells.prefixes(), low, high, limits)
    finest = Finest(bits, shift if not finer_shifts else finer_shifts[-1])
    while shift > 0 and groups > 1:
        low, high = _narrowest(cells, low, high, limits)
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
        limits[1:-1] = np.searchsorted(finer.base, cells.base[limits[1:-1]])
        limits[-1] = finer.base.size
        cells = finer
        if shift == 0:
            if 2 * np.count_nonzero(cells.row >= 0) < finest.keys.size:
                return None  # many equal magnitudes: few atoms, and costs that tie
            _best_edges(cells.prefixes(), low, high, limits)
    return Narrowed(cells, limits, zeros, float(sum_of_squares(bits.view(np.float32))))


def _inside(low: NDArray[np.int64], high: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """Return which cells lie in a window."""
    ends = np.zeros(size + 1, np.int64)
    np.add.at(ends, low, 1)
    np.add.at(ends, high + 1, -1)
    return np.cumsum(ends[:-1]) > 0


def _best_edges(sums: Any, low: NDArray[np.int64], high: NDArray[np.int64], limits: NDArray[np.int64]) -> float:
    """Fill limits (groups + 1) with those of the best groups with every limit in its window; return their cost."""
    last, number = sums[0].size - 1, low.size
    limits[0], limits[-1] = 0, last
    if number == 0:
        return 0.0
    order = np.arange(1, number + 1)
    return float(best_edges(*sums, np.maximum(low, order), np.minimum(high, last - number - 1 + order), limits))


def _narrowest(
    cells: Cells, low: NDArray[np.int64], high: NDArray[np.int64], limits: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and the last edge beside which each limit of the best groups can lie.

    limits: good ones; become the best with limits at edges. Windows are narrowed first by what is the least cost near
    the good limits, then by the least cost of all, and again while they shrink, as narrower ones bound the distances of
    means better.
    """
    sums, size, number = cells.prefixes(), cells.base.size, low.size
    # Rounding: of each prefix sum a share of EPSILON an addition, of each group's cost a few of the whole sum.
    rounding = 4 * (size + 4 * number) * EPSILON * float(sums[2][-1])
    near = np.maximum(low, limits[1:-1] - _NEAR), np.minimum(high, limits[1:-1] + _NEAR)
    cost = _best_edges(sums, *near, limits)
    width = np.sqrt(cells.counts * cells.spread)
    bottom, top = (part.view(np.float32).astype(np.float64) for part in (cells.base, cells.top))
    least = False
    while True:
        found = np.empty((2, number), np.int64)
        possible_windows(*sums, width, bottom, top, cost + rounding, low, high, found)
        before, after = np.sum(high - low), np.sum(found[1] - found[0])
        low, high = found
        if after <= number or (least and after >= _SHRINKS * before):
            return low, high
        if not least:
            cost, least = _best_edges(sums, low, high, limits), True
