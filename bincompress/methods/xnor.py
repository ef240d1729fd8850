"""XNOR: the sign of every weight and the mean magnitude of its unit (Rastegari et al. 2016, eq. 6).

With calibration also several such planes, each with a scale of its own.
"""

import numpy as np

from bincompress.methods.rounding import calibrated
from bincompress.methods.rounding.codebook import sum_of_planes
from bincompress.methods.rounding.coefficients import from_float16, to_float16
from bincompress.methods.rounding.initial_scales import of_planes
from bincompress.records import Binarized, Inputs, Settings, Weight
from cpu_kernels.quantize.packing import pack_signs, words_for

_CHUNK = 1 << 22  # weights that are float64 at once


def binarize(weight: Weight, settings: Settings, inputs: Inputs | None = None) -> Binarized:
    """Return one sign plane with a scale per unit (settings.block: a row-block, a row or the matrix).

    inputs: those of the layer, where settings.compensate asks for them; then settings.plane_count planes.
    """
    rows, cols = weight.shape
    block = settings.block if isinstance(settings.block, int) else cols
    if inputs is not None:
        form = sum_of_planes(settings.plane_count)
        nominal = settings.plane_count * (1.0 + 16.0 * -(-cols // block) / cols)
        return calibrated.binarize(weight, settings, inputs, form, of_planes(settings.plane_count), 1, nominal)
    starts = np.arange(0, cols, block)
    total = np.empty((rows, starts.size))
    squares = 0.0
    step = max(1, _CHUNK // cols)
    for row in range(0, rows, step):
        magnitudes = np.abs(weight.float32(slice(row, row + step)).astype(np.float64))
        total[row : row + step] = np.add.reduceat(magnitudes, starts, axis=1)
        squares += float(np.vdot(magnitudes, magnitudes))
    sizes = np.diff(np.append(starts, cols)).astype(np.float64)[None, :]
    planes = np.empty((1, rows, words_for(cols)), np.uint64)
    pack_signs(weight.flat, cols, planes[0])
    exponent = 0
    if settings.block == "matrix":
        total, sizes = total.sum(keepdims=True), np.full((1, 1), float(rows * cols))
        coef = (total / sizes)[None].astype(np.float32)
        scale = coef[0].astype(np.float64)
    else:
        coef, exponent = to_float16((total / sizes)[None])
        scale = from_float16(coef, exponent)[0].astype(np.float64)
    # The sum of (|w| - scale) ** 2, from the sums alone.
    error = squares - 2.0 * float(np.sum(scale * total)) + float(np.sum(scale * scale * sizes))
    return Binarized(
        planes=planes,
        coef=coef,
        coef_exponent=exponent,
        terms=(1,),
        block=block,
        squared_error=max(error, 0.0),
        squared_norm=squares,
        nominal_bits=1.0 + 16.0 * scale.size / (rows * cols),
        groups=1,
    )
