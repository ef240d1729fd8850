"""What is a matrix in low-rank form: two sets of ±1 vectors with scales, whose products add up to the weights?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.tensors.packed import MOST, check_listed, shape_and_exponent, whole_number
from cpu_kernels.quantize.packing import words_for

_FEWEST = 16  # weights for which there is at least a bit: the weights take up to 512 times the memory of the bits
_RANKS_AT_ONCE = 512  # whose ±1 vectors are float32 at a time
SCALES = ("row_scale", "rank_scale", "column_scale")
ARRAYS = ("left_planes", "right_planes", *SCALES)


@dataclass(frozen=True)
class LowRankTensor:
    """A matrix in the low-rank form of docs/format.md, as a method makes it and the store has it.

    W[r, c] ~ 2 ** exponent * row_scale[r] * column_scale[c] * sum over k of rank_scale[k] * left[k, r] * right[k, c],
    left and right being +1 and -1.
    """

    left: NDArray[np.uint64]  # (rank, words of rows): bit i of word j is row 64 j + i
    right: NDArray[np.uint64]  # (rank, words of columns)
    row_scale: NDArray[np.float16]  # (rows,)
    rank_scale: NDArray[np.float16]  # (rank,)
    column_scale: NDArray[np.float16]  # (cols,)
    exponent: int = 0
    listed_index: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))  # flat, ascending
    listed_value: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))  # exact values

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (out_features) and cols (in_features)."""
        return self.row_scale.size, self.column_scale.size

    @property
    def rank(self) -> int:
        """How many products of a column and a row of ±1 are added up."""
        return self.rank_scale.size

    @property
    def nbytes(self) -> int:
        """Bytes of planes and scales."""
        return sum(values.nbytes for key, values in self.arrays().items() if key in ARRAYS)

    @property
    def scale_bytes(self) -> int:
        """Bytes of each stored scale."""
        return self.rank_scale.itemsize

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays to be stored, by their names in the store."""
        found: dict[str, NDArray[Any]] = {
            "left_planes": self.left, "right_planes": self.right, "row_scale": self.row_scale,
            "rank_scale": self.rank_scale, "column_scale": self.column_scale,
        }  # fmt: skip
        if self.listed_index.size:
            found |= {"listed_index": self.listed_index, "listed_value": self.listed_value}
        return found

    def attributes(self) -> dict[str, Any]:
        """Return what the formula needs beside the arrays, as JSON; the shape stands with the method."""
        return {"rank": self.rank, "coef_exponent": self.exponent}

    def problem(self) -> str:
        """Return what of the values is not as the format has it; empty if nothing."""
        rows, cols = self.shape
        for name, words, size in (("left_planes", self.left, rows), ("right_planes", self.right, cols)):
            if size % 64 and np.any(words[:, -1] >> np.uint64(size % 64)):
                return f"padding bits of {name} are not zero"
        if not all(np.isfinite(values).all() for values in (self.row_scale, self.rank_scale, self.column_scale)):
            return "a scale is not finite"
        row, column = (float(np.abs(scale).max()) for scale in (self.row_scale, self.column_scale))
        greatest = row * column * float(np.abs(self.rank_scale.astype(np.float64)).sum())
        if greatest and np.log2(greatest) + self.exponent >= 127:
            return "its scales make weights that are not finite in float32"
        return "" if np.isfinite(self.listed_value).all() else "a listed weight is not finite"

    def weights(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Return rows of what the formula gives, float32 (rows, cols), without listed weights.

        Sums are NumPy's float32: their order is that of its BLAS. The caller decides on threads.
        """
        first, last, _ = rows.indices(self.shape[0])
        return self.weights_at(np.arange(first, max(first, last)))

    def weights_at(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Return the rows of these numbers of what the formula gives, float32 (n, cols), without listed weights."""
        cols = self.shape[1]
        total = np.zeros((rows.size, cols), np.float32)
        rank_scale = np.ldexp(self.rank_scale.astype(np.float32), self.exponent)
        for start in range(0, self.rank, _RANKS_AT_ONCE):
            part = slice(start, start + _RANKS_AT_ONCE)
            left = signs_at(self.left[part], rows) * rank_scale[part, None]
            total += left.T @ signs(self.right[part], cols)
        total *= self.row_scale.astype(np.float32)[rows, None]
        total *= self.column_scale.astype(np.float32)
        return total

    def left_by_rows(self, rows: slice) -> NDArray[np.uint64]:
        """Return the left vectors of some rows, a row's bits together: uint64 (rows, words of the rank)."""
        first, last, _ = rows.indices(self.shape[0])
        found = np.zeros((last - first, 8 * words_for(self.rank)), np.uint8)
        begin, end = first // 64, words_for(last)
        bits = _bits(self.left[:, begin:end], 64 * (end - begin))[:, first - 64 * begin : last - 64 * begin]
        packed = np.packbits(np.ascontiguousarray(bits.T), axis=1, bitorder="little")
        found[:, : packed.shape[1]] = packed
        return found.view(np.uint64)


def assemble_low_rank(attributes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> LowRankTensor:
    """Return the low-rank tensor of a store's attributes and arrays, by their names in it.

    Raises ValueError where they do not fit together or to the format, KeyError or TypeError where an attribute is
    missing or of another kind.
    """
    rows, cols, exponent = shape_and_exponent(attributes)
    rank = whole_number("rank", attributes["rank"], 1, MOST)
    wanted = {
        "left_planes": (np.uint64, (rank, words_for(rows))), "right_planes": (np.uint64, (rank, words_for(cols))),
        "row_scale": (np.float16, (rows,)), "rank_scale": (np.float16, (rank,)), "column_scale": (np.float16, (cols,)),
    }  # fmt: skip
    for name, (dtype, shape) in wanted.items():
        found = arrays[name]
        if found.dtype != dtype or found.shape != shape:
            raise ValueError(f"{name} {found.shape} {found.dtype} does not fit rank {rank} of shape {rows} x {cols}")
    if _FEWEST * rank * (rows + cols) < rows * cols:
        raise ValueError(
            f"rank {rank} for shape {rows} x {cols}; expected at least a bit for {_FEWEST} weights, rank "
            f"{-(-rows * cols // (_FEWEST * (rows + cols)))}"
        )
    index = arrays.get("listed_index", np.empty(0, np.uint64))
    value = arrays.get("listed_value", np.empty(0, np.float32))
    check_listed(index, value, rows * cols)
    scales = [arrays[name] for name in SCALES]
    return LowRankTensor(
        arrays["left_planes"], arrays["right_planes"], scales[0], scales[1], scales[2], exponent, index, value
    )


def least_rank(rows: int, cols: int) -> int:
    """Return the smallest rank that the format has for a matrix of this shape."""
    return max(1, -(-rows * cols // (_FEWEST * (rows + cols))))


def signs(words: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """Return the +1 and -1 (n, count) that rows of words (n, words) stand for, as float32."""
    return _bits(words, count).astype(np.float32) * np.float32(2) - np.float32(1)


def signs_at(words: NDArray[np.uint64], places: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Return the +1 and -1 (n, places) at some places of rows of words (n, words), as float32."""
    octets = np.ascontiguousarray(words).view(np.uint8)[:, places // 8]
    bits = octets >> (places % 8).astype(np.uint8) & np.uint8(1)
    return bits.astype(np.float32) * np.float32(2) - np.float32(1)


def packed_signs(values: NDArray[Any]) -> NDArray[np.uint64]:
    """Return the words (n, words) of rows of numbers (n, count): bit 1 where a number is positive or zero."""
    found = np.zeros((len(values), 8 * words_for(values.shape[1])), np.uint8)
    octets = np.packbits(np.ascontiguousarray(values >= 0), axis=1, bitorder="little")
    found[:, : octets.shape[1]] = octets
    return found.view(np.uint64)


def _bits(words: NDArray[np.uint64], count: int) -> NDArray[np.uint8]:
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, count=count, bitorder="little")
