"""What weights does a stored tensor stand for?"""

import numpy as np
from numpy.typing import NDArray

from bincompress.process.blas import one_blas_thread
from bincompress.tensors.forms import Stored
from bincompress.tensors.low_rank import LowRankTensor
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.quantize.unpacking import expand, look_up_levels


def dequantize(packed: Stored, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Return rows of a packed tensor as float32 (rows, cols), listed weights in their places."""
    first, last, _ = rows.indices(packed.shape[0])
    cols = packed.shape[1]
    if isinstance(packed, LowRankTensor):
        with one_blas_thread():
            weights = packed.weights(slice(first, last))
    else:
        weights = _of_planes(packed, first, last)
    begin, end = np.searchsorted(packed.listed_index, [first * cols, last * cols])
    flat = (packed.listed_index[begin:end] - np.uint64(first * cols)).astype(np.int64)
    weights.reshape(-1)[flat] = packed.listed_value[begin:end]
    return weights


def _of_planes(packed: PackedTensor, first: int, last: int) -> NDArray[np.float32]:
    """Return rows first .. last - 1 of what the formula gives, float32."""
    cols = packed.shape[1]
    weights = np.empty((last - first, cols), np.float32)
    planes = packed.all_planes(slice(first, last))
    if packed.levels is not None:
        look_up_levels(planes, packed.levels, weights)
    else:
        coef = packed.coef if packed.coef.shape[1] == 1 else packed.coef[:, first:last]
        terms = np.array(packed.terms, np.uint64)
        expand(planes, np.ascontiguousarray(coef), terms, packed.block, weights)
    if packed.in_scale is not None:
        weights *= packed.in_scale
    return weights


def dequantize_at(packed: Stored, rows: NDArray[np.intp], cols: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return the weights at single places, one for each pair of row and column."""
    values = np.empty(rows.size, np.float32)
    for row in np.unique(rows):
        here = rows == row
        values[here] = dequantize(packed, slice(int(row), int(row) + 1))[0, cols[here]]
    return values


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return bfloat16 patterns, rounded to nearest, ties to even; finite input."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
