"""What the decoder multiplies with: the interface of a matrix, and its dense form for unquantized models."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_WIDENED_AT_ONCE = 1 << 22  # bf16 items that are float32 at a time: 16 MB


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

    def __init__(self, weight: NDArray[Any]) -> None:
        self.weight = weight

    @property
    def rows(self) -> int:
        """Outputs."""
        return int(self.weight.shape[0])

    @property
    def cols(self) -> int:
        """Inputs."""
        return int(self.weight.shape[1])

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols) times the transposed matrix, (n, rows)."""
        if self.weight.dtype == np.float32:
            return np.asarray(x @ self.weight.T)
        result = np.empty((len(x), self.rows), np.float32)
        step = max(1, _WIDENED_AT_ONCE // self.cols)
        for start in range(0, self.rows, step):
            result[:, start : start + step] = x @ _widened(self.weight[start : start + step]).T
        return result

    def rows_of(self, ids: NDArray[np.int64]) -> Floats:
        """Return these rows, (n, cols), as float32."""
        return _widened(self.weight[ids])


def _widened(weight: NDArray[Any]) -> Floats:
    if weight.dtype == np.float32:
        return weight
    return (weight.astype(np.uint32) << np.uint32(16)).view(np.float32)
