"""Products of low-rank pairs of matrices with one token: W x = second (first x), for several pairs with one input.

Both products are those of one plane; between them the middle is quantized as any input is. All first products are one
kernel call a thread, all second ones another: handing work to the threads takes longer than a small product. With a
single thread it is one call altogether.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from cpu_kernels.jit.addresses import NATIVE_CALLS, address, call, int64_items
from cpu_kernels.jit.compiler import kernel
from cpu_kernels.matmul.activations import Per
from cpu_kernels.matmul.prepacking import PackedMatrix
from cpu_kernels.matmul.product_kernel import FIELDS
from cpu_kernels.matmul.products import TokenProduct
from cpu_kernels.parallel.workers import Workers

_X, _RESULT = FIELDS.index("x"), FIELDS.index("result")
_FUNCTION = len(FIELDS)  # the word of a job behind its fields: the address of the kernel that does it
_END = _FUNCTION + 1  # the last tile of this job and of those before, counted together
_WORDS = _END + 1
_I8 = types.int64


class ChainedProducts:
    """Pairs of matrices, (rank, cols) and (rows, rank) with a rank and rows of each pair's own, applied to one token.

    For one caller at a time; what the kernels work in is kept with `workers`.

    >>> products = ChainedProducts([(first, second)], 8, "segment", workers)  # doctest: +SKIP
    >>> y = products(x)  # doctest: +SKIP
    """

    def __init__(
        self,
        pairs: Sequence[tuple[PackedMatrix, PackedMatrix]],
        bits: int,
        per: Per,
        workers: Workers,
        middle_bits: int | None = None,
    ) -> None:
        """bits: of the quantized input; middle_bits: of what lies between the products, by default the same."""
        self.cols = pairs[0][0].cols
        self.rows = sum(second.rows for _, second in pairs)
        self._workers = workers
        self._firsts = [TokenProduct(first, bits, per, workers) for first, _ in pairs]
        self._seconds = [TokenProduct(second, middle_bits or bits, per, workers) for _, second in pairs]
        self._x = np.empty((len(pairs), self.cols), np.float32)
        self._middle = np.empty((1, sum(first.rows for first, _ in pairs)), np.float32)
        self._edges = np.cumsum([0, *(second.rows for _, second in pairs)])
        if NATIVE_CALLS:
            self._begin()

    def __call__(self, x: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the products (1, rows), one pair's rows after the other's.

        x: float32 (1, cols); scale: float32 (pairs, cols), multiplies x for each pair.
        """
        result = np.empty((1, self.rows), np.float32)
        np.multiply(x, scale, out=self._x)
        if not NATIVE_CALLS:
            return self._from_python(result)
        self._jobs[:, len(self._firsts) :, _RESULT] = result.ctypes.data + 4 * self._edges[:-1]
        run, step = self._workers.run_kernel, self._blocks.strides[0]
        for address_, tiles in self._calls:
            run(run_listed, address_, step, tiles)
        return result

    def _begin(self) -> None:
        """Write what does not change from one token to the next."""
        products, pairs = [*self._firsts, *self._seconds], len(self._firsts)
        self._jobs = np.zeros((self._workers.threads, len(products), _WORDS), np.int64)
        places = np.cumsum([0, *(first.matrix.rows for first in self._firsts)])
        together = self._workers.threads == 1
        end = 0
        for number, product in enumerate(products):
            end = product.matrix.tiles + (end if together or number != pairs else 0)
            self._jobs[:, number, :_FUNCTION] = product.jobs
            self._jobs[:, number, _FUNCTION] = address(product.kernel)
            self._jobs[:, number, _END] = end
            middle = self._middle.ctypes.data + 4 * int(places[number % pairs])
            if number < pairs:
                self._jobs[:, number, _X] = self._x.ctypes.data + 4 * number * self.cols
                self._jobs[:, number, _RESULT] = middle
            else:
                self._jobs[:, number, _X] = middle
        # A call's block is the address of its first job, in each thread's own jobs.
        firsts = (0,) if together else (0, pairs)
        thread_bytes = self._jobs.strides[0]
        threads = np.arange(self._workers.threads)[:, None]
        self._blocks = self._jobs.ctypes.data + thread_bytes * threads + 8 * _WORDS * np.array(firsts)
        lasts = (end,) if together else (int(self._jobs[0, pairs - 1, _END]), end)
        base = self._blocks.ctypes.data
        self._calls = [(base + 8 * number, tiles) for number, tiles in enumerate(lasts)]

    def _from_python(self, result: NDArray[np.float32]) -> NDArray[np.float32]:
        place = 0
        for number, (first, second) in enumerate(zip(self._firsts, self._seconds, strict=True)):
            middle = first(self._x[number : number + 1])
            result[:, place : place + second.matrix.rows] = second(middle)
            place += second.matrix.rows
        return result


@kernel(types.void(_I8, _I8, _I8))
def run_listed(block_address: Any, first: Any, last: Any) -> None:
    """Do tiles first .. last - 1 of a thread's jobs, counted over all jobs, which end where each says."""
    job_address = int64_items(block_address, 1)[0]
    begun = np.int64(0)
    while begun < last:
        job = int64_items(job_address, _WORDS)
        end = job[_END]
        if end > first:
            call(job[_FUNCTION], job_address, max(first - begun, 0), min(last, end) - begun)
        begun = end
        job_address += 8 * _WORDS
