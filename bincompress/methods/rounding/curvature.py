"""What does an error in a layer's weights cost, as the inputs of the layer tell?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import TensorError

Floats = NDArray[np.float32]

_DAMPING = 0.01  # of the mean of H's diagonal, as GPTQ has it
_MOST_DAMPING = 1e3
_STEP = 128  # columns of one step of the factorisation


@dataclass(frozen=True)
class Curvature:
    """What an error costs: H damped, float32 (cols, cols), and the upper factor U with H^-1 = U^T U."""

    hessian: Floats
    factor: Floats
    damping: float  # share of the mean diagonal that was added

    @property
    def importance(self) -> NDArray[np.float64]:
        """What rounding each column costs when the later ones make up for it, (cols,)."""
        return 1.0 / np.diag(self.factor).astype(np.float64) ** 2

    def scaled(self, scale: Floats) -> "Curvature":
        """Return what errors cost where the columns are multiplied by a scale (cols) and the inputs divided by it."""
        return Curvature(self.hessian / np.outer(scale, scale), self.factor * scale, self.damping)


def curvature(hessian: Floats, name: str = "") -> Curvature:
    """Damp and factorise H (cols, cols); the damping is raised tenfold until the factorisation succeeds.

    Raises TensorError where H is not finite or no damping helps.
    """
    exact = hessian.astype(np.float64)
    mean = float(np.trace(exact)) / len(exact)
    if not np.isfinite(exact).all() or mean < 0:
        raise TensorError(
            f"{name}: its Hessian has entries that are not finite or a negative diagonal; calibrate again"
        )
    mean = mean or 1.0  # inputs that are all zero: every rounding costs the same
    # A column whose input was always zero costs nothing, whatever it holds; refinement would divide zero by zero. As if
    # it had inputs of its own, its weights keep their nearest levels (GPTQ does likewise).
    dead = np.flatnonzero(np.diag(exact) == 0)
    exact[dead, dead] = mean
    damping = _DAMPING
    while damping < _MOST_DAMPING:
        # Reversed, the lower factor of H becomes the upper one of its inverse.
        damped = np.ascontiguousarray(exact[::-1, ::-1])
        damped[np.diag_indices_from(damped)] += damping * mean
        try:
            # The factorisation needs float64; its inverse, well conditioned by then, is kept in float32 anyway.
            factor = _inverse(_cholesky(damped))[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        if np.isfinite(factor).all():
            return Curvature(exact.astype(np.float32), np.ascontiguousarray(factor), damping)
        damping *= 10
    raise TensorError(
        f"{name}: its Hessian is not positive definite even with damping of {damping:g} times its mean diagonal"
    )


def _cholesky(matrix: NDArray[np.float64]) -> Floats:
    """Return the lower factor of a matrix, found in float64 by matrix products: in two thirds of LAPACK's time."""
    lower = np.zeros_like(matrix)
    for first in range(0, len(matrix), _STEP):
        last = first + _STEP
        panel = matrix[first:, first:last] - lower[first:, :first] @ lower[first:last, :first].T
        corner = np.linalg.cholesky(panel[:_STEP])
        lower[first:last, first:last] = corner
        lower[last:, first:last] = panel[_STEP:] @ np.linalg.inv(corner).T
    return lower.astype(np.float32)


def _inverse(lower: Floats) -> Floats:
    """Return the inverse of a lower triangle, by halves: a sixth of the work that a general inverse takes."""
    size = len(lower)
    if size <= _STEP:
        return np.tril(np.linalg.inv(lower))
    half = size // 2
    found = np.zeros_like(lower)
    found[:half, :half] = _inverse(lower[:half, :half])
    found[half:, half:] = _inverse(lower[half:, half:])
    found[half:, :half] = -found[half:, half:] @ (lower[half:, :half] @ found[:half, :half])
    return found
