"""What the kernels of trained planes mean: their NumPy twins, written for reading."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def levels_of_latents(latents: Floats, levels: Floats, thresholds: Floats) -> Floats:
    """Return the level of each latent (units, block): as many levels up as there are thresholds below it."""
    place = (latents[:, :, None] > thresholds[:, None, :]).sum(-1)
    return np.take_along_axis(levels, place, axis=1)


def latent_gradients(latents: Floats, gradients: Floats, thresholds: Floats, limits: Floats) -> tuple[Floats, Floats]:
    """Return the gradient of each latent, and the sums of the weights' gradients above each threshold."""
    outward = np.where(gradients > 0, latents < limits[:, :1], latents > limits[:, 1:])
    above = np.concatenate([np.ones((*latents.shape, 1), bool), latents[:, :, None] > thresholds[:, None, :]], axis=2)
    sums = np.where(above, gradients[:, :, None], 0.0).sum(1, dtype=np.float64)
    return np.where(outward, np.float32(0.0), gradients), sums.astype(np.float32)
