"""What the kernel of sign factors computes, in NumPy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def flip_signs(
    signs: NDArray[np.int8], scale: Any, gradient: Any, gram: Any, coupling: Any, changes: Any, passes: int
) -> int:
    """Flip every sign that lowers the error when it is looked at: see cpu_kernels.quantize.sign_factors."""
    flips = 0
    for i in range(len(signs)):
        changes[i] = 0
        own = coupling[i, i] if len(coupling) else 1.0
        for _ in range(passes):
            before = flips
            for k in range(signs.shape[1]):
                step = -2 * scale[i] * signs[i, k]
                if step * (2 * gradient[i, k] + step * gram[k, k] * own) < 0:
                    signs[i, k] *= -1
                    flips += 1
                    gradient[i] += step * own * gram[k]
                    changes[i] += step * gram[k]
            if flips == before:
                break
        if len(coupling):
            others = np.arange(len(signs)) != i
            gradient[others] += np.outer(coupling[others, i], changes[i])
    return flips
