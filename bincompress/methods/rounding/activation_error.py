"""What does rounding a layer's inputs cost, when the engine rounds them to a few bits with one scale a segment?

A segment's step is its greatest |x| over the number of levels, and an input is off by up to half a step: a mean square
of a twelfth of the step's. Which step to expect follows from the statistics of the channels. The magnitudes of a
channel are taken as Weibull distributed, with its mean square and with its absmax as the value that one token in all
reaches; channels as independent of each other.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.methods.inputs import Inputs
from cpu_kernels.matmul.activations import LEVELS, SEGMENT

Floats = NDArray[np.float64]

_TOKENS = 1 << 15  # of calibration, where the statistics do not say
_FEWEST = 64  # tokens that the tail of a distribution is told from
_POINTS = 128  # at which the distribution of a segment's greatest input is taken
_LEAST, _GREATEST = 1e-3, 2.0  # of these points, in the greatest absmax of the segment
# A normal distribution has a shape of about 1.4 here, an exponential one 1; below 0.15 single tokens make up the rest.
_SHAPES = np.geomspace(0.15, 4.0, 400)


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """The distributions of |x|, a channel each: P(|x| > t) = exp(-(t / unit) ** shape)."""

    unit: Floats  # (cols,): zero of a channel that is always zero
    shape: Floats  # (cols,)
    square: Floats  # (cols,): the mean of x ** 2
    absmax: Floats  # (cols,)

    @classmethod
    def of(cls, inputs: Inputs) -> "Magnitudes":
        """Return those that have the mean square and the absmax of these inputs."""
        square = np.maximum(np.diag(inputs.hessian).astype(np.float64), 0.0)
        absmax = inputs.absmax.astype(np.float64)
        shapes, gammas, reached = _shapes(max(_FEWEST, inputs.tokens or _TOKENS))
        used = (square > 0) & (absmax > 0)
        size = np.sqrt(np.where(used, square, 1.0))
        shape = np.interp(-np.log(np.where(used, absmax, 1.0) / size), -reached, shapes)
        unit = np.where(used, size / np.sqrt(np.interp(shape, shapes, gammas)), 0.0)
        return cls(unit, shape, square, absmax)

    def moved(self, weights: NDArray[Any], scale: Floats, bits: int, size: float) -> float:
        """Return the mean square that rounding x / scale moves the outputs of weights (rows, cols) by, as a share.

        weights: of the scaled inputs. bits: 8 or 6; 16 for no rounding. size: the mean square of the outputs.
        """
        if bits not in LEVELS or not size > 0:
            return 0.0
        squares = np.einsum("rc,rc->c", weights, weights, dtype=np.float64)  # without a copy of them all
        return float(squares @ self.variances(scale, bits)) / size

    def variances(self, scale: Floats, bits: int) -> Floats:
        """Return the mean squares of the errors that rounding x / scale to 8 or 6 bits makes, (cols,)."""
        found = np.zeros(len(scale))
        for first in range(0, len(scale), SEGMENT):
            used = first + np.flatnonzero(self.unit[first : first + SEGMENT] > 0)
            if used.size:
                points = np.max(self.absmax[used] / scale[used]) * np.geomspace(_LEAST, _GREATEST, _POINTS)
                at, greatest = self._greatest(points, used, scale[used])
                # An input that is the greatest of its segment is exact; one that becomes zero is all error.
                not_itself = np.maximum(greatest.sum(axis=1, keepdims=True) - greatest, 0.0)
                square = self.square[used] / scale[used] ** 2
                found[used] = np.sum(not_itself * np.minimum((at / LEVELS[bits]) ** 2 / 12, square), axis=0)
        return found

    def _greatest(self, points: Floats, used: NDArray[np.int64], scale: Floats) -> tuple[Floats, Floats]:
        """Return magnitudes between points (n, 1), and how often a channel is there, all others below (n, cols)."""
        below = -np.expm1(-((points[:, None] / (self.unit[used] / scale)) ** self.shape[used]))
        logs = np.log(np.maximum(below, 1e-300))
        others = np.exp(logs.sum(axis=1, keepdims=True) - logs)
        between = (others[1:] + others[:-1]) / 2
        return (points[1:, None] + points[:-1, None]) / 2, np.diff(below, axis=0) * between


@cache
def _shapes(tokens: int) -> tuple[Floats, Floats, Floats]:
    """Return shapes with, for each, its mean square and the logarithm of what one token in all reaches.

    The mean square is in squares of the unit. What is reached is in roots of the mean square, and falls along shapes.
    """
    gammas = np.array([math.gamma(1 + 2 / shape) for shape in _SHAPES])
    reached = math.log(math.log(tokens)) / _SHAPES - np.log(gammas) / 2
    first = int(np.argmax(reached))  # the tails of lower shapes begin beyond so many tokens
    return _SHAPES[first:], gammas[first:], reached[first:]


def peak(absmax: NDArray[np.float32], scale: NDArray[np.float32]) -> float:
    """Return the greatest absmax of the inputs over a scale, as a multiple of the channels' root mean square."""
    scaled = absmax.astype(np.float64) / scale
    size = float(np.sqrt(np.mean(scaled**2)))
    return float(scaled.max() / size) if size > 0 else 1.0
