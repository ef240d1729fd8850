"""How are the magnitudes of a float32 matrix counted in cells, ranges of their bit patterns, ever smaller ones?"""

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.quantize.counting import find_zeros
from cpu_kernels.quantize.narrowing import MOST_COUNTED, PARTS_SHIFT, count_cells, split_again, split_first

EPSILON = 2.0**-53
_INFINITY = 0x7F800000
_FEW_KEYS = 1 << 15  # that are sorted sooner than counted in ever smaller cells
_FEW_RANGES = 8  # of patterns: a weight is then compared with each sooner than looked up
_OCTAVE_SHIFT = 23
_OCTAVES = 8  # below the greatest magnitude's, that are not one cell each at first


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


def first_cells(bits: NDArray[np.uint32], shift: int) -> tuple[Cells, int] | None:
    """Return the cells of 2 ** shift patterns and the number of zeros; None where not all is finite."""
    size = 1 << 31 - shift
    scratch, cells, sums = np.zeros(size, np.uint64), np.empty(size, np.int32), np.empty((2, size))
    found = []
    for begin in range(0, bits.size, MOST_COUNTED):
        number = count_cells(bits[begin : begin + MOST_COUNTED], np.uint32(shift), scratch, cells, sums)
        found.append((cells[:number].astype(np.uint32), sums[:, :number].copy()))
    row, total = found[0]
    if len(found) > 1:
        row = np.unique(np.concatenate([own for own, _ in found]))
        total = np.zeros((2, row.size))
        for own, part in found:
            total[:, np.searchsorted(row, own)] += part
    if row[-1] >= _INFINITY >> shift:
        return None
    zeros = int(find_zeros(bits, np.empty(0, np.uint64))) if row[0] == 0 else 0
    total[0, 0] -= zeros
    row, (counts, places) = row[total[0] > 0], total[:, total[0] > 0]
    # No sum of squares is counted, but bounded: it is greatest with all places at either end. As squares it serves too:
    # what is added to the cost of a cell's magnitudes adds the same to every grouping's.
    most = places * ((1 << shift) - 1)
    return _counted(row << np.uint32(shift), shift, counts, places, most, row.astype(np.int64)), zeros


class Finest:
    """The magnitudes that lie in cells which are split, less with every split, counted in parts of these cells."""

    def __init__(self, bits: NDArray[np.uint32], shift: int) -> None:
        self._bits: NDArray[np.uint32] | None = bits  # until the first split
        self._shift = shift  # of the cells that are split first
        self._rows = 1 << 31 - shift
        self.keys, self._parts = np.empty(0, np.uint32), np.empty(0, np.int32)

    def parts(self, cells: Cells, split: NDArray[np.bool_], shift: int) -> tuple[Cells, int]:
        """Return the parts of 2 ** shift patterns of the cells that are split, and shift.

        Where few magnitudes are left, or a cell has fewer patterns than parts, each pattern is a part.
        """
        single = shift < 0
        shift = max(shift, 0)
        slots = np.full(self._rows, -1, np.int32)
        slots[cells.row[split]] = np.arange(np.count_nonzero(split))
        table = np.zeros((np.count_nonzero(split) << PARTS_SHIFT, 3), np.uint64)
        self._rows = table.shape[0]
        if self._bits is not None:
            held = int(cells.counts[split].sum()) + 1
            self.keys, self._parts = np.empty(held, np.uint32), np.empty(held, np.int32)
            left = split_first(
                self._bits, np.uint32(self._shift), slots, *_ranges(cells, split), shift, table, self.keys, self._parts
            )
            self._bits = None
        else:
            left = split_again(self.keys, self._parts, slots, shift, table)
        self.keys, self._parts = self.keys[:left], self._parts[:left]
        if single or left <= _FEW_KEYS:
            base, counts = np.unique(self.keys, return_counts=True)
            number, nothing = counts.astype(np.float64), np.zeros(counts.size)
            return _counted(base, 0, number, nothing, nothing, np.arange(base.size)), 0
        steps = np.arange(1 << PARTS_SHIFT, dtype=np.uint32) << np.uint32(shift)
        row = np.flatnonzero(table[:, 0])
        base = (cells.base[split][:, None] + steps).reshape(-1)[row]
        number, places, squares = table[row].T.astype(np.float64)
        return _counted(base, shift, number, places, squares, row), shift


def _ranges(cells: Cells, split: NDArray[np.bool_]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the runs of cells that are split, each from above a pattern up to another; none where there are many."""
    base, top = cells.base[split], cells.top[split]
    apart = np.flatnonzero(base[1:] != top[:-1] + np.uint32(1)) + 1
    first, last = base[np.append(0, apart)], top[np.append(apart, base.size) - 1]
    few = slice(None) if first.size <= _FEW_RANGES else slice(0)
    return np.ascontiguousarray(np.maximum(first[few], np.uint32(1)) - np.uint32(1)), np.ascontiguousarray(last[few])


def _counted(
    base: NDArray[np.uint32], shift: int, number: NDArray[np.float64], places: NDArray[np.float64],
    squares: NDArray[np.float64], row: NDArray[np.int64],
) -> Cells:  # fmt: skip
    """Return cells of 2 ** shift patterns with the number, the sum and the sum of squares of the places in them."""
    start = base.view(np.float32).astype(np.float64)
    step = np.ldexp(1.0, np.maximum(base >> np.uint32(23), 1).astype(np.int32) - 150)  # between neighbouring patterns
    return Cells(
        base,
        base + np.uint32((1 << shift) - 1),
        number.astype(np.int64),
        number * start + step * places,
        number * start**2 + 2 * start * step * places + step**2 * squares,
        # A bound from above: of one magnitude it is next to nothing, however the squares are rounded.
        step**2 * (np.maximum(squares - places**2 / number, 0.0) + 8 * EPSILON * squares),
        row,
    )


def merged(cells: Cells, shift: int) -> Cells:
    """Return the cells of 2 ** shift patterns that smaller ones make; of small magnitudes, of an octave each."""
    octave = cells.base >> np.uint32(_OCTAVE_SHIFT)
    own = np.where(octave + _OCTAVES < octave[-1:], np.uint32(_OCTAVE_SHIFT), np.uint32(shift)).astype(np.uint32)
    parent = cells.base >> own << own
    first = np.flatnonzero(np.append(True, parent[1:] != parent[:-1]))[: parent.size]
    counts, sums, squares = (np.add.reduceat(part, first) for part in (cells.counts, cells.sums, cells.squares))
    base, width = parent[first], np.uint32(1) << own[first]
    spread = np.maximum(squares - sums**2 / counts, 0.0) + 8 * EPSILON * squares
    return Cells(base, base + (width - np.uint32(1)), counts, sums, squares, spread, np.arange(base.size))


def among(cells: Cells, chosen: NDArray[np.bool_]) -> Cells:
    """Return the cells that are chosen."""
    return Cells(*(getattr(cells, one.name)[chosen] for one in fields(Cells)))


def refined(cells: Cells, split: NDArray[np.bool_], parts: Cells) -> Cells:
    """Return the cells with some of them replaced by their parts; those that stay are not split later."""
    whole = among(replace(cells, row=np.full(cells.base.size, -1)), ~split)
    order = np.argsort(np.concatenate([whole.base, parts.base]), kind="stable")
    return Cells(
        *(np.concatenate([getattr(whole, one.name), getattr(parts, one.name)])[order] for one in fields(Cells))
    )
