"""From rounded codes to planes: what the methods that know their layer's inputs have in common."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.declaration import Binarized, CompensatedSettings
from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding.asymmetric import asymmetric_target
from bincompress.methods.rounding.codebook import Codebook, Rounding, values_of
from bincompress.methods.rounding.compensation import Rounded, Start, compensate
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.packing import pack_codes, words_for

Floats = NDArray[np.float32]


class Scheme(NamedTuple):
    """How a method rounds a row-block: the values that weights can have, and where the search for scales begins."""

    codebook: Codebook
    start: Start
    groups: int  # for the report
    scales: int  # of a row-block


def binarize(
    weight: Weight, settings: CompensatedSettings, inputs: Inputs, scheme: Scheme, channel_scale: Floats | None = None
) -> Binarized:
    """Return a weight's planes, found with error compensation and settings.refine rounds of refinement.

    channel_scale: float32 (cols), multiplies the columns before anything else is done (and divides the inputs); errors
    are still told of the weights as they were. Raises TensorError where the Hessian is not one.
    """
    original, known = weight.float32(), inputs.curvature
    weights = asymmetric_target(original, known, inputs)
    if channel_scale is not None:
        weights, known = weights * channel_scale, known.scaled(channel_scale)
    cols = weight.shape[1]
    codebook, block = scheme.codebook, settings.block_columns(cols)
    rounding = Rounding(settings.scale_bits, float(np.max(np.abs(weights), initial=0.0)))
    unrefined = "" if not settings.refine else _too_few_tokens(inputs, cols)
    rounds = 0 if unrefined else settings.refine
    found = compensate(weights, known, codebook, block, scheme.start, rounding, rounds)
    values = values_of(codebook, found.codes, found.coef, block)
    error = original - (values if channel_scale is None else values / channel_scale)
    notes: dict[str, Any] = {
        "output_error": five_digits(found.cost),
        "output_error_before_refinement": five_digits(found.compensated),
        "output_size": five_digits(found.size),
        "refinement_rounds": found.rounds,
        "damping": known.damping,
    }
    if unrefined:
        notes["refinement"] = unrefined
    return Binarized(
        _as_planes(found, codebook, block, rounding),
        squared_error=float(np.sum(error.astype(np.float64) ** 2)),
        squared_norm=float(np.sum(original.astype(np.float64) ** 2)),
        scales=scheme.scales * found.coef.shape[0] * found.coef.shape[1],
        groups=scheme.groups,
        notes=notes,
    )


def _too_few_tokens(inputs: Inputs, cols: int) -> str:
    """Return why these inputs are not refined on; empty where they can be.

    Refinement follows the Hessian wherever it leads. With fewer tokens than half its columns it follows chance, and the
    error on other text rises (`test_few_tokens_are_not_refined_on` shows both).
    """
    if inputs.tokens is None or 2 * inputs.tokens >= cols:
        return ""
    return f"left out: {inputs.tokens} tokens of calibration for {cols} columns; expected at least {-(-cols // 2)}"


def _as_planes(found: Rounded, codebook: Codebook, block: int, rounding: Rounding) -> PackedTensor:
    rows, cols = found.codes.shape
    planes = np.empty((codebook.planes, rows, words_for(cols)), np.uint64)
    pack_codes(found.codes.reshape(-1), cols, planes)
    column_planes = np.empty((codebook.column_planes, 1, words_for(cols)), np.uint64)
    pack_codes(found.column_bits, cols, column_planes)
    numbers, exponent = rounding.stored(np.ascontiguousarray(found.coef.transpose(2, 0, 1)))
    return PackedTensor(
        planes, numbers, codebook.terms, block, (rows, cols), exponent, codebook.mix, column_planes[:, 0]
    )


def five_digits(value: float) -> float:
    """Return five significant digits: sums of float32 matrix products hold no more, and may end just below zero."""
    return float(f"{max(value, 0.0):.5g}")
