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

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.rounding.cells import EPSILON, Cells, Finest, Grid, among, first_cells, merged, refined
from cpu_kernels.quantize.narrowing import sum_of_squares
from cpu_kernels.quantize.windows import best_edges, possible_windows

_SHRINKS = 0.7
# Of cells in the octave of a typical magnitude: of one group, and one less for each doubling of the groups.
_SHIFT_OF_ONE, _LEAST_SHIFT = 16, 8
_LEVEL_SHIFT = 2
_CELLS_A_GROUP = 8
_FEW_EDGES = 1 << 13  # of all limits, that are searched sooner than windows are narrowed by wider cells
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
    squares = float(sum_of_squares(bits.view(np.float32)))
    if not np.isfinite(squares):
        return None
    grid = Grid.around(np.sqrt(squares / bits.size), max(_SHIFT_OF_ONE - groups.bit_length(), _LEAST_SHIFT))
    first, zeros = first_cells(bits, grid)
    if first.base.size < 4 * groups:
        return None
    if groups == 1:
        return Narrowed(first, np.array([0, first.base.size]), zeros, squares)
    levels = _levels(first, grid, groups)
    limits, cost = _good_limits(levels, groups)
    edges, cells = first.base[limits[1:-1]], levels.pop()
    low, high = np.zeros(groups - 1, np.int64), np.full(groups - 1, cells.base.size)
    finest, single = Finest(bits, grid), False
    while not single:
        low, high, cost = _narrowest(cells, low, high, cost, first.base.size, bool(levels))
        low, high = np.maximum(low - 1, 0), np.minimum(high, cells.base.size - 1)  # the cells beside these edges
        split = _inside(low, high, cells.base.size) & (cells.row >= 0)
        known = bool(levels)  # of the cost
        if known:
            finer = levels.pop()
            parts = among(finer, split[np.searchsorted(cells.base, finer.base, side="right") - 1])
        else:
            parts, single = finest.parts(cells, split)
        finer = refined(cells, split, parts)
        low = np.searchsorted(finer.base, cells.base[low])
        high = np.searchsorted(finer.base, cells.top[high], side="right")
        if not known:
            limits[1:-1] = np.searchsorted(finer.base, edges)
            solve = _best_edges if single else _settle
            cost = solve(finer.prefixes(), low, high, limits)
            edges = finer.base[limits[1:-1]]
        cells = finer
    if 2 * np.count_nonzero(cells.row >= 0) < finest.keys.size:
        return None  # many equal magnitudes: few atoms, and costs that tie
    return Narrowed(cells, limits, zeros, squares)


def _levels(first: Cells, grid: Grid, groups: int) -> list[Cells]:
    """Return cells ever wider, from the first to those of which there are few, but enough."""
    levels = [first]
    while levels[-1].base.size * groups > _FEW_EDGES:
        wider = merged(levels[-1], grid, _LEVEL_SHIFT * len(levels))
        if wider.base.size < _CELLS_A_GROUP * groups:
            break
        levels.append(wider)
    return levels


def _good_limits(levels: list[Cells], groups: int) -> tuple[NDArray[np.int64], float]:
    """Return good limits (groups + 1) at edges of the first level's cells, near those of wider ones, and their cost."""
    widest = levels[-1]
    limits = np.zeros(groups + 1, np.int64)
    cost = _best_edges(widest.prefixes(), np.zeros(groups - 1, np.int64), np.full(groups - 1, widest.base.size), limits)
    for cells, finer in itertools.pairwise(reversed(levels)):
        limits[1:-1] = np.searchsorted(finer.base, cells.base[limits[1:-1]])
        cost = _settle(finer.prefixes(), 0, finer.base.size, limits)
    return limits, cost


def _settle(sums: Any, low: Any, high: Any, limits: NDArray[np.int64]) -> float:
    """Move good limits in windows to the best near them, and on while one goes as far as it may; return the cost."""
    while True:
        before = limits[1:-1].copy()
        cost = _best_edges(sums, np.maximum(low, before - _NEAR), np.minimum(high, before + _NEAR), limits)
        if np.max(np.abs(limits[1:-1] - before)) < _NEAR:
            return cost


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
    cells: Cells, low: NDArray[np.int64], high: NDArray[np.int64], cost: float, most: int, least: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """Return the first and the last edge beside which each limit of the best groups can lie, and the least cost known.

    cost: of good groups; most: the most atoms that a sum was of; least: no groups with limits at these edges cost less.
    Windows are narrowed again while they shrink, as narrower ones bound the distances of means better.
    """
    sums, number = cells.prefixes(), low.size
    # Rounding: of each prefix sum a share of EPSILON an addition, of each group's cost a few of the whole sum.
    rounding = 4 * (max(most, cells.base.size) + 4 * number) * EPSILON * float(sums[2][-1])
    width = np.sqrt(cells.counts * cells.spread)
    bottom, top = (part.view(np.float32).astype(np.float64) for part in (cells.base, cells.top))
    while True:
        found = np.empty((2, number), np.int64)
        possible_windows(*sums, width, bottom, top, cost + rounding, low, high, found)
        before, after = np.sum(high - low), np.sum(found[1] - found[0])
        low, high = found
        if after <= number or (least and after >= _SHRINKS * before):
            return low, high, cost
        if not least:
            cost, least = min(cost, _best_edges(sums, low, high, np.empty(number + 2, np.int64))), True
