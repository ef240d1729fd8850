"""Where does a row-block's rounding begin? Scales found from its weights alone, as error compensation reaches it.

Every function takes weights (rows, cols) and the importance of each column (cols,), and returns coefficients
(rows, coefs) with each column's own bits (cols,).
"""

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.rounding.codebook import Codebook, sum_of_planes
from bincompress.methods.rounding.coefficients import walsh
from bincompress.methods.rounding.compensation import Start
from cpu_kernels.quantize.compensation import fit_scales, split_two

Found = tuple[NDArray[np.float64], NDArray[np.uint8]]
_STEPS = 12  # of assigning and averaging; the last ones move scales by thousandths


def mean_magnitude(weights: NDArray[np.float32], importance: NDArray[np.float64]) -> Found:
    """One plane: the weighted mean magnitude."""
    means = np.abs(weights.astype(np.float64)) @ importance / importance.sum()
    return means[:, None], np.zeros(weights.shape[1], np.uint8)


def two_groups(weights: NDArray[np.float32], importance: NDArray[np.float64]) -> Found:
    """Two planes: the exact best split of the magnitudes, as half sum and half difference of the two means."""
    means = np.empty((len(weights), 2))
    split_two(np.ascontiguousarray(weights), np.ascontiguousarray(importance), means)
    half_sum, half_difference = means.sum(axis=1) / 2, (means[:, 1] - means[:, 0]) / 2
    return np.stack([half_sum, half_difference], axis=1), np.zeros(weights.shape[1], np.uint8)


def of_planes(planes: int) -> Start:
    """Return the start for a sum of so many planes."""
    if planes <= 2:
        return mean_magnitude if planes == 1 else two_groups
    # Half as much from plane to plane: near what evenly spaced levels have.
    return _fitted(sum_of_planes(planes), np.ldexp(1.0, -np.arange(planes)))


def of_groups(codebook: Codebook, groups: int) -> Start:
    """Return the start for so many groups of magnitudes (a power of two), coefficients in Walsh order."""
    return _fitted(codebook, walsh(2.5 * (np.arange(groups) + 0.5) / groups))


def _fitted(codebook: Codebook, shape: NDArray[np.float64]) -> Start:
    def start(weights: NDArray[np.float32], importance: NDArray[np.float64]) -> Found:
        squares = weights.astype(np.float64) ** 2 @ importance / importance.sum()
        coef = np.sqrt(squares)[:, None] * shape
        fit_scales(np.ascontiguousarray(weights), np.ascontiguousarray(importance), codebook.features, _STEPS, coef)
        return coef, np.zeros(weights.shape[1], np.uint8)

    return start
