"""Which planes and numbers give a matrix of few values exactly? Forms of one plane and two, coarse and fine blocks.

A form fits a block where its levels, computed as a reader of the store computes them, have every value that occurs.
Of the forms and blocks that fit, the one with the fewest bytes is taken.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.rounding.codebook import Codebook
from bincompress.methods.rounding.coefficients import from_float16, to_float16
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.few_levels import MOST_LEVELS, find_levels, merge_levels
from cpu_kernels.quantize.packing import BLOCK_STEP, words_for

Floats = NDArray[np.float32]
CELL = 32  # columns of the finest blocks that have scales of their own
_WEIGHTS_A_NUMBER = 4  # at least: with fewer, any matrix of a few columns would have "few levels"
_NEAR = 2  # floats to both sides that are tried where sums round
_LIFT = 15  # float16 reaches so many powers of two above 1, where the numbers' range needs them


@dataclass(frozen=True)
class Form:
    """One way to spell a few levels: its codebook, and the numbers that it would need for a block's values."""

    text: str  # the levels, for a report
    most: int  # different values of a block
    codebook: Codebook
    numbers: Callable[[Floats], list[Floats]]  # of values (rows, units, 4), each (rows, units)


class Fit(NamedTuple):
    """A form with the blocks that it fits and the numbers to store."""

    form: Form
    block: int | Literal["matrix"]  # columns, or one block for the whole matrix
    split: bool  # whether a column plane parts each block of 64 columns into two that have numbers of their own
    numbers: NDArray[Any]  # float16 or float32 (stored, rows, blocks), or float32 (stored, 1, 1)
    exponent: int


def _greatest(values: Floats) -> Floats:
    return np.asarray(np.abs(values).max(axis=2))


def _step(values: Floats) -> list[Floats]:
    """Return half of d for levels -d, 0, d and 2 d; the level of greatest magnitude is 2 d where others are half."""
    greatest = _greatest(values)
    ternary = np.all((np.abs(values) == greatest[..., None]) | (values == 0), axis=2)
    signed = np.where(values.max(axis=2) == greatest, greatest, -greatest)
    return [np.where(ternary, greatest / 2, signed / 4)]


def _third(values: Floats) -> list[Floats]:
    """Return s for levels -3 s, -s, s and 3 s."""
    greatest = _greatest(values)
    return [np.where(np.all(np.abs(values) == greatest[..., None], axis=2), greatest, greatest / np.float32(3))]


FORMS = (
    Form("-s, s", 2, Codebook(1, (1,)), lambda v: [_greatest(v)]),
    Form("a, b", 2, Codebook(1, (0, 1), ((0.5, 0.5), (-0.5, 0.5))), lambda v: [v.min(axis=2), v.max(axis=2)]),
    Form("-s, 0, s", 3, Codebook(2, (1, 2), ((0.5,), (0.5,))), lambda v: [_greatest(v)]),
    # In this order every partial sum of float32 is exact.
    Form("-d, 0, d, 2 d", 4, Codebook(2, (0, 1, 2), ((1.0,), (1.0,), (2.0,))), _step),
    Form("-3 s, -s, s, 3 s", 4, Codebook(2, (1, 2), ((2.0,), (1.0,))), _third),
    Form(
        "-a, -b, b, a", 4, Codebook(2, (1, 2), ((0.5, 0.5), (0.5, -0.5))),
        lambda v: [_greatest(v), np.abs(v).min(axis=2)],
    ),
    Form(
        "0, a, b, a + b", 4, Codebook(2, (0, 1, 2), ((0.5, 0.5), (0.5, 0.0), (0.0, 0.5))),
        lambda v: [np.maximum(v.max(axis=2), np.float32(0)), np.minimum(v.min(axis=2), np.float32(0))],
    ),
    Form(
        "a, b, c, d", 4,
        Codebook(
            2, (0, 1, 2, 3),
            (
                (0.25, 0.25, 0.25, 0.25), (-0.25, 0.25, -0.25, 0.25),
                (-0.25, -0.25, 0.25, 0.25), (0.25, -0.25, -0.25, 0.25),
            ),
        ),
        lambda v: list(np.moveaxis(_distinct(v), 2, 0)),
    ),
)  # fmt: skip


def _distinct(values: Floats) -> Floats:
    """Return the values of each unit in ascending order, each once, the greatest repeated to make four."""
    ordered = np.sort(values, axis=2)
    again = np.concatenate([np.zeros((*ordered.shape[:2], 1), bool), ordered[..., 1:] == ordered[..., :-1]], axis=2)
    return np.sort(np.where(again, ordered[..., -1:], ordered), axis=2)


def split(codebook: Codebook) -> Codebook:
    """Return the codebook whose numbers are those of the first and of the second half of a block, a column plane apart.

    A coefficient c of the first half and d of the second are (c + d) / 2 and, times the column plane, (d - c) / 2.
    """
    column = 1 << codebook.planes
    mix = codebook.mix or tuple(tuple(float(i == t) for i in range(len(codebook.terms))) for t in range(codebook.coefs))
    halves = [tuple(0.5 * factor for factor in row) for row in mix]
    both = [(*row, *row) for row in halves]
    apart = [(*(-factor for factor in row), *row) for row in halves]
    terms = (*codebook.terms, *(term | column for term in codebook.terms))
    return Codebook(codebook.planes, terms, (*both, *apart), 1)


def reached(codebook: Codebook, numbers: Floats, column_bit: int = 0) -> Floats:
    """Return the levels (..., codes) that numbers (stored, ...) give, in the steps in which a reader adds them.

    column_bit: of the column plane, where there is one. See `PackedTensor.coef` and `dequantize`.
    """
    coef = list(numbers)
    if codebook.mix is not None:
        factors = np.array(codebook.mix, np.float32)
        coef = [sum(w * c for w, c in zip(row, numbers, strict=True)) for row in factors]
    levels = np.zeros((*numbers.shape[1:], 1 << codebook.planes), np.float32)
    for code in range(1 << codebook.planes):
        bits = code | column_bit << codebook.planes
        for mask, value in zip(codebook.terms, coef, strict=True):
            # The product is -1 where an odd number of the term's planes are.
            levels[..., code] += -value if (mask & ~bits).bit_count() % 2 else value
    return levels


def crowded(weight: Weight) -> tuple[int, int, int] | None:
    """Return the row, and the first and the last column + 1, of a cell of more than four values; None without one."""
    found = _Units.of(weight).counts > MOST_LEVELS
    if not found.any():
        return None
    row, cell = (int(place) for place in np.argwhere(found)[0])
    return row, cell * CELL, min(weight.shape[1], (cell + 1) * CELL)


def fit(weight: Weight) -> Fit | None:
    """Return the form and blocks of fewest bytes that give every value of a matrix; None where there is none.

    What is found is to be held against the weights themselves: a value that is not finite may pass.
    """
    rows, cols = weight.shape
    cells = _Units.of(weight)
    if cells.counts.max() > MOST_LEVELS:
        return None
    known: dict[int | str, _Units] = {CELL: cells}
    best: tuple[float, Fit] | None = None
    for size, form, block, halves in sorted(_candidates(rows, cols), key=lambda each: each[0]):
        if best is not None and size >= best[0]:
            break
        key = CELL if halves else block
        if key not in known:
            known[key] = cells.joined(block)
        if known[key].counts.max() > form.most:
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # such numbers equal no value
            found = _fitted(form, block, halves, known[key])
        if found is not None and _WEIGHTS_A_NUMBER * found.numbers.size <= weight.bits.size:
            actual = size + (found.numbers.nbytes - 2 * found.numbers.size if block != "matrix" else 0)
            if best is None or actual < best[0]:
                best = actual, found
    return best[1] if best else None


def _candidates(rows: int, cols: int) -> Iterator[tuple[float, Form, int | Literal["matrix"], bool]]:
    """Yield the bytes of each form and block with float16 numbers, the form, the block and whether it is split."""
    blocks: list[int | Literal["matrix"]] = ["matrix", cols]
    block = BLOCK_STEP
    while block < cols:
        blocks.append(block)
        block *= 2
    plane = 8 * rows * words_for(cols)
    for form in FORMS:
        stored = form.codebook.coefs
        for unit in blocks:
            units = 1 if unit == "matrix" else rows * -(-cols // unit)
            yield form.codebook.planes * plane + (4 if unit == "matrix" else 2) * stored * units, form, unit, False
        if cols > CELL:
            units = rows * -(-cols // BLOCK_STEP)
            yield form.codebook.planes * plane + plane // rows + 4 * stored * units, form, BLOCK_STEP, True


def _fitted(form: Form, block: int | Literal["matrix"], halves: bool, units: "_Units") -> Fit | None:
    values = units.values()
    numbers = np.stack(form.numbers(values)).astype(np.float32)
    if halves:
        first, second = numbers[..., ::2], numbers[..., 1::2]
        if second.shape[2] < first.shape[2]:
            second = np.concatenate([second, first[..., -1:]], axis=2)
        numbers = np.concatenate([first, second])
    good = _good(form, numbers, halves, values)
    if not good.all() and len(numbers) == 2:  # sums that round: others nearby may round to the values
        numbers = _nearby(form, numbers, halves, values, good)
        good = _good(form, numbers, halves, values)
    if not good.all():
        return None
    if block == "matrix":
        return Fit(form, block, halves, numbers, 0)
    return Fit(form, block, halves, *_stored(numbers))


def _good(form: Form, numbers: Floats, halves: bool, values: Floats) -> NDArray[np.bool_]:
    """Return for each block of numbers (stored, rows, blocks) whether its levels have all the values (rows, units, 4).

    halves: two units a block.
    """
    if halves:
        codebook = split(form.codebook)
        levels = np.stack([reached(codebook, numbers, bit) for bit in (0, 1)], axis=2)
        levels = levels.reshape(values.shape[0], -1, levels.shape[-1])[:, : values.shape[1]]
    else:
        levels = reached(form.codebook, numbers)
    good: NDArray[Any] = np.ones(values.shape[:2], bool)
    for number in range(values.shape[2]):
        good &= np.any(levels == values[..., number, None], axis=2)
    if not halves:
        return good
    padded: NDArray[Any] = np.ones((len(good), 2 * numbers.shape[2]), bool)
    padded[:, : good.shape[1]] = good
    pairs: NDArray[np.bool_] = padded[:, ::2] & padded[:, 1::2]
    return pairs


def _nearby(form: Form, numbers: Floats, halves: bool, values: Floats, good: NDArray[np.bool_]) -> Floats:
    """Return pairs of numbers, each up to two floats away, that give the values, as far as there are such."""
    near = [numbers]
    for _ in range(_NEAR):
        near = [np.nextafter(near[0], np.float32(-np.inf)), *near, np.nextafter(near[-1], np.float32(np.inf))]
    found, good = numbers.copy(), good.copy()
    for first in near:
        for second in near:
            tried = np.stack([first[0], second[1]])
            better = ~good & _good(form, tried, halves, values)
            found[:, better] = tried[:, better]
            good |= better
        if good.all():
            break
    return found


def _stored(numbers: Floats) -> tuple[NDArray[Any], int]:
    """Return the numbers as float16 and their exponent where that is exact, else as float32."""
    exponent = to_float16(numbers.astype(np.float64))[1]
    for lift in (0, _LIFT):
        tried = np.ldexp(numbers.astype(np.float64), lift - exponent).astype(np.float16)
        if np.array_equal(from_float16(tried, exponent - lift), numbers):
            return tried, exponent - lift
    return numbers, 0


@dataclass(frozen=True)
class _Units:
    """The different values of each unit of a matrix, as bit patterns."""

    levels: NDArray[Any]  # (rows, units, 4)
    counts: NDArray[np.uint8]  # (rows, units); five where there are more
    dtype: str

    @classmethod
    def of(cls, weight: Weight) -> "_Units":
        """Find them in cells of 32 columns."""
        rows, cols = weight.shape
        units = -(-cols // CELL)
        found = cls._empty(rows, units, weight.bits.dtype, weight.dtype)
        find_levels(weight.flat, cols, CELL, found.levels, found.counts)
        return found

    @classmethod
    def _empty(cls, rows: int, units: int, item: Any, dtype: str) -> "_Units":
        return cls(np.empty((rows, units, MOST_LEVELS), item), np.empty((rows, units), np.uint8), dtype)

    def joined(self, block: int | Literal["matrix"]) -> "_Units":
        """Return the units of so many columns, or the one of the matrix."""
        rows, cells = self.counts.shape
        levels, counts, factor = self.levels, self.counts, cells
        if block == "matrix":
            levels, counts = levels.reshape(1, rows * cells, -1), counts.reshape(1, rows * cells)
            rows, factor = 1, rows * cells
        else:
            factor = min(cells, -(-block // CELL))
        found = self._empty(rows, -(-counts.shape[1] // factor), levels.dtype, self.dtype)
        merge_levels(levels, counts, factor, found.levels, found.counts)
        return found

    def values(self) -> Floats:
        """Return them as numbers; where there are fewer than four, the first is repeated."""
        places = np.arange(MOST_LEVELS)
        levels = np.where(places < self.counts[..., None], self.levels, self.levels[..., :1])
        rows, units, most = levels.shape
        return Weight(levels.reshape(rows, units * most), self.dtype).float32().reshape(rows, units, most)
