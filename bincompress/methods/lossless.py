"""Matrices of a few values a block, as models trained at low bits have them: planes and scales that are exact.

Every weight is held against what a reader of the store will get; where one differs, the method refuses the matrix.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import LossError
from bincompress.methods.declaration import Binarized, Method, Recognized, Settings, Size
from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding.few_levels import CELL, Fit, crowded, fit, reached, split
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import FINITE, Weight
from cpu_kernels.quantize.counting import greatest_magnitude
from cpu_kernels.quantize.few_levels import MOST_LEVELS, level_codes
from cpu_kernels.quantize.packing import BLOCK_STEP, pack_codes, words_for

_CHUNK = 1 << 20  # weights that are float32 at once


@dataclass(frozen=True)
class LosslessSettings(Settings):
    """Nothing to choose: planes, scales and blocks follow from the weights."""

    method: ClassVar[str] = "lossless"

    def record(self) -> dict[str, Any]:
        """Return what matters to the bytes, as JSON."""
        return {"method": self.method}

    def problem(self, shape: tuple[int, int]) -> str:
        """Return what is wrong beyond single values; empty if nothing."""
        if self.block != LosslessSettings().block:
            return f"method {self.method} finds the blocks itself; leave --block {self.block} out"
        return ""


def binarize(weight: Weight, settings: LosslessSettings, inputs: Inputs | None = None) -> Binarized:
    """Return planes and numbers that give every weight exactly (-0 as 0); raises LossError where there are none."""
    rows, cols = weight.shape
    found = fit(weight)
    if found is None:
        raise LossError(_why(weight))
    codebook = split(found.form.codebook) if found.split else found.form.codebook
    block = cols if found.block == "matrix" else found.block
    planes = np.empty((codebook.planes, rows, words_for(cols)), np.uint64)
    tensor = PackedTensor(
        planes, found.numbers, codebook.terms, block, (rows, cols), found.exponent, codebook.mix,
    )  # fmt: skip
    if found.split:
        tensor = replace(tensor, column_planes=_second_halves(cols))
    _write_planes(weight, found, planes)
    squares, most = 0.0, 0
    for part in _parts(rows, cols):
        values = weight.float32(part)
        wrong = dequantize(tensor, part) != values
        if wrong.any():
            row, col = (int(place) for place in np.argwhere(wrong)[0])
            raise LossError(f"row {part.start + row}, column {col}: {values[row, col]} is none of its block's levels")
        squares += float(np.sum(np.square(values, dtype=np.float64)))
        most = max(most, found.form.most)
    unit = found.block if found.block == "matrix" else "row" if block >= cols else CELL if found.split else block
    return Binarized(
        tensor,
        squared_error=0.0,
        squared_norm=squares,
        scales=found.numbers.size,
        groups=most,
        notes={"lossless": True, "levels": found.form.text, "unit": unit},
    )


def recognize(sample: Weight, shape: tuple[int, int]) -> Recognized | None:
    """Return what a matrix takes by this method, as told by some of its rows or by all; None where it is none for it.

    A matrix that would not become smaller is none, either.
    """
    rows, cols = shape
    found = fit(sample)
    if found is None or greatest_magnitude(sample.flat) > FINITE[sample.dtype]:
        return None
    units = 1 if found.block == "matrix" else rows * -(-cols // found.block)
    planes = found.form.codebook.planes
    size = 8 * planes * rows * words_for(cols) + found.numbers.itemsize * len(found.numbers) * units
    return Recognized(size, planes, found.form.text) if size < rows * cols * sample.bits.itemsize else None


def _parts(rows: int, cols: int) -> list[slice]:
    step = max(1, _CHUNK // cols)
    return [slice(row, min(rows, row + step)) for row in range(0, rows, step)]


def _second_halves(cols: int) -> NDArray[np.uint64]:
    """Return the column plane (1, words) whose bits are the second halves of blocks of 64 columns."""
    second = np.arange(cols) % BLOCK_STEP >= CELL
    planes = np.empty((1, 1, words_for(cols)), np.uint64)
    pack_codes(second.astype(np.uint8), cols, planes)
    return planes.reshape(1, -1)


def _write_planes(weight: Weight, found: Fit, planes: NDArray[np.uint64]) -> None:
    """Write the planes of the levels that weights are; raises LossError for a weight that is none."""
    rows, cols = weight.shape
    numbers = np.ldexp(found.numbers.astype(np.float32), found.exponent)
    step = CELL if found.split else cols if found.block == "matrix" else found.block
    for part in _parts(rows, cols):
        own = numbers if numbers.shape[1] == 1 else numbers[:, part]
        if found.split:
            codebook = split(found.form.codebook)
            halves = np.stack([reached(codebook, own, bit) for bit in (0, 1)], axis=2)
            levels = halves.reshape(own.shape[1], -1, halves.shape[-1])
        else:
            levels = reached(found.form.codebook, own)
        count = part.stop - part.start
        levels = np.ascontiguousarray(np.broadcast_to(levels, (count, *levels.shape[1:])))
        codes = np.empty((count, cols), np.uint8)
        values = np.ascontiguousarray(weight.float32(part))
        if level_codes(values, step, levels, codes):
            row, col = (int(place) for place in np.argwhere(codes == 255)[0])
            raise LossError(f"row {part.start + row}, column {col}: {values[row, col]} is none of its block's levels")
        packed = np.empty((len(planes), count, planes.shape[2]), np.uint64)
        pack_codes(codes.reshape(-1), cols, packed)
        planes[:, part] = packed


def _why(weight: Weight) -> str:
    """Return where a matrix has too many values, or that no form has those which it has."""
    place = crowded(weight)
    if place is None:
        return "no planes and scales give its values exactly"
    row, first, last = place
    return f"row {row}, columns {first} to {last - 1} hold more than {MOST_LEVELS} different values"


METHOD = Method(
    summary="matrices of at most four values a block, as models trained at low bits have: every weight exactly",
    settings=LosslessSettings,
    binarize=binarize,
    size=lambda settings: Size(2, 1),
    scratch_bytes=lambda settings, dtype: 4.0,
    embeddings={"lossless": LosslessSettings()},
    recognize=recognize,
)
