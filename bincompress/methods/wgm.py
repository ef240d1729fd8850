"""WGM, dynamic grouping (arXiv 2509.03054): sorted magnitudes in groups, each weight its sign times its group's mean.

A whole matrix (the paper), a row, or a row-block shares its groups. Two groups are two planes whose sum and difference
carry the large and the small weights; 2 ** q groups are the sign plane and q planes that spell the group, with the
Walsh transform of the group scales as coefficients, so that every case is the one formula of the store.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from bincompress.methods import xnor
from bincompress.methods.declaration import Binarized, CompensatedSettings, Method, Size, option
from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding import calibrated, whole_matrix
from bincompress.methods.rounding.codebook import Codebook, sum_of_planes
from bincompress.methods.rounding.coefficients import from_float16, sign_terms, to_float16, unwalsh, walsh
from bincompress.methods.rounding.initial_scales import of_groups, of_planes
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.counting import find_zeros
from cpu_kernels.quantize.group_units import NETWORKS, group_units
from cpu_kernels.quantize.packing import pack_codes, pack_signs, pack_two, words_for
from cpu_kernels.quantize.two_groups import split_blocks

_CHUNK = 1 << 21  # weights whose float32 patterns and codes exist at once
_SCRATCH = {"exact": 0.6, "greedy": 80.0, "windowed": 8.0}  # bytes a weight, measured
_COMPENSATED_GROUPS = (1, 2, 4, 8, 16)
_MOST_IN_BLOCKS = 256
_MOST_IN_MATRIX = 1 << 15  # as the planes of a term can spell; no 16-bit float has more magnitudes


@dataclass(frozen=True)
class WgmSettings(CompensatedSettings):
    """How the magnitudes of a tensor are grouped."""

    method: ClassVar[str] = "wgm"
    groups: int = option(
        2, f"at most this many groups of magnitudes per block, up to {_MOST_IN_BLOCKS}, or {_MOST_IN_MATRIX} a matrix",
        least=1, most=_MOST_IN_MATRIX,
    )  # fmt: skip
    solver: Literal["exact", "greedy", "windowed"] = option(
        "exact", "the exact optimum, or the paper's algorithm 2 or 3"
    )
    window: int = option(512, "magnitudes in each initial group of the windowed solver")
    lam: float = option(0.0, "weight of 1/size in a group's cost", flag="--lambda", least=0)
    lam_normalized: bool = option(
        False, "read lambda as a fraction between the paper's l_min and l_max", flag="--lambda-normalized"
    )

    def record(self) -> dict[str, Any]:
        """Return what matters to the bytes, as JSON."""
        if self.calibrated:
            return self.calibrated_record("groups")
        window = ("window",) if self.solver == "windowed" else ()
        return {
            "method": self.method, **self.values("groups", "solver", *window, "lam", "lam_normalized", "block")
        }  # fmt: skip

    def problem(self, shape: tuple[int, int]) -> str:
        """Return what is wrong beyond single values; empty if nothing."""
        if self.calibrated:
            if self.groups not in _COMPENSATED_GROUPS:
                return f"groups {self.groups}: with error compensation 1, 2, 4, 8 or 16"
            if self.scale_bits == 8 and self.groups > 2:
                return "8-bit scales are for one or two groups (more have coefficients of both signs)"
            if self.solver != "exact" or self.lam:
                return "error compensation finds groups itself; remove --solver and --lambda"
        elif self.lam == float("inf"):
            return f"lambda {self.lam}: expected a number"
        elif self.groups > _MOST_IN_BLOCKS and self.block != "matrix":
            return f"groups {self.groups}: more than {_MOST_IN_BLOCKS} are for a whole matrix; add --block matrix"
        rows, cols = shape
        size = rows * cols if self.block == "matrix" else self.block_columns(cols)
        most = max(1, size // self.groups)
        if self.solver == "windowed" and not 1 <= self.window <= max(1, min(size, rows * cols) // self.groups):
            return (
                f"window {self.window}: {self.groups} groups in a block of {size:,} weights need a window of 1 to "
                f"{most:,}; try --window {max(1, most // 8)}"
            )
        return super().problem(shape)


def binarize(weight: Weight, settings: WgmSettings, inputs: Inputs | None = None) -> Binarized:
    """Return the planes and scales of WGM for the blocks that settings.block names.

    inputs: those of the layer, where settings.compensate asks for error compensation.
    """
    if inputs is not None:
        return _compensated(weight, settings, inputs)
    if settings.block == "matrix":
        return whole_matrix.binarize(weight, settings)
    block = settings.block_columns(weight.shape[1])
    if settings.groups == 2 and settings.solver == "exact" and block in NETWORKS:
        return _two_groups(weight, settings, block)
    return _grouped_blocks(weight, settings, block)


def _compensated(weight: Weight, settings: WgmSettings, inputs: Inputs) -> Binarized:
    groups = settings.groups
    if groups <= 2:
        codebook, start = sum_of_planes(groups), of_planes(groups)
    else:
        depth = index_planes(groups)
        codebook = Codebook(1 + depth, tuple(1 | subset << 1 for subset in range(1 << depth)))
        start = of_groups(codebook, groups)
    return calibrated.binarize(weight, settings, inputs, calibrated.Scheme(codebook, start, groups, groups))


def index_planes(groups: int) -> int:
    """Return how many planes spell one of so many groups."""
    return max(0, int(groups - 1).bit_length())


def _two_groups(weight: Weight, settings: WgmSettings, block: int) -> Binarized:
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
    numbers, exponent = to_float16(np.stack([(high + low) / 2, (high - low) / 2]))
    mean, half = from_float16(numbers, exponent).astype(np.float64)
    low, high = mean - half, mean + half
    error = squares - 2 * (low * small_sum + high * large_sum) + low * low * small + high * high * large
    used = int(np.sum(1 + (large > 0)))
    return Binarized(
        PackedTensor(planes, numbers, (1, 2), block, (rows, cols), exponent),
        squared_error=max(float(np.sum(error)), 0.0),
        squared_norm=float(np.sum(squares)),
        scales=used,
        groups=2 if np.any(large > 0) else 1,
        notes=_zero_note(weight),
    )


def _grouped_blocks(weight: Weight, settings: WgmSettings, block: int) -> Binarized:
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
    all_numbers, exponent = to_float16(walsh(levels))
    stored = unwalsh(from_float16(all_numbers, exponent).astype(np.float64))[:most]
    error = np.sum(squares - 2 * stored * total + stored * stored * size)
    numbers, terms = sign_terms(planes, cols, all_numbers)
    return Binarized(
        PackedTensor(planes, numbers, terms, block, (rows, cols), exponent),
        squared_error=max(float(error), 0.0),
        squared_norm=float(np.sum(squares)),
        scales=int(np.sum(size > 0)),
        groups=int(np.max(np.sum(size > 0, axis=0))),
        notes=_zero_note(weight),
    )


def _zero_note(weight: Weight) -> dict[str, object]:
    """Tell how many zeros became a small value: the format of row-blocks has no level for them."""
    zeros = find_zeros(weight.flat, np.empty(0, np.uint64))
    return {"zeros": zeros, "zeros_as": "smallest scale of their unit (the format has no zero level)"} if zeros else {}


def _size(settings: WgmSettings) -> Size:
    planes = 1 + index_planes(settings.groups)
    return Size(planes, 1 << (planes - 1))


def _scratch_bytes(settings: WgmSettings, dtype: str) -> float:
    # Float32 has sorted distinct values and their prefix sums.
    return _SCRATCH[settings.solver] + (48.0 if dtype == "F32" and settings.block == "matrix" else 0.0)


METHOD = Method(
    summary="magnitudes in groups, each with its mean (arXiv 2509.03054); two groups are two planes",
    settings=WgmSettings,
    binarize=binarize,
    size=_size,
    # Counting the magnitudes of a whole matrix finds what is not finite.
    finds_nonfinite=lambda settings: settings.block == "matrix" and not settings.calibrated,
    scratch_bytes=_scratch_bytes,
    trials=xnor.trials,
)
