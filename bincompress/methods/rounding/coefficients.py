"""How do scales become coefficients of terms? As float16 times one power of two a matrix, or float32 for one unit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_float16(coef: NDArray[np.float64]) -> tuple[NDArray[np.float16], int]:
    """Return coefficients as float16 and the exponent that they are to be multiplied by 2 to the power of.

    The greatest lies in [1, 2), so neither a very small nor a very large matrix loses digits or overflows.
    """
    greatest = float(np.max(np.abs(coef), initial=0.0))
    exponent = int(np.frexp(greatest)[1]) - 1 if greatest > 0 else 0
    return np.ldexp(coef, -exponent).astype(np.float16), exponent


def from_float16(stored: NDArray[np.float16], exponent: int) -> NDArray[np.float32]:
    """Return the coefficients that `to_float16` stored."""
    return np.ldexp(stored.astype(np.float32), exponent)


def walsh(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coefficients (2 ** q, ...) of every product of q bit planes, for levels (2 ** q, ...) by index.

    levels[g] = sum over masks s of coef[s] * product over bits p in s of (+1 where bit p of g is set, else -1).
    """
    coef = levels.astype(np.float64).copy()
    size = coef.shape[0]
    half = 1
    while half < size:
        pairs = coef.reshape(size // (2 * half), 2, half, *coef.shape[1:])
        low, high = pairs[:, 0].copy(), pairs[:, 1].copy()
        pairs[:, 0] = (high + low) / 2
        pairs[:, 1] = (high - low) / 2
        half *= 2
    return coef


def unwalsh(coef: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the levels of the coefficients of `walsh`."""
    levels = coef.astype(np.float64).copy()
    size = levels.shape[0]
    half = 1
    while half < size:
        pairs = levels.reshape(size // (2 * half), 2, half, *levels.shape[1:])
        rest, sign = pairs[:, 0].copy(), pairs[:, 1].copy()
        pairs[:, 0] = rest - sign
        pairs[:, 1] = rest + sign
        half *= 2
    return levels


def sign_terms(planes: NDArray[np.uint64], cols: int, coef: NDArray[Any]) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Return the coefficients and terms to store, of a sign plane, index planes and coefficients in Walsh order.

    The sign is in every term. One index plane becomes (in place) its product with the sign: two plain planes, which
    inference likes best. Terms whose coefficients are all zero are left out.
    """
    if planes.shape[0] == 2:
        planes[1] = ~(planes[0] ^ planes[1])
        planes[1, :, -1] &= np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(-cols % 64)
        masks = [1, 2]
    else:
        masks = [1 | subset << 1 for subset in range(coef.shape[0])]
    used = [i for i in range(len(masks)) if np.any(coef[i])] or [0]
    return coef[used], tuple(masks[i] for i in used)
