"""XNOR: the sign of every weight and the mean magnitude of its block (Rastegari et al. 2016, eq. 6).

With calibration also several such planes, each with a scale of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from bincompress.methods.declaration import Binarized, Block, CompensatedSettings, Method, Size, option
from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding import calibrated
from bincompress.methods.rounding.codebook import sum_of_planes
from bincompress.methods.rounding.coefficients import from_float16, to_float16
from bincompress.methods.rounding.initial_scales import of_planes
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.packing import pack_signs, words_for

_CHUNK = 1 << 22  # weights that are float64 at once
# Tried where bits are spread. One plane gains little from smaller blocks, several planes much.
_TRIALS: tuple[tuple[int, Block], ...] = (
    (1, "row"), (1, 128), (1, 64), (2, 256), (2, 128), (2, 64), (3, 256), (3, 128), (3, 64), (4, 128),
)  # fmt: skip


@dataclass(frozen=True)
class XnorSettings(CompensatedSettings):
    """How a tensor becomes a sum of planes, each with a scale of its own."""

    method: ClassVar[str] = "xnor"
    planes: int = option(1, "planes, each with its own scale; more than one with error compensation", least=1, most=4)

    def record(self) -> dict[str, Any]:
        """Return what matters to the bytes, as JSON."""
        if not self.calibrated:
            return {"method": self.method, "block": self.block}
        return self.calibrated_record("planes")

    def problem(self, shape: tuple[int, int]) -> str:
        """Return what is wrong beyond single values; empty if nothing."""
        if not self.calibrated and self.planes > 1:
            return "--planes is part of error compensation: add --compensate and --stats"
        return super().problem(shape)


def trials(settings: CompensatedSettings) -> Sequence[XnorSettings]:
    """Return what is tried where bits are spread over tensors that are rounded with error compensation."""
    if not settings.calibrated:
        return ()
    shared = XnorSettings(scale_bits=settings.scale_bits, compensate=settings.compensate, refine=settings.refine)
    return [replace(shared, planes=planes, block=block) for planes, block in _TRIALS]


def binarize(weight: Weight, settings: XnorSettings, inputs: Inputs | None = None) -> Binarized:
    """Return one sign plane with a scale per block; with inputs, settings.planes planes.

    inputs: those of the layer, where settings.compensate asks for them.
    """
    rows, cols = weight.shape
    block, planes = settings.block_columns(cols), settings.planes
    if inputs is not None:
        scheme = calibrated.Scheme(sum_of_planes(planes), of_planes(planes), 1, planes)
        return calibrated.binarize(weight, settings, inputs, scheme)
    starts = np.arange(0, cols, block)
    total = np.empty((rows, starts.size))
    squares = 0.0
    step = max(1, _CHUNK // cols)
    for row in range(0, rows, step):
        magnitudes = np.abs(weight.float32(slice(row, row + step)).astype(np.float64))
        total[row : row + step] = np.add.reduceat(magnitudes, starts, axis=1)
        squares += float(np.vdot(magnitudes, magnitudes))
    sizes = np.diff(np.append(starts, cols)).astype(np.float64)[None, :]
    signs = np.empty((1, rows, words_for(cols)), np.uint64)
    pack_signs(weight.flat, cols, signs[0])
    exponent = 0
    if settings.block == "matrix":
        total, sizes = total.sum(keepdims=True), np.full((1, 1), float(rows * cols))
        numbers: Any = (total / sizes)[None].astype(np.float32)
        scale = numbers[0].astype(np.float64)
    else:
        numbers, exponent = to_float16((total / sizes)[None])
        scale = from_float16(numbers, exponent)[0].astype(np.float64)
    # The sum of (|w| - scale) ** 2, from the sums alone.
    error = squares - 2.0 * float(np.sum(scale * total)) + float(np.sum(scale * scale * sizes))
    return Binarized(
        PackedTensor(signs, numbers, (1,), block, (rows, cols), exponent),
        squared_error=max(error, 0.0),
        squared_norm=squares,
        scales=numbers.size,
        groups=1,
    )


METHOD = Method(
    summary="sign and mean magnitude; with error compensation a sum of planes (Rastegari et al. 2016)",
    settings=XnorSettings,
    binarize=binarize,
    size=lambda settings: Size(settings.planes, settings.planes),
    trials=trials,
)
