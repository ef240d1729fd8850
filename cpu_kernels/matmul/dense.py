"""Products of a bfloat16 matrix that was kept as it is, for one token: it is read once and never widened in memory."""

from typing import Any

import numba
import numpy as np

from cpu_kernels.jit.compiler import kernel, out, view
from cpu_kernels.jit.llvm import as_float32

F4, U2 = numba.float32, numba.uint16


@kernel(numba.void(view(U2, 2), view(F4, 1), numba.int64, numba.int64, out(F4, 1)), reassociate=True)
def bfloat16_rows(bits: Any, x: Any, start: Any, stop: Any, result: Any) -> None:
    """Write the products of rows start .. stop - 1 with x.

    bits: uint16 (rows, cols) bfloat16 patterns; x: float32 (cols); result: float32 (rows).
    """
    for row in range(start, stop):
        values = bits[row]
        total = np.float32(0.0)
        for col in range(np.uint64(x.size)):
            total += as_float32(np.uint32(values[col]) << np.uint32(16)) * x[col]
        result[row] = total
