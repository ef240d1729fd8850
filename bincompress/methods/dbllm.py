"""DB-LLM's flexible dual binarization (arXiv 2402.11960): w ~ a1 * b1 + a2 * b2 with b1, b2 in {0, 1} and a1 > 0 > a2.

The store knows planes of +1 and -1, so b = (1 + plane) / 2: two terms of half a scale, and half the scales' sum as
offset. Both follow from the two scales by `mix`, and only these are stored.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.declaration import Binarized, Block, CompensatedSettings, Method, Size, option
from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding import calibrated
from bincompress.methods.rounding.codebook import Codebook
from bincompress.methods.rounding.coefficients import from_float16, to_float16
from bincompress.methods.rounding.initial_scales import Found
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.dual_planes import dual_planes, rounding_steps
from cpu_kernels.quantize.packing import pack_codes, words_for

TERMS = (0, 1, 2)
MIX = ((0.5, 0.5), (0.5, 0.0), (0.0, 0.5))
_CHUNK = 1 << 21  # weights that are float32 at once


@dataclass(frozen=True)
class DbllmSettings(CompensatedSettings):
    """How a tensor becomes two {0, 1} planes."""

    method: ClassVar[str] = "dbllm"
    block: Block = option(64, "columns of a row that share scales, a whole row, or the whole matrix")  # as the paper

    def record(self) -> dict[str, Any]:
        """Return what matters to the bytes, as JSON."""
        return self.calibrated_record() if self.calibrated else {"method": self.method, "block": self.block}

    def problem(self, shape: tuple[int, int]) -> str:
        """Return what is wrong beyond single values; empty if nothing."""
        if self.block == "matrix":
            return "method dbllm takes scales per row or row-block, found block matrix"
        if self.calibrated and self.scale_bits == 8:
            return "8-bit scales have no sign, and dbllm's coefficients do"
        return super().problem(shape)


def binarize(weight: Weight, settings: DbllmSettings, inputs: Inputs | None = None) -> Binarized:
    """Return two {0, 1} planes and their scales per row-block or row, from rounding to 2 bits.

    The levels of rounding with a step s are -s, 0, s and 2 s, so a1 = 2 s and a2 = -s; s is the step of least squared
    error. Stored numbers (2, rows, blocks): a1 and a2. inputs: those of the layer, where settings.compensate asks for
    them; the planes and scales then start from that step, block by block, and are found with error compensation.
    """
    rows, cols = weight.shape
    block = settings.block_columns(cols)
    if inputs is not None:
        scheme = calibrated.Scheme(Codebook(2, TERMS, MIX), _start, 4, 2)
        found = calibrated.binarize(weight, settings, inputs, scheme)
        return replace(found, notes={**found.notes, **sparsity(found.tensor.planes, cols)})
    steps = np.empty((rows, -(-cols // block)), np.float32)
    norm = 0.0
    for part in _parts(rows, cols):
        values = weight.float32(part)
        steps[part] = _steps(values, block, steps.shape[1])
        norm += float(np.sum(np.square(values, dtype=np.float64)))
    numbers, exponent = to_float16(np.stack([2.0 * steps, -steps]).astype(np.float64))
    planes, error = _chosen(weight, from_float16(numbers, exponent), block)
    return Binarized(
        PackedTensor(planes, numbers, TERMS, block, (rows, cols), exponent, MIX),
        squared_error=error,
        squared_norm=norm,
        scales=numbers.size,
        groups=4,
        notes=sparsity(planes, cols),
    )


def choose_planes(weight: Weight, scales: NDArray[np.float32], block: int) -> NDArray[np.uint64]:
    """Return the planes (2, rows, words) of the level nearest to each weight for scales a1 and a2, (2, rows, blocks).

    The levels are 0, a1, a2 and a1 + a2. The paper's formulas, b1 = H(w - (a1 + a2) / 2) and
    b2 = H(-(w - a1 * b1 - a2 / 2)) with H the unit step, give the nearest where a1 + a2 >= 0; once training has made
    the sum negative they do not, and b2 is then decided first (see `dual_planes`).
    """
    return _chosen(weight, scales, block)[0]


def sparsity(planes: NDArray[np.uint64], cols: int) -> dict[str, Any]:
    """Return what a report says of planes (2, rows, words): the share of zeros in each, and of additions saved.

    A dense machine adds one activation per weight and plane; one that skips zeros adds only where a plane has a one.
    """
    ones = np.bitwise_count(planes).sum((1, 2), dtype=np.int64)
    zeros = [float(f"{1 - count / (planes.shape[1] * cols):.6g}") for count in ones]
    return {"plane_zeros": zeros, "additions_saved": float(f"{sum(zeros) / 2:.6g}")}


def _start(weights: NDArray[np.float32], importance: NDArray[np.float64]) -> Found:
    """Return a1 and a2 of 2-bit rounding for one block, (rows, 2); no column has bits of its own."""
    steps = _steps(weights, weights.shape[1], 1).astype(np.float64)
    return np.concatenate([2.0 * steps, -steps], axis=1), np.zeros(weights.shape[1], np.uint8)


def _parts(rows: int, cols: int) -> list[slice]:
    step = max(1, _CHUNK // cols)
    return [slice(row, min(rows, row + step)) for row in range(0, rows, step)]


def _steps(values: NDArray[np.float32], block: int, blocks: int) -> NDArray[np.float32]:
    found = np.empty((values.shape[0], blocks), np.float32)
    rounding_steps(np.ascontiguousarray(values), block, found)
    return found


def _chosen(weight: Weight, scales: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint64], float]:
    rows, cols = weight.shape
    planes = np.empty((2, rows, words_for(cols)), np.uint64)
    error = 0.0
    for part in _parts(rows, cols):
        values = np.ascontiguousarray(weight.float32(part))
        codes = np.empty(values.shape, np.uint8)
        large, small = (np.ascontiguousarray(own[part]) for own in scales)
        error += dual_planes(values, block, large, small, codes)
        packed = np.empty((2, values.shape[0], planes.shape[2]), np.uint64)
        pack_codes(codes.reshape(-1), cols, packed)
        planes[:, part] = packed
    return planes, error


METHOD = Method(
    summary="two planes of {0, 1}, one scale positive, one negative, from rounding to 2 bits (arXiv 2402.11960)",
    settings=DbllmSettings,
    binarize=binarize,
    size=lambda settings: Size(2, 2),
    describe_planes=sparsity,
    choose_planes=choose_planes,
)
