"""NumPy twins of the gates beside those of Llama."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def sigmoid(x: NDArray[Any]) -> NDArray[np.float64]:
    """Return 1 / (1 + exp(-x))."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.maximum(x.astype(np.float64), -700.0))))


def clamped_gate(gate_up: Floats, alpha: float, limit: float) -> Floats:
    """Return x * sigmoid(alpha * x) * (y + 1) of the halves x and y of gate_up, x up to limit and y within it."""
    x, y = np.split(gate_up.astype(np.float64), 2, axis=-1)
    held = np.minimum(x, limit)
    return np.asarray(held * sigmoid(alpha * held) * (np.clip(y, -limit, limit) + 1.0), np.float32)
