"""What is a packed tensor: planes, the numbers of its coefficients, and how they make weights?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.tensors.float8 import as_float16
from cpu_kernels.quantize.packing import BLOCK_STEP
from cpu_kernels.quantize.unpacking import widen

ALWAYS = ("planes", "coef")  # arrays of every tensor of this form
ARRAYS = (*ALWAYS, "column_planes", "in_scale")
LISTED = ("listed_index", "listed_value")  # of a tensor of any form

_SCALED_BY_KERNEL = 1 << 16  # coefficients: NumPy takes 4 ns each, but a small model should not wait for a compiler
_EXPONENTS = 500  # more than float32 has, and well within float64's
MOST = (1 << 31) - 1  # rows, columns, rank
_MOST_PLANES = 16
_LOOKED_UP = 256  # terms; more are quicker looked up than added
_LARGEST_FACTOR = 1e30  # within float32's
_NUMBERS = (np.float16, np.float32, np.uint8)
_NO_PLANES = np.empty((0, 0), np.uint64)


@dataclass(frozen=True)
class PackedTensor:
    """A matrix as planes and coefficients (the formula of docs/format.md), as a method makes it and the store has it.

    The coefficient of term t is 2 ** exponent * sum over i of mix[t][i] * numbers[i]; without a mix, that of
    numbers[t].
    """

    planes: NDArray[np.uint64]  # (planes, rows, words)
    numbers: NDArray[
        Any
    ]  # float16 or 8-bit floats (stored, rows, blocks), or float32 (stored, 1, 1) for a whole matrix
    terms: tuple[int, ...]  # bit masks over planes, column planes after them
    block: int  # columns that share coefficients
    shape: tuple[int, int]
    exponent: int = 0
    mix: tuple[tuple[float, ...], ...] | None = None  # (terms, stored)
    column_planes: NDArray[np.uint64] = field(default_factory=lambda: _NO_PLANES)  # (planes, words)
    in_scale: NDArray[np.float32] | None = None  # (cols,): multiplies the formula's columns
    listed_index: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))  # flat, ascending
    listed_value: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))  # exact values

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays to be stored, by their names in the store."""
        found: dict[str, NDArray[Any]] = {"planes": self.planes, "coef": self.numbers}
        if self.column_planes.size:
            found["column_planes"] = self.column_planes
        if self.in_scale is not None:
            found["in_scale"] = self.in_scale
        if self.listed_index.size:
            found |= {"listed_index": self.listed_index, "listed_value": self.listed_value}
        return found

    def attributes(self) -> dict[str, Any]:
        """Return what the formula needs beside the arrays, as JSON; the shape stands with the method."""
        return {"block": self.block, "terms": list(self.terms), "mix": self.mix, "coef_exponent": self.exponent}

    @property
    def scale_bytes(self) -> int:
        """Bytes of each stored coefficient."""
        return self.numbers.itemsize

    @cached_property
    def coef(self) -> NDArray[np.float32]:
        """The coefficients as the formula takes them, float32 (terms, rows or 1, blocks or 1); made when asked for."""
        coef = _scaled(self.numbers, self.exponent)
        if self.mix is None:
            return coef
        weights = np.array(self.mix, np.float32)
        return np.stack([sum(w * c for w, c in zip(row, coef, strict=True)) for row in weights]).astype(np.float32)

    @cached_property
    def levels(self) -> NDArray[np.float32] | None:
        """What each pattern of a weight's bits stands for, float32 (2 ** planes), bit p being that of plane p.

        None where coefficients belong to rows or blocks, or terms are so few that adding them is as quick.
        """
        count = len(self.planes) + len(self.column_planes)
        if len(self.terms) <= _LOOKED_UP or count > _MOST_PLANES or self.coef.shape[1:] != (1, 1):
            return None
        # The sum over all products of planes is a Walsh transform; in float64, as many more are added than elsewhere.
        coef = np.zeros(1 << count)
        coef[list(self.terms)] = self.coef[:, 0, 0]
        for plane in range(count):
            pairs = coef.reshape(-1, 2, 1 << plane)
            pairs[:] = np.stack([pairs[:, 0] - pairs[:, 1], pairs[:, 0] + pairs[:, 1]], axis=1)
        return coef.astype(np.float32)

    def all_planes(self, rows: slice | NDArray[np.intp] = slice(None)) -> NDArray[np.uint64]:
        """Return the planes of some rows, column planes behind them as if every row had its own."""
        planes = self.planes[:, rows]
        if not len(self.column_planes):
            return np.ascontiguousarray(planes)
        shared = np.broadcast_to(self.column_planes[:, None], (len(self.column_planes), *planes.shape[1:]))
        return np.concatenate([planes, shared])


def assemble(attributes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> PackedTensor:
    """Return the packed tensor of a store's attributes and arrays, by their names in it.

    Raises ValueError where they do not fit together or to the format, KeyError or TypeError where an attribute is
    missing or of another kind.
    """
    rows, cols, exponent = shape_and_exponent(attributes)
    block = whole_number("block", attributes["block"], 1, MOST)
    planes, numbers = arrays["planes"], arrays["coef"]
    if block % BLOCK_STEP and block < cols:
        raise ValueError(f"block {block} is no multiple of {BLOCK_STEP} and less than the {cols} columns")
    units = -(-cols // block)
    if planes.ndim != 3 or planes.shape[1:] != (rows, -(-cols // 64)) or planes.dtype != np.uint64:
        raise ValueError(f"planes {planes.shape} {planes.dtype} do not fit shape {rows} x {cols}")
    column_planes = arrays.get("column_planes", np.empty((0, planes.shape[2]), np.uint64))
    if column_planes.ndim != 2 or column_planes.shape[1] != planes.shape[2] or column_planes.dtype != np.uint64:
        raise ValueError(f"column_planes {column_planes.shape} do not fit {cols} columns")
    in_scale = arrays.get("in_scale")
    if in_scale is not None and (in_scale.shape != (cols,) or in_scale.dtype != np.float32):
        raise ValueError(f"in_scale {in_scale.shape} does not fit {cols} columns")
    count = planes.shape[0] + column_planes.shape[0]
    most = (1 << min(count, _MOST_PLANES)) - 1
    terms = tuple(whole_number("terms", term, 0, most) for term in attributes["terms"])
    if len(set(terms)) != len(terms):
        raise ValueError(f"terms: one of {len(terms)} is there twice")
    whole = numbers.shape[1:] == (1, 1) and units == 1
    if numbers.ndim != 3 or not (whole or numbers.shape[1:] == (rows, units)) or numbers.dtype not in _NUMBERS:
        raise ValueError(f"coef {numbers.shape} {numbers.dtype} does not fit {rows} rows of {units} blocks")
    mix = _factors(attributes["mix"], len(numbers))
    if len(numbers if mix is None else mix) != len(terms):
        raise ValueError(f"{len(terms)} terms do not fit {count} planes and coef")
    index = arrays.get("listed_index", np.empty(0, np.uint64))
    value = arrays.get("listed_value", np.empty(0, np.float32))
    check_listed(index, value, rows * cols)
    return PackedTensor(
        planes, numbers, terms, block, (rows, cols), exponent, mix, column_planes, in_scale, index, value
    )


def check_listed(index: NDArray[Any], value: NDArray[Any], weights: int) -> None:
    """Raise ValueError where listed weights are not those of a matrix with so many weights."""
    if index.shape != value.shape or index.ndim != 1 or index.dtype != np.uint64 or value.dtype != np.float32:
        raise ValueError(f"listed weights: {index.shape} {index.dtype} places, {value.shape} {value.dtype} values")
    if np.any(index[1:] <= index[:-1]):
        raise ValueError("listed weights are not in ascending order")
    if index.size and int(index[-1]) >= weights:
        raise ValueError("listed weights lie outside the matrix")


def shape_and_exponent(attributes: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the rows, columns and exponent that a tensor of any form has; raises ValueError where one cannot be."""
    rows, cols = (whole_number("shape", size, 1, MOST) for size in attributes["shape"])
    return rows, cols, whole_number("coef_exponent", attributes["coef_exponent"], -_EXPONENTS, _EXPONENTS)


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """Return an attribute that is a whole number within these limits; raises ValueError for any other."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: {value!r:.40}; expected a whole number from {least} to {most}")
    return value


def _factors(mix: Any, stored: int) -> tuple[tuple[float, ...], ...] | None:
    """Return the rows of a mix as numbers; raises ValueError where one does not fit so many stored coefficients."""
    if mix is None:
        return None
    if not isinstance(mix, list) or any(not isinstance(row, list) or len(row) != stored for row in mix):
        raise ValueError(f"mix: {mix!r:.40}; expected rows of {stored} factors, one for each stored coefficient")
    rows = tuple(tuple(float(factor) for factor in row) for row in mix)
    if any(not abs(factor) <= _LARGEST_FACTOR for row in rows for factor in row):
        raise ValueError(f"mix: a factor is no number of at most {_LARGEST_FACTOR:g}")
    return rows


def _scaled(numbers: NDArray[Any], exponent: int) -> NDArray[np.float32]:
    """Return numbers * 2 ** exponent as float32."""
    if numbers.dtype == np.uint8:
        numbers = as_float16(numbers)
    if numbers.dtype != np.float16 or numbers.size < _SCALED_BY_KERNEL:
        return np.asarray(np.ldexp(numbers.astype(np.float32), exponent))
    result = np.empty(numbers.shape, np.float32)
    widen(np.ascontiguousarray(numbers).view(np.int16).reshape(-1), 2.0**exponent, result.reshape(-1))
    return result
