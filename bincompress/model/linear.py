"""What the decoder multiplies with: the interface of a matrix, and its dense form for unquantized models."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bincompress.model.threads import over_ranges
from bincompress.process.blas import one_blas_thread
from cpu_kernels.matmul.dense import multiply_bfloat16
from cpu_kernels.parallel.workers import Workers

Floats = NDArray[np.float32]

_WIDENED_AT_ONCE = 1 << 21  # bf16 items that are float32 at a time in a thread: 8 MB
_ROWS_PER_THREAD = 64
# Up to so many tokens, a matrix that is not multiplied by our own kernels gives each token what it gives it alone: BLAS
# adds up in another order for other numbers of tokens, so it is handed one at a time.
FEW_TOKENS = 16


class Linear(Protocol):
    """A matrix (rows, cols), in whatever form, that multiplies activations."""

    @property
    def rows(self) -> int:
        """Outputs."""

    @property
    def cols(self) -> int:
        """Inputs."""

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols) times the transposed matrix: a new C-contiguous array (n, rows)."""


class Embedding(Protocol):
    """A table of vectors, one per token."""

    def rows_of(self, ids: NDArray[np.int64]) -> Floats:
        """Return the vectors of these tokens, (n, hidden), in a new array."""


class WeightSource(Protocol):
    """Where a decoder's weights come from: a checkpoint, or a store of packed matrices."""

    def vector(self, names: Sequence[str]) -> Floats:
        """Return one-dimensional tensors (norms, biases), one after the other."""

    def linear(self, names: Sequence[str]) -> Linear:
        """Return matrices with the same input as one, rows one below the other."""

    def embedding(self, name: str) -> Embedding:
        """Return the table of token vectors."""


class DenseLinear:
    """A matrix of float32 values or bfloat16 bit patterns (uint16), also as an embedding table."""

    tokens_alike = FEW_TOKENS

    def __init__(self, weight: NDArray[Any], workers: Workers | None = None) -> None:
        self.rows, self.cols = (int(size) for size in weight.shape)
        self.nbytes = weight.nbytes
        self.path = "kept bfloat16" if weight.dtype == np.uint16 else "kept float32"
        self._weight = weight
        self._workers = workers or Workers(1)

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols) times the transposed matrix, (n, rows)."""
        if self._weight.dtype == np.uint16 and len(x) <= FEW_TOKENS:  # no BLAS: to bound its threads takes time
            return multiply_bfloat16(self._weight, x, self._workers)
        result = np.empty((len(x), self.rows), np.float32)
        tile = max(1, _WIDENED_AT_ONCE // self.cols)

        def work(start: int, stop: int, _: int) -> None:
            for row in range(start, stop, tile):
                last = min(stop, row + tile)
                write_product(x, widened(self._weight[row:last]), result[:, row:last])

        with one_blas_thread():
            over_ranges(self._workers, work, self.rows, _ROWS_PER_THREAD)
        return result

    def rows_of(self, ids: NDArray[np.int64]) -> Floats:
        """Return these rows, (n, cols), as float32."""
        return np.array(widened(self._weight[ids]))


class KeptEmbedding:
    """A table of token vectors, float32 or bfloat16 bit patterns (uint16), in runs of rows that may be mapped."""

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self._parts = list(parts)
        self._cols = int(parts[0].shape[1])

    def rows_of(self, ids: NDArray[np.int64]) -> Floats:
        """Return these rows, (n, cols), as float32."""
        found = np.empty((len(ids), self._cols), np.float32)
        first = 0
        for part in self._parts:
            here = (ids >= first) & (ids < first + len(part))
            found[here] = widened(part[ids[here] - first])
            first += len(part)
        return found


def write_product(x: Floats, weight: Floats, result: Floats) -> None:
    """Write x (n, cols) times the transposed weight (rows, cols) into result (n, rows), by BLAS.

    Up to FEW_TOKENS tokens are multiplied one at a time, so that each gets what it gets alone.
    """
    if len(x) > FEW_TOKENS:
        result[:] = x @ weight.T
        return
    for token in range(len(x)):
        result[token] = (x[token : token + 1] @ weight.T)[0]


def widened(weight: NDArray[Any]) -> Floats:
    """Return float32 values of bfloat16 patterns; float32 values come back as they are."""
    if weight.dtype == np.float32:
        return weight
    return (weight.astype(np.uint32) << np.uint32(16)).view(np.float32)
