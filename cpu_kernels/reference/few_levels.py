"""The NumPy twins of the kernels that find the few levels of a matrix."""

import numpy as np
from numpy.typing import NDArray


def levels_of_units(values: NDArray[np.float32], step: int) -> list[list[set[float]]]:
    """Return the set of values of every `step` columns of each row."""
    starts = range(0, values.shape[1], step)
    return [[{float(value) + 0.0 for value in row[start : start + step]} for start in starts] for row in values]


def level_codes(weights: NDArray[np.float32], step: int, levels: NDArray[np.float32]) -> tuple[NDArray[np.uint8], int]:
    """Return which level of its unit each weight is (255: none), and how many are none."""
    own = levels[:, np.arange(weights.shape[1]) // step]  # (rows, cols, levels)
    equal = own == weights[:, :, None]
    codes = np.where(equal.any(axis=2), equal.argmax(axis=2), 255).astype(np.uint8)
    return codes, int(np.sum(codes == 255))
