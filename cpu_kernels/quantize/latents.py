"""Which level is nearest to a latent, and where does a gradient of the level go? For planes that are trained.

A unit is the weights that share levels: a row-block. Its levels ascend; thresholds are the middles between them, in
the latents' units.
"""

import numba
import numpy as np

from cpu_kernels.jit.compiler import kernel, out, view

F4 = numba.float32


@kernel(numba.void(view(F4, 2), view(F4, 2), view(F4, 2), out(F4, 2)))
def levels_of_latents(latents, levels, thresholds, weights):
    """Write the level nearest to each latent; on a threshold the lower one.

    latents, weights: float32 (units, block); levels: float32 (units, levels), ascending; thresholds: float32 (units,
    levels - 1).
    """
    block = latents.shape[1]
    for unit in range(latents.shape[0]):
        lowest = levels[unit, 0]
        for i in range(block):
            weights[unit, i] = lowest
        for k in range(thresholds.shape[1]):
            threshold, level = thresholds[unit, k], levels[unit, k + 1]
            for i in range(block):
                weights[unit, i] = level if latents[unit, i] > threshold else weights[unit, i]


@kernel(numba.void(view(F4, 2), view(F4, 2), view(F4, 2), view(F4, 2), out(F4, 2), out(F4, 2)), reassociate=True)
def latent_gradients(latents, gradients, thresholds, limits, results, sums):
    """Write the gradient of each latent, and the gradient's sum over the weights above each threshold.

    latents, gradients (of the weights), results: float32 (units, block); thresholds: float32 (units, levels - 1);
    limits: float32 (units, 2); outside them a gradient that would move a latent further out is zero (a step goes
    against the gradient); sums: float32 (units, levels), the first over the whole unit.
    """
    block = latents.shape[1]
    zero = np.float32(0.0)
    for unit in range(latents.shape[0]):
        low, high = limits[unit, 0], limits[unit, 1]
        total = zero
        for i in range(block):
            gradient = gradients[unit, i]
            total += gradient
            below, above = latents[unit, i] < low, latents[unit, i] > high
            outward = (below & (gradient > zero)) | (above & (gradient < zero))
            results[unit, i] = zero if outward else gradient
        sums[unit, 0] = total
        for k in range(thresholds.shape[1]):
            threshold = thresholds[unit, k]
            total = zero
            for i in range(block):
                total += gradients[unit, i] if latents[unit, i] > threshold else zero
            sums[unit, k + 1] = total
