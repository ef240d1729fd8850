"""What is a tensor of a checkpoint: where it lies, and its values as float bit patterns?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# As the store writes them, by the names of safetensors. Other than the first three are kept as they are.
DTYPE_NAMES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool", "I8": "int8",
    "U8": "uint8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor lies: bytes offset .. offset + nbytes of a safetensors file, with its dtype and shape."""

    name: str
    dtype: str  # as safetensors writes it: "BF16", "F16", "F32"
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Weight:
    """A matrix as the checkpoint has it: float bit patterns, uint16 (BF16, F16) or uint32 (F32), shape (rows, cols)."""

    bits: NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (out_features) and cols (in_features)."""
        rows, cols = self.bits.shape
        return rows, cols

    @property
    def dtype_name(self) -> str:
        """The dtype as the store writes it: "bfloat16", "float16" or "float32"."""
        return DTYPE_NAMES[self.dtype]

    @property
    def flat(self) -> NDArray[Any]:
        """The patterns in one dimension, row-major, without a copy."""
        return self.bits.reshape(-1)

    def float32(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Return the exact values of these rows."""
        return _float32(self.bits[rows], self.dtype)

    def at(self, rows: NDArray[np.intp], cols: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the exact values at single places, one for each pair of row and column."""
        return _float32(self.bits[rows, cols], self.dtype)


def _float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32)
