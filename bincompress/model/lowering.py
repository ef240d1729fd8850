"""How does a stored tensor become plain +-1 planes with scales, as the kernels multiply them?

A product of planes is an exclusive or of stored planes. Where the coefficients of several terms are one stored
coefficient times powers of two (uniform levels), or numbers of the whole matrix, that is kept: a scale is read once for
all planes, and is a float16.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.tensors.float8 import as_float16
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.matmul.prepacking import Part

MOST_PLANES = 8  # past this many terms, decoding the weights is quicker than multiplying their planes


@dataclass(frozen=True)
class Lowered:
    """Plain planes and their scales, with what has to be equal for two tensors to be one matrix."""

    part: Part
    block: int
    plane_weights: tuple[float, ...] | None

    @property
    def kind(self) -> tuple[object, ...]:
        """What tensors have to share to be laid out as one."""
        return self.block, self.plane_weights, self.part.planes.shape[0], self.part.offset is None


def lower(packed: PackedTensor) -> Lowered | None:
    """Return plain planes (terms, rows, words) with scales per row and block; None where there are too many terms."""
    rows, cols = packed.shape
    signed = [t for t, mask in enumerate(packed.terms) if mask]
    constant = [t for t, mask in enumerate(packed.terms) if not mask]
    if not 1 <= len(signed) <= MOST_PLANES or len(constant) > 1:
        return None
    planes = _planes(packed, [packed.terms[t] for t in signed])
    # 8-bit floats are float16 numbers, too.
    stored = as_float16(packed.numbers) if packed.numbers.dtype == np.uint8 else packed.numbers
    whole = packed.numbers.shape[1:] == (1, 1)
    block = cols if whole else min(packed.block, cols)
    if whole and not constant:
        # The matrix's own numbers are the planes' factors.
        factors = tuple(float(packed.coef[t, 0, 0]) for t in signed)
        return Lowered(Part(planes, np.ones((rows, 1), np.float16)), block, factors)
    places, weights = _stored_numbers(packed, signed, constant)
    if places is None or stored.dtype != np.float16:
        numbers: NDArray[Any] = packed.coef
        exponent, places, weights = 0, (signed, constant), None
    else:
        numbers, exponent = stored, packed.exponent
    of_planes, of_offset = places
    first, last = of_planes[0], of_planes[-1] + 1
    # A selection by a list is a copy, so neighbours are taken by a slice.
    chosen = numbers[first:last] if of_planes == list(range(first, last)) else numbers[of_planes]
    offset = numbers[of_offset[0]] if of_offset else None
    if whole:
        chosen = np.repeat(chosen, rows, axis=1)
        offset = None if offset is None else np.repeat(offset, rows, axis=0)
    return Lowered(Part(planes, chosen if weights is None else chosen[0], offset, exponent), block, weights)


def _planes(packed: PackedTensor, masks: list[int]) -> NDArray[np.uint64]:
    """Return the product of planes of every mask; the stored array itself where the products are its planes."""
    stored = packed.all_planes() if len(packed.column_planes) else packed.planes
    if masks == [1 << plane for plane in range(stored.shape[0])]:
        return stored
    padding = np.full(packed.planes.shape[2], 0xFFFFFFFFFFFFFFFF, np.uint64)
    padding[-1] >>= np.uint64(-packed.shape[1] % 64)
    result = np.empty((len(masks), *packed.planes.shape[1:]), np.uint64)
    for product, mask in zip(result, masks, strict=True):
        product[:] = padding
        for plane in range(stored.shape[0]):
            if mask >> plane & 1:
                # +1 times +1 and -1 times -1 are +1: equal bits give a one.
                np.bitwise_xor(product, stored[plane] ^ padding, out=product)
    return result


Places = tuple[list[int], list[int]]  # which of the stored numbers are the planes' scales, and which the offset


def _stored_numbers(
    packed: PackedTensor, signed: list[int], constant: list[int]
) -> tuple[Places | None, tuple[float, ...] | None]:
    """Return which stored numbers the coefficients are, and the planes' factors where all are multiples of one.

    None where a coefficient is anything but one stored number, times a power of two for planes that share it.
    """
    if packed.mix is None:
        return (signed, constant), None
    of_term = [[i for i, factor in enumerate(row) if factor] for row in packed.mix]
    shared = {tuple(of_term[t]) for t in signed}
    if len(shared) != 1 or any(len(of_term[t]) != 1 for t in (*signed, *constant)):
        return None, None
    (column,) = next(iter(shared))
    factors = tuple(packed.mix[t][column] for t in signed)
    if any(factor <= 0 or np.frexp(factor)[0] != 0.5 for factor in factors):
        return None, None
    offsets = [of_term[t][0] for t in constant]
    if any(packed.mix[t][i] != 1 for t, i in zip(constant, offsets, strict=True)):
        return None, None
    return ([column], offsets), factors
