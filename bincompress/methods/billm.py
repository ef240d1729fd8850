"""BiLLM (arXiv 2402.04291, as DBellQuant uses it): salient columns get two residual planes, the rest a split by size.

Stored without loss in the one format: two planes and a column plane for the salient columns, seven coefficients a
row-block. A salient weight is offset +- a +- b; another one is offset +- scale, with an offset and a scale of its own
for the small ("concentrated") and for the large ("sparse") weights of the row-block.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import TensorError
from bincompress.methods.declaration import Binarized, CompensatedSettings, Method, Size
from bincompress.methods.inputs import Inputs
from bincompress.methods.rounding import calibrated
from bincompress.methods.rounding.codebook import Codebook
from bincompress.tensors.weight import Weight

Floats = NDArray[np.float64]
_SALIENT = 1  # the bit of a salient column in the column plane
_MOST_SALIENT = 50 / 128  # of a block's columns
_COUNTS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 25, 30, 40, 50)  # salient columns tried, of 128
_SPLITS = np.linspace(0.1, 0.9, 33)  # thresholds tried, shares of the greatest magnitude


def _mix() -> tuple[tuple[float, ...], ...]:
    """Return how terms are made of the coefficients: {}, {0}, {1}, {0, 1}, each alone and with the column plane."""
    rows = []
    for salient, other in ((0, 3), (1, 4), (2, 5), (None, 6)):
        for sign in (1.0, -1.0):
            row = [0.0] * 7
            if salient is not None:
                row[salient] = 0.5
            row[other] = 0.5 * sign
            rows.append(tuple(row))
    return tuple(rows)


CODEBOOK = Codebook(planes=2, terms=(0, 4, 1, 5, 2, 6, 3, 7), mix=_mix(), column_planes=1)


@dataclass(frozen=True)
class BillmSettings(CompensatedSettings):
    """How BiLLM rounds a tensor; always with error compensation."""

    method: ClassVar[str] = "billm"

    @property
    def calibrated(self) -> bool:
        """Whether statistics of the layer's inputs are needed: always."""
        return True

    def record(self) -> dict[str, Any]:
        """Return what matters to the bytes, as JSON."""
        return self.calibrated_record()

    def problem(self, shape: tuple[int, int]) -> str:
        """Return what is wrong beyond single values; empty if nothing."""
        if self.scale_bits == 8:
            return "8-bit scales have no sign, and billm's coefficients do"
        return super().problem(shape)


def binarize(weight: Weight, settings: BillmSettings, inputs: Inputs | None = None) -> Binarized:
    """Return the planes of BiLLM's method with error compensation."""
    if inputs is None:
        raise TensorError("billm needs statistics of the layer's inputs; give --stats")
    found = calibrated.binarize(weight, settings, inputs, calibrated.Scheme(CODEBOOK, start, 2, 7))
    salient = int(np.bitwise_count(found.tensor.column_planes).sum())
    return replace(found, notes={**found.notes, "salient_columns": salient})


def start(weights: NDArray[np.float32], importance: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    """Return the seven coefficients of each row (rows, 7) and the bit of the salient columns (cols).

    Both numbers of BiLLM are searched for the least error: how many columns are salient (ordered by the sum of
    w^2 / diag(U)^2), and the magnitude that parts the other weights.
    """
    exact = weights.astype(np.float64)
    cols = exact.shape[1]
    order = np.argsort(-(exact**2).sum(axis=0) * importance, kind="stable")
    best = (np.inf, 0)
    for wanted in _COUNTS:
        count = min(wanted * cols // 128, int(cols * _MOST_SALIENT))
        salient, rest = exact[:, order[:count]], exact[:, order[count:]]
        error = _error(salient, _two_residual(salient)[1], importance[order[:count]])
        error += _error(rest, _one(rest)[2], importance[order[count:]])
        best = min(best, (error, count))
    count = best[1]
    coef = np.zeros((len(exact), 7))
    coef[:, :3] = _two_residual(exact[:, order[:count]])[0]
    coef[:, 3:] = _split(exact[:, order[count:]], importance[order[count:]])
    bits = np.zeros(cols, np.uint8)
    bits[order[:count]] = _SALIENT
    return coef, bits


def _error(weights: Floats, values: Floats, importance: Floats) -> float:
    return float(((weights - values) ** 2 @ importance).sum())


def _one(weights: Floats, mask: NDArray[np.bool_] | None = None) -> tuple[Floats, Floats, Floats]:
    """Return each row's mean, its mean distance from it, and the binarized weights; of masked weights alone."""
    if not weights.shape[1]:
        nothing = np.zeros((len(weights), 1))
        return nothing, nothing, weights
    chosen = np.ones(weights.shape, bool) if mask is None else mask
    number = np.maximum(chosen.sum(axis=1, keepdims=True), 1)
    mean = (weights * chosen).sum(axis=1, keepdims=True) / number
    scale = (np.abs(weights - mean) * chosen).sum(axis=1, keepdims=True) / number
    return mean, scale, np.where(weights > mean, mean + scale, mean - scale)


def _two_residual(weights: Floats) -> tuple[Floats, Floats]:
    """Return offset and two scales (rows, 3), and the weights binarized twice, the second time what the first left."""
    mean, scale, values = _one(weights)
    mean_2, scale_2, values_2 = _one(weights - values)
    return np.concatenate([mean + mean_2, scale, scale_2], axis=1), values + values_2


def _split(weights: Floats, importance: Floats) -> Floats:
    """Return four coefficients a row: of a constant, the sign plane, the part's plane and both, best threshold."""
    coef = np.zeros((len(weights), 4))
    if not weights.shape[1]:
        return coef
    magnitudes = np.abs(weights)
    least = np.inf
    for share in _SPLITS * magnitudes.max():
        sparse = magnitudes > share
        mean_s, scale_s, values_s = _one(weights, sparse)
        mean_c, scale_c, values_c = _one(weights, ~sparse)
        error = _error(weights, np.where(sparse, values_s, values_c), importance)
        if error < least:
            least = error
            halves = (mean_s + mean_c, scale_s + scale_c, mean_s - mean_c, scale_s - scale_c)
            coef = np.concatenate(halves, axis=1) / 2
    return coef


METHOD = Method(
    summary="BiLLM: salient columns get two residual planes, the rest a split by magnitude (arXiv 2402.04291)",
    settings=BillmSettings,
    binarize=binarize,
    size=lambda settings: Size(2, 7),
    column_planes=True,
)
