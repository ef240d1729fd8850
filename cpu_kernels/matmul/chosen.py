"""Products of a few matrices, chosen among many, with one token each, in one kernel call a thread.

For mixtures of experts: handing work to the threads once for all chosen experts, not once for each.
"""

from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from cpu_kernels.jit.addresses import NATIVE_CALLS, address, call, int64_items
from cpu_kernels.jit.compiler import kernel, out, view
from cpu_kernels.matmul.activations import Per
from cpu_kernels.matmul.prepacking import PackedMatrix
from cpu_kernels.matmul.product_kernel import FIELDS
from cpu_kernels.matmul.products import TokenProduct
from cpu_kernels.parallel.workers import Workers

_X, _RESULT, _QUANTIZE, _PREPARED, _TABLES, _STREAM, _FOLLOWING, _ASKED = (
    FIELDS.index(field) for field in ("x", "result", "quantize", "prepared", "tables", "stream", "following", "asked")
)
_FUNCTION = len(FIELDS)  # the word of a job behind its fields: the address of the kernel that does it
_WORDS = len(FIELDS) + 1
_BLOCK = 3  # words of a thread's block: the address of its first job, tiles of a matrix, 1 where all have one token


class ChosenProducts:
    """Matrices of one shape (rows, cols), as many as `count`, of which a call multiplies a few.

    For one caller at a time; what the kernels work in is kept with `workers`. Needs NATIVE_CALLS.

    >>> products = ChosenProducts(128, 1536, 2048, workers)  # doctest: +SKIP
    >>> products.put(3, matrix, 8, "segment")  # doctest: +SKIP
    >>> y = products(np.array([3]), x)  # doctest: +SKIP
    """

    def __init__(self, count: int, rows: int, cols: int, workers: Workers) -> None:
        self.rows, self.cols = rows, cols
        self._workers = workers
        self._tiles = 0
        self._there = np.zeros(count, np.bool_)
        self._table = np.zeros((workers.threads, count, _WORDS), np.int64)
        self._jobs = np.zeros((workers.threads, 0, _WORDS), np.int64)
        self._blocks = np.zeros((workers.threads, _BLOCK), np.int64)

    def put(self, number: int, matrix: PackedMatrix, bits: int, per: Per) -> bool:
        """Let this matrix have a number; return False where the ones that are there are laid out for other tiles.

        It has to stay in memory until it is removed. Raises ValueError for a matrix of another shape.
        """
        if (matrix.rows, matrix.cols) != (self.rows, self.cols):
            raise ValueError(f"matrix: {(matrix.rows, matrix.cols)}; expected {(self.rows, self.cols)}")
        if not NATIVE_CALLS or (self._there.any() and matrix.tiles != self._tiles):
            return False
        product = TokenProduct(matrix, bits, per, self._workers)
        self._tiles = matrix.tiles
        self._table[:, number, :_FUNCTION] = product.jobs
        self._table[:, number, _FUNCTION] = address(product.kernel)
        self._there[number] = True
        return True

    def remove(self, number: int) -> None:
        """Forget a matrix."""
        self._there[number] = False

    def has(self, numbers: NDArray[np.int64]) -> bool:
        """Return whether all these matrices are there."""
        return bool(self._there[numbers].all())

    def __call__(self, numbers: NDArray[np.int64], x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the products (n, rows) of the matrices of these numbers (n,), which are there.

        x: float32 (n, cols), a token for each, or (1, cols), one for all; C-contiguous.
        """
        count = len(numbers)
        if x.shape not in ((1, self.cols), (count, self.cols)) or x.dtype != np.float32 or not x.flags.c_contiguous:
            raise ValueError(f"x: {x.dtype} {x.shape}; expected float32 (1 or {count}, {self.cols}) in C order")
        if not self.has(numbers):
            raise ValueError(f"matrices {numbers[~self._there[numbers]]} are not there")
        if self._jobs.shape[1] != count:
            self._jobs = np.zeros((self._workers.threads, count, _WORDS), np.int64)
        result = np.empty((count, self.rows), np.float32)
        set_up(self._table, numbers, x, result, self._tiles, self._jobs, self._blocks)
        blocks = self._blocks
        self._workers.run_kernel(run_chosen, blocks.ctypes.data, blocks.strides[0], count * self._tiles)
        return result


_I8 = types.int64


@kernel(
    types.void(
        view(_I8, 3), view(_I8, 1), view(types.float32, 2), out(types.float32, 2), _I8, out(_I8, 3), out(_I8, 2)
    )
)  # fmt: skip
def set_up(table: Any, numbers: Any, x: Any, result: Any, tiles: Any, jobs: Any, blocks: Any) -> None:
    """Write every thread's jobs of these matrices, and its block."""
    shared = x.shape[0] == 1
    for thread in range(jobs.shape[0]):
        for i in range(numbers.size):
            for word in range(jobs.shape[2]):
                jobs[thread, i, word] = table[thread, numbers[i], word]
            jobs[thread, i, _X] = x.ctypes.data + (0 if shared else 4 * i * x.shape[1])
            jobs[thread, i, _RESULT] = result.ctypes.data + 4 * i * result.shape[1]
        blocks[thread, 0] = jobs.ctypes.data + 8 * thread * jobs.shape[1] * jobs.shape[2]
        blocks[thread, 1] = tiles
        blocks[thread, 2] = 1 if shared else 0


@kernel(types.void(_I8, _I8, _I8))
def run_chosen(block_address: Any, first: Any, last: Any) -> None:
    """Do items first .. last - 1 of a thread's jobs: the tiles of the first matrix, then those of the second, ..."""
    block = int64_items(block_address, _BLOCK)
    jobs, tiles = block[0], block[1]
    number = first // tiles
    begun = number
    while number * tiles < last:
        job_address = jobs + 8 * number * _WORDS
        job = int64_items(job_address, _WORDS)
        if block[2] and number > begun:
            before = int64_items(job_address - 8 * _WORDS, _WORDS)
            # The same token in the same place: its tables are there.
            if before[_TABLES] == job[_TABLES]:
                job[_QUANTIZE], job[_PREPARED] = 0, 1
        job[_ASKED] = 1 if number > begun else 0
        if (number + 1) * tiles < last:
            job[_FOLLOWING] = int64_items(job_address + 8 * _WORDS, _WORDS)[_STREAM] - job[_STREAM]
        call(job[_FUNCTION], job_address, max(first - number * tiles, 0), min(last - number * tiles, tiles))
        number += 1
