"""Which values can a weight of a row-block take? A codebook: planes, terms and what is stored of their coefficients."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.rounding.coefficients import from_float16, to_float16
from bincompress.tensors.float8 import from_float8, to_float8
from cpu_kernels.quantize.compensation import look_up


@dataclass(frozen=True)
class Codebook:
    """The formula of the store for one row-block, seen from a weight's code, whose bit p is its bit in plane p.

    Column planes come after the planes: their bits are the column's own.
    """

    planes: int
    terms: tuple[int, ...]
    mix: tuple[tuple[float, ...], ...] | None = None
    column_planes: int = 0

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """What a code multiplies each stored coefficient with, (codes, coefs)."""
        codes = np.arange(1 << (self.planes + self.column_planes))
        signs = np.ones((codes.size, len(self.terms)))
        for term, mask in enumerate(self.terms):
            for plane in range(self.planes + self.column_planes):
                if mask >> plane & 1:
                    signs[:, term] *= np.where(codes >> plane & 1, 1.0, -1.0)
        mixed = signs if self.mix is None else signs @ np.array(self.mix)
        return np.ascontiguousarray(mixed, np.float32)

    @property
    def coefs(self) -> int:
        """How many coefficients a row-block stores."""
        return int(self.features.shape[1])


def sum_of_planes(planes: int) -> Codebook:
    """Return the codebook of so many planes, each with a scale of its own."""
    return Codebook(planes, tuple(1 << plane for plane in range(planes)))


class Rounding:
    """How coefficients are stored: float16, or 8-bit floats where all are positive; one power of two for all."""

    def __init__(self, bits: int, greatest: float) -> None:
        """Take the greatest magnitude that the weights have; no coefficient may be more than twice as large."""
        self.bits = bits
        self.exponent = int(np.frexp(greatest)[1]) if greatest > 0 else 0

    def __call__(self, coef: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the nearest values that can be stored."""
        scaled = np.ldexp(coef, -self.exponent)
        if self.bits == 8:
            return from_float8(to_float8(scaled), self.exponent)
        return from_float16(scaled.astype(np.float16), self.exponent)

    def stored(self, coef: NDArray[np.float32]) -> tuple[NDArray[np.float16] | NDArray[np.uint8], int]:
        """Return the stored numbers of values that are rounded already, and the exponent of their power of two."""
        if self.bits == 8:
            return to_float8(np.ldexp(coef.astype(np.float64), -self.exponent)), self.exponent
        return to_float16(coef.astype(np.float64))


def levels_of(codebook: Codebook, coef: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what each code stands for, (rows, codes), for the coefficients (rows, coefs) of one block."""
    # Summed in the order of the coefficients, without the fused steps of a matrix product: the bits of a level are
    # the same wherever it is computed.
    levels = np.zeros((coef.shape[0], codebook.features.shape[0]), np.float32)
    for number in range(codebook.coefs):
        levels += coef[:, number, None] * codebook.features[None, :, number]
    return levels


def values_of(
    codebook: Codebook, codes: NDArray[np.uint8], coef: NDArray[np.float32], block: int
) -> NDArray[np.float32]:
    """Return the weights (rows, cols) that codes and coefficients (rows, blocks, coefs) stand for."""
    values = np.empty(codes.shape, np.float32)
    for unit, first in enumerate(range(0, codes.shape[1], block)):
        look_up(codes, levels_of(codebook, coef[:, unit]), first, min(first + block, codes.shape[1]), values)
    return values
