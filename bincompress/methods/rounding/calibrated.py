"""From rounded codes to planes: what the methods that know their layer's inputs have in common."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.rounding.asymmetric import aimed
from bincompress.methods.rounding.codebook import Form, Rounding, values_of
from bincompress.methods.rounding.compensation import Rounded, Start, compensate, curvature
from bincompress.records import Binarized, Inputs, Settings, Weight
from cpu_kernels.quantize.packing import pack_codes, words_for

Floats = NDArray[np.float32]


def binarize(
    weight: Weight, settings: Settings, inputs: Inputs, form: Form, start: Start, groups: int, nominal_bits: float,
    channel_scale: Floats | None = None,
) -> Binarized:  # fmt: skip
    """Return a weight's planes in `form`, found with error compensation and settings.refine rounds of refinement.

    groups and nominal_bits: for the report. channel_scale: float32 (cols), multiplies the columns before anything else
    is done (and divides the inputs); errors are still told of the weights as they were. Raises TensorError where the
    Hessian is not one.
    """
    original, known = weight.float32(), curvature(inputs.hessian, inputs.name)
    weights = aimed(original, known, inputs)
    if channel_scale is not None:
        weights, known = weights * channel_scale, known.scaled(channel_scale)
    block = settings.block if isinstance(settings.block, int) else weight.shape[1]
    rounding = Rounding(settings.scale_bits, float(np.max(np.abs(weights), initial=0.0)))
    found = compensate(weights, known, form, block, start, rounding, settings.refine)
    packed = _as_planes(found, form, block, rounding, groups, nominal_bits)
    values = values_of(form, found.codes, found.coef, block)
    error = original - (values if channel_scale is None else values / channel_scale)
    return replace(
        packed,
        squared_error=float(np.sum(error.astype(np.float64) ** 2)),
        squared_norm=float(np.sum(original.astype(np.float64) ** 2)),
        notes={
            "output_error": _rounded(found.cost),
            "output_error_before_refinement": _rounded(found.compensated),
            "output_size": _rounded(found.size),
            "refinement_rounds": found.rounds,
            "damping": known.damping,
        },
    )


def _as_planes(
    found: Rounded, form: Form, block: int, rounding: Rounding, groups: int, nominal_bits: float
) -> Binarized:
    rows, cols = found.codes.shape
    planes = np.empty((form.planes, rows, words_for(cols)), np.uint64)
    pack_codes(found.codes.reshape(-1), cols, planes)
    column_planes = np.empty((form.column_planes, 1, words_for(cols)), np.uint64)
    pack_codes(found.column_bits, cols, column_planes)
    coef, exponent = rounding.stored(np.ascontiguousarray(found.coef.transpose(2, 0, 1)))
    return Binarized(
        planes=planes,
        column_planes=column_planes[:, 0],
        coef=coef,
        coef_exponent=exponent,
        mix=form.mix,
        terms=form.terms,
        block=block,
        squared_error=0.0,
        squared_norm=0.0,
        nominal_bits=nominal_bits,
        groups=groups,
    )


def _rounded(value: float) -> float:
    """Return five significant digits: sums of float32 matrix products hold no more, and may end just below zero."""
    return float(f"{max(value, 0.0):.5g}")
