"""WGM with one set of groups for a whole matrix, as the paper runs it: by distinct magnitudes, not single weights.

A 16-bit float has at most 32,640 finite magnitudes, so one pass that counts them holds everything that the objective
needs; of float32 weights those near the limits of groups are found (narrowed.py), or all are sorted. The exact solver
keeps equal magnitudes in one group; the paper's two merging algorithms may part them, and then the first in row-major
order are in the lower group.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.declaration import Binarized
from bincompress.methods.rounding.coefficients import sign_terms, unwalsh, walsh
from bincompress.methods.rounding.narrowed import narrowed_groups
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.counting import MAGNITUDES, count_magnitudes, find_zeros
from cpu_kernels.quantize.group_units import assign_groups
from cpu_kernels.quantize.grouping import cost_rows, exact_groups, merged_groups
from cpu_kernels.quantize.narrowing import codes_by_limits
from cpu_kernels.quantize.packing import pack_by_limits, pack_by_table, pack_codes, pack_signs, pack_two, words_for

_CHUNK = 1 << 21  # weights whose codes exist at once
_TABLE_LIMIT = 1 << 28  # bytes of the exact solver's table of choices; past it, limits are found by halving
_FEW_GROUPS = 256  # whose codes are a byte
_WIDE_TABLE_LIMIT = 1 << 25  # in place of _TABLE_LIMIT for more groups: 16-bit weights need no memory beside it
_FEW_LIMITS = 16  # that a weight is compared with sooner than looked up
_MOST_DEPTH = 15  # index planes: with the signs as many planes as a term selects from
_NARROWED = 1 << 16  # float32 weights from which on not all of them are sorted
_LISTED_BYTES = 12  # of a weight kept in a list: its index and its value


class Grouping(Protocol):
    """The settings of the grouping: see `wgm.WgmSettings`."""

    @property
    def groups(self) -> int: ...  # noqa: D102
    @property
    def solver(self) -> str: ...  # noqa: D102
    @property
    def window(self) -> int: ...  # noqa: D102
    @property
    def lam(self) -> float: ...  # noqa: D102
    @property
    def lam_normalized(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Magnitudes:
    """The distinct non-zero magnitudes of a matrix, ascending, how often each occurs, and the number of zeros."""

    keys: NDArray[np.uint32]  # bit patterns without the sign
    values: NDArray[np.float64]
    counts: NDArray[np.int64]
    zeros: int


@dataclass(frozen=True)
class Groups:
    """Prefix sums of the magnitudes at the limits of the groups, each (groups + 1)."""

    positions: NDArray[np.int64]  # in the sorted order of all non-zero magnitudes
    first: NDArray[np.float64]  # sums
    second: NDArray[np.float64]  # sums of squares; between the first and the last place they may be wrong


def binarize(weight: Weight, settings: Grouping) -> Binarized:
    """Return the planes of a matrix: signs, the group of every weight, and float32 Walsh coefficients (terms, 1, 1).

    Raises FloatingPointError where a weight is NaN or infinite, which the count tells.
    """
    rows, cols = weight.shape
    seen, groups = _grouped(weight, settings)
    number = groups.positions.size - 1
    sizes, total, squares = np.diff(groups.positions), np.diff(groups.first), np.diff(groups.second)
    depth = max(0, int(number - 1).bit_length())
    listed = np.empty(0, np.uint64)
    zero_code = 0
    notes: dict[str, object] = {}
    if seen.zeros:
        zero_code = number
        level_bytes = 0 if number < 1 << depth else planes_bytes(rows, cols)
        if level_bytes > _LISTED_BYTES * seen.zeros or (level_bytes and depth == _MOST_DEPTH):
            zero_code = 0
            listed = np.empty(seen.zeros, np.uint64)
            find_zeros(weight.flat, listed)
        elif level_bytes:
            depth += 1
        notes = {"zeros": seen.zeros, "zeros_as": "a list of places" if listed.size else "a level of their own"}
    levels = np.empty((1 << depth, 1, 1))
    levels[:number, 0, 0] = total / np.maximum(sizes, 1)
    levels[number:] = levels[number - 1] if number else 0.0
    if seen.zeros and not listed.size:
        levels[zero_code] = 0.0
    coef = walsh(levels).astype(np.float32)
    stored = unwalsh(coef.astype(np.float64))[:number, 0, 0]
    planes = np.empty((1 + depth, rows, words_for(cols)), np.uint64)
    terms: tuple[int, ...]
    if number == 2 and depth == 1 and not _parted(seen, groups):
        limit = seen.keys[np.searchsorted(np.cumsum(seen.counts), groups.positions[1])]
        pack_two(weight.flat, cols, cols, np.full((rows, 1), limit, weight.bits.dtype), planes)
        kept, terms = coef, (1, 2)
    else:
        pack_signs(weight.flat, cols, planes[0])
        if depth:
            _pack_codes(weight, seen, groups, zero_code, planes[1:])
        kept, terms = sign_terms(planes, cols, coef)
    return Binarized(
        PackedTensor(
            planes,
            kept,
            terms,
            cols,
            (rows, cols),
            listed_index=listed,
            listed_value=np.zeros(listed.size, np.float32),
        ),
        squared_error=max(float(np.sum(squares - 2 * stored * total + stored * stored * sizes)), 0.0),
        squared_norm=float(groups.second[-1]),
        scales=number,
        groups=number,
        notes=notes,
    )


def _grouped(weight: Weight, settings: Grouping) -> tuple[Magnitudes, Groups]:
    """Return the magnitudes and their groups; of large float32 matrices the magnitudes near limits alone are apart."""
    if weight.dtype == "F32" and weight.bits.size >= _NARROWED and settings.solver == "exact" and settings.lam == 0:
        narrowed = narrowed_groups(weight.flat, settings.groups)
        if narrowed is not None:
            cells, limits = narrowed.cells, narrowed.limits
            values = cells.top.view(np.float32).astype(np.float64)
            positions, (_, first, _) = np.concatenate([[0], np.cumsum(cells.counts)]), cells.prefixes()
            seen = Magnitudes(cells.top, values, cells.counts, narrowed.zeros)
            # Of the squares only the sum over all groups is known, and needed.
            second = np.append(np.zeros(limits.size - 1), narrowed.squares)
            return seen, Groups(positions[limits], first[limits], second)
    seen = magnitudes_of(weight)
    if seen.keys.size and not np.isfinite(seen.values[-1]):
        raise FloatingPointError("a weight is NaN or infinite")
    return seen, _solve(seen, settings)


def planes_bytes(rows: int, cols: int) -> int:
    """Return the bytes of one plane."""
    return 8 * rows * words_for(cols)


def magnitudes_of(weight: Weight) -> Magnitudes:
    """Count the distinct magnitudes of a matrix."""
    if weight.dtype == "F32":
        keys, counts = np.unique(weight.flat & np.uint32(0x7FFFFFFF), return_counts=True)
        values = keys.view(np.float32).astype(np.float64)
    else:
        table = np.zeros((4, MAGNITUDES), np.uint32)
        count_magnitudes(weight.flat, table)
        keys = np.flatnonzero(table[0]).astype(np.uint32)
        counts = table[0][keys].astype(np.int64)
        values = Weight(keys.astype(np.uint16)[None], weight.dtype).float32()[0].astype(np.float64)
    zeros = int(counts[0]) if keys.size and keys[0] == 0 else 0
    start = 1 if zeros else 0
    return Magnitudes(keys[start:], values[start:], counts[start:], zeros)


def _prefix(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(values)])


def _solve(seen: Magnitudes, settings: Grouping) -> Groups:
    """Run the solver over atoms of the sorted magnitudes and return the groups' limits with their sums."""
    positions = np.concatenate([[0], np.cumsum(seen.counts)])
    first = _prefix(seen.counts * seen.values)
    second = _prefix(seen.counts * seen.values**2)
    if seen.keys.size == 0:
        return Groups(positions, first, second)
    lam = _lambda(seen, positions, first, settings)
    if settings.solver != "exact":
        window = 1 if settings.solver == "greedy" else settings.window
        places = np.append(np.arange(0, positions[-1], window), positions[-1])
        run = np.minimum(np.searchsorted(positions, places, side="right") - 1, seen.keys.size - 1)
        inside = (places - positions[run]).astype(np.float64)
        first = first[run] + inside * seen.values[run]
        second = second[run] + inside * seen.values[run] ** 2
        positions = places
    count = positions.astype(np.float64)
    if settings.solver == "exact":
        limits = exact_limits(count, first, second, lam, settings.groups)
    else:
        limits = np.empty(settings.groups + 1, np.int64)
        limits = limits[: merged_groups(count, first, second, lam, settings.groups, limits) + 1]
    return Groups(positions[limits], first[limits], second[limits])


def _lambda(seen: Magnitudes, positions: NDArray[np.int64], first: NDArray[np.float64], settings: Grouping) -> float:
    """Return lambda for the cost in sums of squares: the normalised objective is multiplied by n."""
    size = int(positions[-1])
    if not settings.lam_normalized:
        return settings.lam
    if size < 2:
        return 0.0
    half = size // 2
    run = int(np.searchsorted(positions, half, side="right")) - 1
    low = first[run] + (half - positions[run]) * seen.values[min(run, seen.keys.size - 1)]
    apart = (first[-1] - low) / (size - half) - low / half
    gap = 0.0 if seen.counts[0] > 1 else seen.values[1] - seen.values[0]
    least = gap * gap / (3.0 * size)
    return float(size * (least + settings.lam * (size * apart * apart / 12.0 - least)))


def exact_limits(
    count: NDArray[np.float64], first: NDArray[np.float64], second: NDArray[np.float64], lam: float, most: int
) -> NDArray[np.int64]:
    """Return the limits, in atoms, of the at most `most` groups of least total cost.

    count, first, second: float64 (atoms + 1) prefix sums. Memory: 4 * most bytes an atom, or 40 where that is much.
    """
    atoms = count.size - 1
    if most > _FEW_GROUPS and lam == 0 and atoms <= most:  # nothing is less than a group for each
        return np.arange(atoms + 1)
    if 4 * (most + 1) * (atoms + 1) <= (_TABLE_LIMIT if most <= _FEW_GROUPS else _WIDE_TABLE_LIMIT):
        bounds = np.empty(most + 1, np.int64)
        return bounds[: exact_groups(count, first, second, lam, most, bounds) + 1]
    costs, crossing = np.empty(most + 1), np.empty(1, np.int32)
    cost_rows(count, first, second, lam, 0, atoms, most, 1, costs, crossing)
    groups = int(np.argmin(costs))
    bounds = np.empty(groups + 1, np.int64)
    bounds[0], bounds[groups] = 0, atoms
    _halve(count, first, second, lam, bounds, 0, groups)
    return bounds


def _halve(
    count: NDArray[np.float64], first: NDArray[np.float64], second: NDArray[np.float64], lam: float,
    bounds: NDArray[np.int64], begin: int, end: int,
) -> None:  # fmt: skip
    """Fill bounds[begin + 1 .. end - 1] of exactly end - begin groups between two known limits."""
    groups = end - begin
    if groups < 2:
        return
    half = groups // 2
    crossing = np.empty(1, np.int32)
    cost_rows(count, first, second, lam, bounds[begin], bounds[end], groups, half, np.empty(groups + 1), crossing)
    bounds[begin + half] = crossing[0]
    _halve(count, first, second, lam, bounds, begin, begin + half)
    _halve(count, first, second, lam, bounds, begin + half, end)


def _parted(seen: Magnitudes, groups: Groups) -> bool:
    """Return whether equal magnitudes lie in different groups."""
    ends, inner = np.cumsum(seen.counts), groups.positions[1:-1]
    return not np.array_equal(ends[np.searchsorted(ends, inner)], inner)


def _pack_codes(weight: Weight, seen: Magnitudes, groups: Groups, zero_code: int, planes: NDArray[np.uint64]) -> None:
    """Write the group of every weight to the index planes (depth, rows, words)."""
    rows, cols = weight.shape
    ends = np.cumsum(seen.counts)
    last = np.searchsorted(ends, groups.positions[1:], side="left")  # the distinct magnitude that each group ends in
    parted = _parted(seen, groups)
    if weight.dtype != "F32" and not parted:
        table = np.zeros(MAGNITUDES, np.uint16)
        table[seen.keys] = np.searchsorted(last, np.arange(seen.keys.size), side="left")
        table[0] = zero_code
        for first in range(0, len(planes), 8):
            pack_by_table(weight.flat, cols, (table >> first).astype(np.uint8), planes[first : first + 8])
        return
    upper = seen.keys[last]
    if weight.dtype == "F32" and not parted and upper.size <= _FEW_LIMITS:
        pack_by_limits(weight.flat, cols, upper[:-1].astype(np.uint32), zero_code if seen.zeros else -1, planes)
        return
    begins = np.maximum(groups.positions[:-1], ends[last] - seen.counts[last])
    quota = groups.positions[1:] - begins
    quota[-1] = weight.bits.size
    step = max(1, _CHUNK // cols)
    for row in range(0, rows, step):
        part = slice(row, row + step)
        flat = weight.bits[part].reshape(-1)
        if weight.dtype == "F32" and not parted and len(planes) <= 8:
            codes: NDArray[Any] = np.empty(flat.size, np.uint8)
            codes_by_limits(flat, upper[:-1].astype(np.uint32), zero_code, codes)
        else:
            keys = flat.astype(np.uint32) & np.uint32((1 << (8 * flat.itemsize - 1)) - 1)
            codes = np.empty(flat.size, np.uint16)
            assign_groups(keys, upper, quota, codes)
            codes[keys == 0] = zero_code
        for first in range(0, len(planes), 8):
            packed = np.empty((min(8, len(planes) - first), flat.size // cols, planes.shape[2]), np.uint64)
            pack_codes((codes >> first).astype(np.uint8), cols, packed)
            planes[first : first + 8, part] = packed
