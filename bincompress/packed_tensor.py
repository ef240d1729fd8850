"""What is a packed tensor once it is read: planes, the numbers of its coefficients, and how they make weights?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.float8 import as_float16
from cpu_kernels.packing import BLOCK_STEP
from cpu_kernels.unpacking import widen

_SCALED_BY_KERNEL = 1 << 16  # coefficients: NumPy takes 4 ns each, but a small model should not wait for a compiler
_EXPONENTS = 500  # well within float64's
_NO_PLANES = np.empty((0, 0), np.uint64)


@dataclass(frozen=True)
class Packed:
    """A packed tensor as the store has it."""

    planes: NDArray[np.uint64]  # (planes, rows, words)
    numbers: NDArray[Any]  # float16, or float32 for a whole matrix (stored, rows or 1, blocks or 1)
    exponent: int  # coefficients are 2 ** exponent times the numbers, or times what `mix` makes of them
    mix: tuple[tuple[float, ...], ...] | None  # (terms, stored)
    terms: tuple[int, ...]
    block: int
    shape: tuple[int, int]
    listed_index: NDArray[np.uint64]  # flat places of weights kept as they are
    listed_value: NDArray[np.float32]
    attributes: dict[str, Any]
    column_planes: NDArray[np.uint64] = field(default_factory=lambda: _NO_PLANES)  # (planes, words)
    in_scale: NDArray[np.float32] | None = None  # (cols,): what the formula's columns are to be multiplied by

    @cached_property
    def coef(self) -> NDArray[np.float32]:
        """The coefficients as the formula takes them, float32 (terms, rows or 1, blocks or 1); made when asked for."""
        coef = _scaled(self.numbers, self.exponent)
        if self.mix is None:
            return coef
        weights = np.array(self.mix, np.float32)
        return np.stack([sum(w * c for w, c in zip(row, coef, strict=True)) for row in weights]).astype(np.float32)

    def all_planes(self, rows: slice | NDArray[np.intp] = slice(None)) -> NDArray[np.uint64]:
        """Return the planes of some rows, column planes behind them as if every row had its own."""
        planes = self.planes[:, rows]
        if not len(self.column_planes):
            return np.ascontiguousarray(planes)
        shared = np.broadcast_to(self.column_planes[:, None], (len(self.column_planes), *planes.shape[1:]))
        return np.concatenate([planes, shared])


def assemble(attributes: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Packed:
    """Return the packed tensor of a store's attributes and arrays, by their names in it.

    Raises ValueError where they do not fit together, KeyError or TypeError where an attribute is missing or odd.
    """
    rows, cols = (int(size) for size in attributes["shape"])
    block, terms = int(attributes["block"]), tuple(int(term) for term in attributes["terms"])
    mix, exponent = attributes["mix"], int(attributes["coef_exponent"])
    planes, stored = arrays["planes"], arrays["coef"]
    if block < 1 or (block % BLOCK_STEP and block < cols):
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
    coded = stored.dtype == np.uint8
    if stored.ndim != 3 or stored.shape[1:] not in ((rows, units), (1, 1)) or not (coded or stored.dtype.kind == "f"):
        raise ValueError(f"coef {stored.shape} does not fit {rows} rows of {units} blocks")
    if len(mix or stored) != len(terms) or any(not 0 <= term < 1 << count for term in terms):
        raise ValueError(f"{len(terms)} terms do not fit {count} planes and coef")
    if mix is not None and any(len(row) != len(stored) for row in mix):
        found = [len(row) for row in mix]
        raise ValueError(f"mix: rows of {found} factors do not fit {len(stored)} stored coefficients")
    index = arrays.get("listed_index", np.empty(0, np.uint64))
    value = arrays.get("listed_value", np.empty(0, np.float32))
    if index.shape != value.shape or index.ndim != 1 or (index.size and int(index.max()) >= rows * cols):
        raise ValueError("listed weights lie outside the matrix")
    return Packed(
        planes,
        as_float16(stored) if coded else stored,
        exponent,
        None if mix is None else tuple(tuple(float(factor) for factor in row) for row in mix),
        terms,
        block,
        (rows, cols),
        index,
        value,
        attributes,
        column_planes,
        in_scale,
    )


def _scaled(numbers: NDArray[Any], exponent: int) -> NDArray[np.float32]:
    """Return numbers * 2 ** exponent as float32."""
    if numbers.dtype != np.float16 or numbers.size < _SCALED_BY_KERNEL or abs(exponent) > _EXPONENTS:
        return np.asarray(np.ldexp(numbers.astype(np.float32), exponent))
    result = np.empty(numbers.shape, np.float32)
    widen(np.ascontiguousarray(numbers).view(np.int16).reshape(-1), 2.0**exponent, result.reshape(-1))
    return result
