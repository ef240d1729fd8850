"""WGM, dynamic grouping (arXiv 2509.03054): sorted magnitudes in groups, each weight its sign times its group's mean.

A unit is the whole matrix (the paper), a row, or a row-block. Two groups are two planes whose sum and difference carry
the large and the small weights; 2 ** q groups are the sign plane and q planes that spell the group, with the Walsh
transform of the group scales as coefficients, so that every case is the one formula of the store.
"""

import numpy as np

from bincompress.methods.rounding import calibrated, matrix_groups
from bincompress.methods.rounding.codebook import Form, sum_of_planes
from bincompress.methods.rounding.coefficients import from_float16, sign_terms, to_float16, unwalsh, walsh
from bincompress.methods.rounding.initial_scales import of_groups, of_planes
from bincompress.records import Binarized, Inputs, Settings, Weight
from cpu_kernels.quantize.counting import find_zeros
from cpu_kernels.quantize.group_units import group_units
from cpu_kernels.quantize.packing import pack_codes, pack_signs, pack_two, words_for
from cpu_kernels.quantize.two_groups import split_blocks

_CHUNK = 1 << 21  # weights whose float32 patterns and codes exist at once
_NETWORKS = (64, 128, 256)  # blocks that the side-by-side sort serves


def binarize(weight: Weight, settings: Settings, inputs: Inputs | None = None) -> Binarized:
    """Return the planes and scales of WGM for the units that settings.block names.

    inputs: those of the layer, where settings.compensate asks for error compensation.
    """
    if inputs is not None:
        return _compensated(weight, settings, inputs)
    if settings.block == "matrix":
        return matrix_groups.binarize(weight, settings)
    cols = weight.shape[1]
    block = settings.block if isinstance(settings.block, int) else cols
    if settings.groups == 2 and settings.solver == "exact" and block in _NETWORKS:
        return _two_groups(weight, settings, block)
    return _grouped_units(weight, settings, block)


def _compensated(weight: Weight, settings: Settings, inputs: Inputs) -> Binarized:
    groups, cols = settings.groups, weight.shape[1]
    block = settings.block if isinstance(settings.block, int) else cols
    nominal = 1.0 + 16.0 * groups * -(-cols // block) / cols
    if groups <= 2:
        form, start = sum_of_planes(groups), of_planes(groups)
    else:
        depth = index_planes(groups)
        form = Form(1 + depth, tuple(1 | subset << 1 for subset in range(1 << depth)))
        start = of_groups(form, groups)
    return calibrated.binarize(weight, settings, inputs, form, start, groups, nominal)


def index_planes(groups: int) -> int:
    """Return how many planes spell one of so many groups."""
    return max(0, int(groups - 1).bit_length())


def _two_groups(weight: Weight, settings: Settings, block: int) -> Binarized:
    rows, cols = weight.shape
    blocks = -(-cols // block)
    planes = np.empty((2, rows, words_for(cols)), np.uint64)
    sums = np.empty((4, rows, blocks))
    # bfloat16 is sorted as it is; float16 has another exponent range and goes the way of float32.
    step = rows if weight.dtype != "F16" else max(1, _CHUNK // cols)
    for row in range(0, rows, step):
        part = slice(row, min(rows, row + step))
        bits = weight.bits[part] if weight.dtype != "F16" else weight.float32(part).view(np.uint32)
        flat = bits.reshape(-1)
        thresholds = np.empty((bits.shape[0], blocks), bits.dtype)
        found = np.empty((4, bits.shape[0], blocks))
        split_blocks(flat, cols, block, settings.lam, settings.lam_normalized, thresholds, found)
        packed = planes[:, part] if step == rows else np.empty((2, bits.shape[0], planes.shape[2]), np.uint64)
        pack_two(flat, cols, block, thresholds, packed)
        planes[:, part] = packed
        sums[:, part] = found
    sizes = np.minimum(block, cols - block * np.arange(blocks)).astype(np.float64)[None, :]
    small, small_sum, large_sum, squares = sums
    large = sizes - small
    low = small_sum / small
    high = np.where(large > 0, large_sum / np.maximum(large, 1.0), low)
    coef, exponent = to_float16(np.stack([(high + low) / 2, (high - low) / 2]))
    mean, half = from_float16(coef, exponent).astype(np.float64)
    low, high = mean - half, mean + half
    error = squares - 2 * (low * small_sum + high * large_sum) + low * low * small + high * high * large
    used = int(np.sum(1 + (large > 0)))
    return Binarized(
        planes=planes,
        coef=coef,
        coef_exponent=exponent,
        terms=(1, 2),
        block=block,
        squared_error=max(float(np.sum(error)), 0.0),
        squared_norm=float(np.sum(squares)),
        nominal_bits=1.0 + 16.0 * used / (rows * cols),
        groups=2 if np.any(large > 0) else 1,
        notes=_zero_note(weight),
    )


def _grouped_units(weight: Weight, settings: Settings, block: int) -> Binarized:
    rows, cols = weight.shape
    blocks = -(-cols // block)
    most = settings.groups
    window = 1 if settings.solver == "greedy" else settings.window
    depth = index_planes(most)
    planes = np.empty((1 + depth, rows, words_for(cols)), np.uint64)
    pack_signs(weight.flat, cols, planes[0])
    sums = np.empty((3, most, rows, blocks))
    step = max(1, _CHUNK // cols)
    for row in range(0, rows, step):
        part = slice(row, min(rows, row + step))
        patterns = weight.float32(part).view(np.uint32)
        codes = np.empty(patterns.size, np.uint8)
        found = np.empty((3, most, patterns.shape[0], blocks))
        group_units(
            patterns.reshape(-1), cols, block, most, window, settings.solver == "exact",
            settings.lam, settings.lam_normalized, codes, found,
        )  # fmt: skip
        sums[:, :, part] = found
        if depth:
            packed = np.empty((depth, patterns.shape[0], planes.shape[2]), np.uint64)
            pack_codes(codes, cols, packed)
            planes[1:, part] = packed
    size, total, squares = sums
    levels = np.zeros((1 << depth, rows, blocks))
    for group in range(1 << depth):
        # Codes that no weight has repeat the scale below them, which keeps the coefficients small.
        empty = levels[group - 1] if group else np.zeros((rows, blocks))
        levels[group] = (
            np.where(size[group] > 0, total[group] / np.maximum(size[group], 1.0), empty) if group < most else empty
        )
    coef, exponent = to_float16(walsh(levels))
    stored = unwalsh(from_float16(coef, exponent).astype(np.float64))[:most]
    error = np.sum(squares - 2 * stored * total + stored * stored * size)
    coef, terms = sign_terms(planes, cols, coef)
    return Binarized(
        planes=planes,
        coef=coef,
        coef_exponent=exponent,
        terms=terms,
        block=block,
        squared_error=max(float(error), 0.0),
        squared_norm=float(np.sum(squares)),
        nominal_bits=1.0 + 16.0 * int(np.sum(size > 0)) / (rows * cols),
        groups=int(np.max(np.sum(size > 0, axis=0))),
        notes=_zero_note(weight),
    )


def _zero_note(weight: Weight) -> dict[str, object]:
    """Tell how many zeros became a small value: the format of row-blocks has no level for them."""
    zeros = find_zeros(weight.flat, np.empty(0, np.uint64))
    return {"zeros": zeros, "zeros_as": "smallest scale of their unit (the format has no zero level)"} if zeros else {}
