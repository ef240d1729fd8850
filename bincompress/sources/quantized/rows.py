"""Steps that the formats share: integers out of words, and scales by blocks of rows and columns."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
# Computes the values of the rows start .. stop of a matrix into an array (stop - start, cols).
Fill = Callable[[int, int, Floats], None]


def integers(words: NDArray[Any], bits: int) -> Bytes:
    """Return the unsigned integers that rows of 32-bit words hold, the lowest bits first; bits: 4 or 8.

    words: (rows, n). Returns (rows, n * 32 / bits).
    """
    stored = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stored
    rows, count = stored.shape
    split = np.empty((rows, count, 2), np.uint8)
    np.bitwise_and(stored, 15, out=split[..., 0])
    np.right_shift(stored, 4, out=split[..., 1])
    return split.reshape(rows, 2 * count)


def multiply(values: Floats, scales: Floats, block: int) -> None:
    """Multiply each row's blocks of columns by their scales, in place; the last block may be narrower.

    values: (n, cols). scales: (n, ceil(cols / block)).
    """
    rows, cols = values.shape
    if block >= cols:
        values *= scales[:, :1]
        return
    whole = cols // block
    if cols % block == 0:
        values.reshape(rows, whole, block)[...] *= scales[:, :, None]
        return
    for number in range(whole + 1):
        values[:, number * block : (number + 1) * block] *= scales[:, number : number + 1]


def subtract(values: Floats, zeros: NDArray[Any], block: int) -> None:
    """Subtract each row's zero points from its blocks of columns, in place; shapes as for `multiply`."""
    cols = values.shape[1]
    if block >= cols:
        values -= zeros[:, :1]
        return
    for number in range(-(-cols // block)):
        values[:, number * block : (number + 1) * block] -= zeros[:, number : number + 1]


def scale_rows(scales: Floats, start: int, stop: int, height: int) -> Floats:
    """Return the scales of the rows start .. stop, where each row of scales is that of `height` rows."""
    return scales[np.arange(start, stop) // height]
