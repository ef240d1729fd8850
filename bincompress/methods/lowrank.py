"""Two factors of ±1 of a low rank, with a scale for every row, rank and column: below one bit a weight.

W ~ diag(row) left diag(middle) right^T diag(column). Sources: DBF (arXiv 2505.11076), LittleBit (arXiv 2506.13771) and
NanoQuant (arXiv 2602.06694) for the form; how the factors are found is in `rounding/sign_factors.py`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from bincompress.methods.declaration import Made, Method, Settings, Size, option
from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding.asymmetric import asymmetric_target
from bincompress.methods.rounding.calibrated import five_digits
from bincompress.methods.rounding.coefficients import to_float16
from bincompress.methods.rounding.sign_factors import SignFactors, sign_factors
from bincompress.process.blas import one_blas_thread
from bincompress.tensors.low_rank import LowRankTensor, least_rank, packed_signs
from bincompress.tensors.weight import Weight
from cpu_kernels.quantize.packing import words_for

_CHECKSUM_BYTES = 4 * 5  # of the arrays
_KERNEL_COLUMNS = 128  # that a product kernel takes at a time, whatever is left in the last ones
_KEPT_SHARE = 31 / 32  # of the bits' rank: so little less is given up for a rank that leaves none of them over
_ERROR_ROWS = 512  # whose weights are float64 at once
_SCRATCH_BYTES = 80.0  # a weight: the matrix and its product with the Hessian, and six of both factors, in float32


@dataclass(frozen=True)
class LowRankSettings(Settings):
    """How a tensor becomes two factors of ±1."""

    method: ClassVar[str] = "lowrank"
    block: Literal["row"] = option("row", "a scale for every row, rank and column")
    bits: float = option(
        1.0,
        "stored bits a weight: the greatest rank that takes no more, or a multiple of 128 just below it",
        least=0.1,
        most=4.0,
    )
    rank: int = option(0, "rank of the factors, in place of --bits", least=0)
    compensate: bool = option(False, "weigh errors by what calibration found")

    @property
    def calibrated(self) -> bool:
        """Whether statistics of the layer's inputs are needed."""
        return self.compensate

    def record(self) -> dict[str, Any]:
        """Return what matters to the bytes, as JSON."""
        size = self.values("rank") if self.rank else self.values("bits")
        return {"method": self.method, **size, **self.values("compensate")}

    def problem(self, shape: tuple[int, int]) -> str:
        """Return what is wrong beyond single values; empty if nothing."""
        if self.rank and self.bits != 1.0:
            return f"--rank {self.rank} and --bits {self.bits:g}: give one of them"
        rows, cols = shape
        found, least = rank_of(self, rows, cols), least_rank(rows, cols)
        if found < least:
            asked = f"--rank {self.rank}" if self.rank else f"--bits {self.bits:g}"
            return (
                f"{asked} gives shape {rows} x {cols} rank {found}; expected at least {least}: choose more bits "
                f"(rank {least} takes {8 * _bytes_of(least, rows, cols) / (rows * cols):.3f}), or --keep this tensor"
            )
        if found > rows + cols:
            return f"--rank {found}; expected at most {rows + cols}, rows and columns together"
        return ""


def rank_of(settings: LowRankSettings, rows: int, cols: int) -> int:
    """Return the rank that a matrix of this shape gets; below 1 where the bits do not even hold the scales."""
    if settings.rank:
        return settings.rank
    fixed = _bytes_of(0, rows, cols)
    rank = int((settings.bits * rows * cols / 8 - fixed) // (_bytes_of(1, rows, cols) - fixed))
    whole = rank // _KERNEL_COLUMNS * _KERNEL_COLUMNS
    return whole if _KEPT_SHARE * rank <= whole else rank


def _bytes_of(rank: int, rows: int, cols: int) -> int:
    """Return the stored bytes of a matrix, checksums included."""
    return 8 * rank * (words_for(rows) + words_for(cols)) + 2 * (rows + cols + rank) + _CHECKSUM_BYTES


def binarize(weight: Weight, settings: LowRankSettings, inputs: Inputs | None = None) -> Made:
    """Return the factors; with inputs, those of the least output error that was found."""
    rows, cols = weight.shape
    original = weight.float32()
    with one_blas_thread():
        hessian = None if inputs is None else inputs.curvature.hessian
        target = original if inputs is None else asymmetric_target(original, inputs.curvature, inputs)
        tensor = as_stored(sign_factors(target, hessian, rank_of(settings, rows, cols)))
        error = norm = cost = size = 0.0
        for first in range(0, rows, _ERROR_ROWS):
            part = slice(first, first + _ERROR_ROWS)
            values, differs = original[part], original[part] - tensor.weights(part)
            error += float(np.sum(np.square(differs, dtype=np.float64)))
            norm += float(np.sum(np.square(values, dtype=np.float64)))
            if hessian is not None:
                away = target[part] - original[part] + differs
                cost += float(np.einsum("ij,ij->", away, away @ hessian, dtype=np.float64))
                size += float(np.einsum("ij,ij->", target[part], target[part] @ hessian, dtype=np.float64))
    notes: dict[str, Any] = {"rank": tensor.rank}
    if inputs is not None:
        notes |= {"output_error": five_digits(cost / size if size > 0 else 0.0), "output_size": five_digits(size)}
    return Made(tensor, squared_error=error, squared_norm=norm, scales=rows + cols + tensor.rank, groups=1, notes=notes)


def as_stored(found: SignFactors) -> LowRankTensor:
    """Return factors in the form that is stored: scales of each kind are at most 2, times one power of two."""
    rounded, exponents = [], []
    for scale in (found.row, found.middle, found.column):
        numbers, exponent = to_float16(scale.astype(np.float64))
        rounded.append(numbers)
        exponents.append(exponent)
    left, right = (packed_signs(signs.T) for signs in (found.left, found.right))
    return LowRankTensor(left, right, rounded[0], rounded[1], rounded[2], sum(exponents))


METHOD = Method(
    summary="two factors of a low rank, each ±1, with scales between and beside them: below one bit a weight",
    settings=LowRankSettings,
    binarize=binarize,
    size=lambda settings: Size(1, 1),
    nbytes=lambda settings, rows, cols: _bytes_of(rank_of(settings, rows, cols), rows, cols) - _CHECKSUM_BYTES,
    scratch_bytes=lambda settings, dtype: _SCRATCH_BYTES,
    low_rank=True,
)
