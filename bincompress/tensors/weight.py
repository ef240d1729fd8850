"""What is a tensor of a checkpoint: where it lies, and its values as float bit patterns?"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

# As the store writes them, by the names of safetensors. Other than the first three are kept as they are.
DTYPE_NAMES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool", "I8": "int8",
    "U8": "uint8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
FINITE = {"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}  # the greatest finite magnitude, as a bit pattern
_VALUE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Encoding:
    """How a quantized source stores a tensor, from which its values are computed while it is read."""

    format: str  # as a summary names it, such as "GGUF Q4_K"
    decoder: str  # the name under which `sources.decoding` knows what computes the values
    parts: tuple[tuple[str, "TensorSource"], ...]  # what lies in the file, by its role
    options: tuple[tuple[str, Any], ...] = ()  # numbers and names that the decoder needs
    first_row: int = 0  # of what is decoded, where the tensor is a part of its rows

    def part(self, role: str) -> "TensorSource | None":
        """Return what has this role in the file, None where nothing has."""
        return dict(self.parts).get(role)

    def option(self, name: str) -> Any:
        """Return what the decoder needs to know by this name."""
        return dict(self.options)[name]


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor lies: bytes offset .. offset + nbytes of a file, with its dtype and shape.

    Of an encoded tensor, dtype and shape are those of its values, file and offset those of its largest part, and
    nbytes are those of all its parts.
    """

    name: str
    dtype: str  # as safetensors writes it: "BF16", "F16", "F32"
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    # Not in repr, from which fingerprints of checkpoints are made that were there before there were encodings.
    encoding: Encoding | None = field(default=None, repr=False)

    @property
    def value_bytes(self) -> int:
        """Bytes of the values; for most tensors those in the file."""
        return self.nbytes if self.encoding is None else math.prod(self.shape) * _VALUE_BYTES[self.dtype]

    @property
    def memory(self) -> int:
        """Bytes of memory while the tensor is read: an encoded one is beside its values then."""
        return self.nbytes if self.encoding is None else self.nbytes + self.value_bytes

    def moved(self, place: Callable[[str], str]) -> "TensorSource":
        """Return the tensor with its files' names replaced, those of an encoding's parts too."""
        encoding = self.encoding
        if encoding is not None:
            parts = tuple((role, part.moved(place)) for role, part in encoding.parts)
            encoding = replace(encoding, parts=parts)
        return replace(self, file=place(self.file), encoding=encoding)


def encoded(name: str, dtype: str, shape: tuple[int, ...], encoding: Encoding) -> TensorSource:
    """Return a tensor whose values are computed from parts, the first of which is the largest."""
    first = encoding.parts[0][1]
    return TensorSource(
        name, dtype, shape, first.file, first.offset, sum(part.nbytes for _, part in encoding.parts), encoding
    )


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
