"""Products of a bfloat16 matrix that was kept as it is, with a few tokens: read once, and never widened in memory."""

import collections
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from cpu_kernels.jit.addresses import float32_rows, int64_items, uint16_rows
from cpu_kernels.jit.compiler import kernel
from cpu_kernels.jit.llvm import as_float32
from cpu_kernels.parallel.workers import Workers

_TILE = 1 << 18  # items of the matrix that several tokens read in turn: 512 KB, from the second-level cache
# The int64 words of a job: sizes, and addresses of C-contiguous arrays.
FIELDS = (
    "bits",  # uint16 (rows, cols), bfloat16 patterns
    "rows", "cols",
    "x",  # float32 (tokens, cols)
    "tokens",
    "result",  # float32 (tokens, rows)
)  # fmt: skip
_AT: Any = collections.namedtuple("_AT", FIELDS)(*range(len(FIELDS)))  # type: ignore[misc]  # the word of each field
_WORDS = len(FIELDS)


def multiply_bfloat16(bits: NDArray[np.uint16], x: NDArray[np.float32], workers: Workers) -> NDArray[np.float32]:
    """Return float32 x (n, cols) times the transposed matrix, (n, rows), each token as it is alone.

    bits: bfloat16 patterns (rows, cols), C-contiguous; the rows are shared among the workers.
    """
    x = np.ascontiguousarray(x)
    result = np.empty((len(x), len(bits)), np.float32)
    job = np.array([bits.ctypes.data, *bits.shape, x.ctypes.data, len(x), result.ctypes.data], np.int64)
    workers.run_kernel(bfloat16_rows, job.ctypes.data, 0, len(bits))
    return result


@kernel(types.void(types.int64, types.int64, types.int64), reassociate=True)
def bfloat16_rows(job_address: Any, first: Any, last: Any) -> None:
    """Write the products of rows first .. last - 1 with the tokens, as the job at this address says."""
    job = int64_items(job_address, _WORDS)
    tokens, cols = job[_AT.tokens], job[_AT.cols]
    bits = uint16_rows(job[_AT.bits], job[_AT.rows], cols)
    x = float32_rows(job[_AT.x], tokens, cols)
    result = float32_rows(job[_AT.result], tokens, job[_AT.rows])
    tile = last - first if tokens == 1 else max(1, _TILE // cols)
    for start in range(first, last, tile):
        for token in range(tokens):
            own = x[token]
            for row in range(start, min(last, start + tile)):
                values = bits[row]
                total = np.float32(0.0)
                for col in range(np.uint64(own.size)):
                    total += as_float32(np.uint32(values[col]) << np.uint32(16)) * own[col]
                result[token, row] = total
