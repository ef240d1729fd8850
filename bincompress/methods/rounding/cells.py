"""How are the magnitudes of a float32 matrix counted in cells, ranges of their bit patterns, ever smaller ones?"""

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.quantize.counting import find_zeros
from cpu_kernels.quantize.narrowing import (
    LOOKUP_SHIFT,
    MOST_COUNTED,
    OCTAVE_SHIFT,
    OCTAVES,
    PARTS_SHIFT,
    WIDEST_SHIFT,
    count_cells,
    find_keys,
    split_again,
    split_first,
)  # fmt: skip

EPSILON = 2.0**-53
_FEW_KEYS = 1 << 16  # that are sorted sooner than counted in ever smaller cells
_NARROW_OCTAVES = 6  # above the typical magnitude's
_FEW_RANGES = 8  # of patterns: a weight is then compared with each sooner than looked up


@dataclass(frozen=True)
class Grid:
    """The cells that magnitudes are counted in first: about as wide below a typical magnitude, and wider above it."""

    shifts: NDArray[np.uint32]  # (octaves): a cell has 2 ** shift patterns
    first: NDArray[np.uint32]  # (octaves): number of an octave's first cell, less its pattern in units of a cell
    size: int  # cells

    @staticmethod
    def around(typical: float, shift: int) -> "Grid":
        """Return a grid of cells of 2 ** shift patterns in the octave of a typical magnitude, which is finite."""
        octave = int(np.float32(typical).view(np.uint32)) >> OCTAVE_SHIFT
        octaves = np.arange(OCTAVES)
        shifts = shift + np.maximum(octave - octaves, 0)
        shifts[octaves > octave + _NARROW_OCTAVES] = WIDEST_SHIFT
        shifts = np.minimum(shifts, WIDEST_SHIFT).astype(np.uint32)
        cells = np.append(0, np.cumsum(1 << (OCTAVE_SHIFT - shifts.astype(np.int64))))
        first = cells[:-1] - (octaves << OCTAVE_SHIFT >> shifts)  # modulo 2 ** 32
        return Grid(shifts, first.astype(np.uint32), int(cells[-1]))

    def base(self, row: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return the first pattern of numbered cells, and the shift of each."""
        starts = self.first + (np.arange(OCTAVES, dtype=np.uint32) << np.uint32(OCTAVE_SHIFT) >> self.shifts)
        octave = np.searchsorted(starts, row, side="right") - 1
        shifts = self.shifts[octave]
        return (row.astype(np.uint32) - self.first[octave]) << shifts, shifts


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


def first_cells(bits: NDArray[np.uint32], grid: Grid) -> tuple[Cells, int]:
    """Return the cells of a grid that hold magnitudes, which are finite, and the number of zeros."""
    scratch, cells, sums = np.zeros(grid.size, np.uint64), np.empty(grid.size, np.int32), np.empty((2, grid.size))
    found = []
    for begin in range(0, bits.size, MOST_COUNTED):
        number = count_cells(bits[begin : begin + MOST_COUNTED], grid.shifts, grid.first, scratch, cells, sums)
        found.append((cells[:number].astype(np.int64), sums[:, :number].copy()))
    row, total = found[0]
    if len(found) > 1:
        row = np.unique(np.concatenate([own for own, _ in found]))
        total = np.zeros((2, row.size))
        for own, part in found:
            total[:, np.searchsorted(row, own)] += part
    zeros = int(find_zeros(bits, np.empty(0, np.uint64))) if row[0] == 0 else 0
    if zeros:
        total[0, 0] -= zeros
        row, total = row[total[0] > 0], total[:, total[0] > 0]
    counts, places = total
    base, shifts = grid.base(row)
    places = places - counts * (base & np.uint32((1 << OCTAVE_SHIFT) - 1))  # in the cell
    # No sum of squares is counted, but bounded: it is greatest with all places at either end. As squares it serves too:
    # what is added to the cost of a cell's magnitudes adds the same to every grouping's.
    most = places * ((1 << shifts.astype(np.int64)) - 1)
    return _counted(base, shifts, counts, places, most, row), zeros


class Finest:
    """The magnitudes that lie in cells which are split, less with every split, counted in parts of these cells."""

    def __init__(self, bits: NDArray[np.uint32], grid: Grid) -> None:
        self._bits: NDArray[np.uint32] | None = bits  # until the first split
        self._grid = grid
        self._rows = grid.size
        self.keys, self._parts = np.empty(0, np.uint32), np.empty(0, np.int32)

    def parts(self, cells: Cells, split: NDArray[np.bool_]) -> tuple[Cells, bool]:
        """Return the parts of the cells that are split, and whether each is a single pattern.

        They are where few magnitudes are left, or no cell has more patterns than parts.
        """
        row = cells.row[split]
        width = (cells.top[split] - cells.base[split]).astype(np.float64) + 1.0
        shifts = np.maximum(np.log2(width).astype(np.int64) - PARTS_SHIFT, 0).astype(np.uint32)
        slots = np.full(self._rows, -1, np.int32)
        slots[row] = np.arange(row.size)
        if self._bits is not None:
            known = self._grid.shifts, self._grid.first
            self.keys = np.empty(self._bits.size + 1, np.uint32)
            tables = (slots >= 0).astype(np.int8), _near(cells, split)
            left = find_keys(self._bits, *known, *tables, *_ranges(cells, split), self.keys)
            self.keys, self._bits = self.keys[:left].copy(), None
            if self.keys.size <= _FEW_KEYS:
                return self._patterns(), True
            self._parts = np.empty(self.keys.size, np.int32)
            table = np.zeros((row.size << PARTS_SHIFT, 3), np.uint64)
            split_first(self.keys, *known, slots, shifts, table, self._parts)
        else:
            table = np.zeros((row.size << PARTS_SHIFT, 3), np.uint64)
            left = split_again(self.keys, self._parts, slots, shifts, table)
            self.keys, self._parts = self.keys[:left], self._parts[:left]
            if left <= _FEW_KEYS:
                return self._patterns(), True
        self._rows = table.shape[0]
        steps = np.arange(1 << PARTS_SHIFT, dtype=np.uint32) << shifts[:, None]
        own = np.flatnonzero(table[:, 0])
        number, places, squares = table[own].T.astype(np.float64)
        base = (cells.base[split][:, None] + steps).reshape(-1)[own]
        return _counted(base, shifts[own >> PARTS_SHIFT], number, places, squares, own), not shifts.any()

    def _patterns(self) -> Cells:
        """Return a cell for each pattern."""
        self.keys.sort()
        first = np.flatnonzero(np.append(True, self.keys[1:] != self.keys[:-1])[: self.keys.size])
        number = np.diff(np.append(first, self.keys.size)).astype(np.float64)
        nothing = np.zeros(first.size)
        return _counted(
            self.keys[first], np.zeros(first.size, np.uint32), number, nothing, nothing, np.arange(first.size)
        )


def _near(cells: Cells, split: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Return which ranges of 2 ** LOOKUP_SHIFT patterns have patterns of cells that are split."""
    ends = np.zeros((1 << 31 - LOOKUP_SHIFT) + 1, np.int64)
    np.add.at(ends, cells.base[split] >> np.uint32(LOOKUP_SHIFT), 1)
    np.add.at(ends, (cells.top[split] >> np.uint32(LOOKUP_SHIFT)) + np.uint32(1), -1)
    return (np.cumsum(ends[:-1]) > 0).astype(np.int8)


def _ranges(cells: Cells, split: NDArray[np.bool_]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the runs of cells that are split, each from above a pattern up to another; none where there are many."""
    base, top = cells.base[split], cells.top[split]
    apart = np.flatnonzero(base[1:] != top[:-1] + np.uint32(1)) + 1
    first, last = base[np.append(0, apart)], top[np.append(apart, base.size) - 1]
    few = slice(None) if first.size <= _FEW_RANGES else slice(0)
    return np.ascontiguousarray(np.maximum(first[few], np.uint32(1)) - np.uint32(1)), np.ascontiguousarray(last[few])


def _counted(
    base: NDArray[np.uint32], shifts: NDArray[np.uint32], number: NDArray[np.float64], places: NDArray[np.float64],
    squares: NDArray[np.float64], row: NDArray[np.int64],
) -> Cells:  # fmt: skip
    """Return cells of 2 ** shift patterns with the number, the sum and the sum of squares of the places in them."""
    start = base.view(np.float32).astype(np.float64)
    exponent = np.maximum(base >> np.uint32(OCTAVE_SHIFT), 1).astype(np.int32) - 150
    step = np.ldexp(1.0, exponent)  # between neighbouring patterns
    return Cells(
        base,
        base + ((np.uint32(1) << shifts) - np.uint32(1)),
        number.astype(np.int64),
        number * start + step * places,
        number * start**2 + 2 * start * step * places + step**2 * squares,
        # A bound from above: of one magnitude it is next to nothing, however the squares are rounded.
        step**2 * (np.maximum(squares - places**2 / number, 0.0) + 8 * EPSILON * squares),
        row,
    )


def merged(cells: Cells, grid: Grid, shift: int) -> Cells:
    """Return the cells that those of a grid make which are 2 ** shift times as wide, but in one octave."""
    octave = cells.base >> np.uint32(OCTAVE_SHIFT)
    own = np.minimum(grid.shifts + np.uint32(shift), np.uint32(OCTAVE_SHIFT))[octave]
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
