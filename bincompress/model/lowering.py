"""How does a stored tensor become plain +-1 planes with scales, as the kernels multiply them?

A product of planes is an exclusive or of stored planes. Where the coefficients of several terms are one stored
coefficient times powers of two (uniform levels), that is kept: the scale is read once for all planes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bincompress.store import Packed
from cpu_kernels.products import Part

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


def lower(packed: Packed) -> Lowered | None:
    """Return plain planes (terms, rows, words) with scales per row and block; None where there are too many terms."""
    rows, cols = packed.shape
    signed = [t for t, mask in enumerate(packed.terms) if mask]
    constant = [t for t, mask in enumerate(packed.terms) if not mask]
    if not 1 <= len(signed) <= MOST_PLANES or len(constant) > 1:
        return None
    planes = _planes(packed, [packed.terms[t] for t in signed])
    block = min(packed.block, cols) if packed.coef.shape[1] > 1 else cols
    coef = np.broadcast_to(packed.coef, (packed.coef.shape[0], rows, packed.coef.shape[2]))
    offset = np.ascontiguousarray(coef[constant[0]]) if constant else None
    weights = _shared_scale(packed, signed)
    if weights is not None:
        last = weights.index(min(weights))
        scale: NDArray[np.float32] = np.ascontiguousarray(coef[signed[last]]) * np.float32(1 / weights[last])
        return Lowered(Part(planes, scale, offset), block, weights)
    chosen = coef if len(signed) == len(packed.terms) else coef[signed]  # a selection is a copy
    return Lowered(Part(planes, np.ascontiguousarray(chosen), offset), block, None)


def _planes(packed: Packed, masks: list[int]) -> NDArray[np.uint64]:
    """Return the product of planes of every mask; the stored array itself where the products are its planes."""
    if masks == [1 << plane for plane in range(packed.planes.shape[0])]:
        return packed.planes
    padding = np.full(packed.planes.shape[2], 0xFFFFFFFFFFFFFFFF, np.uint64)
    padding[-1] >>= np.uint64(-packed.shape[1] % 64)
    result = np.empty((len(masks), *packed.planes.shape[1:]), np.uint64)
    for product, mask in zip(result, masks, strict=True):
        product[:] = padding
        for plane in range(packed.planes.shape[0]):
            if mask >> plane & 1:
                # +1 times +1 and -1 times -1 are +1: equal bits give a one.
                np.bitwise_xor(product, packed.planes[plane] ^ padding, out=product)
    return result


def _shared_scale(packed: Packed, signed: list[int]) -> tuple[float, ...] | None:
    """Return the factors of one stored coefficient where all signed terms are multiples of it by powers of two."""
    mix = packed.attributes.get("mix")
    if mix is None or len(signed) < 2:
        return None
    columns = {tuple(i for i, factor in enumerate(mix[t]) if factor) for t in signed}
    if len(columns) != 1 or len(next(iter(columns))) != 1:
        return None
    (column,) = next(iter(columns))
    factors = tuple(float(mix[t][column]) for t in signed)
    return factors if all(factor > 0 and np.frexp(factor)[0] == 0.5 for factor in factors) else None
