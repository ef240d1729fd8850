"""What is in a GGUF file? Its header, which is untrusted: every count and length is checked before it is believed.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Read here and not by the `gguf` package, whose reader
trusts the file.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bincompress.errors import CheckpointError
from bincompress.sources.json_files import other_kind, refuse_pointer

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEADER_LIMIT = 128 << 20  # bytes; the largest vocabularies take 20 MB
_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 20
_MOST_TEXTS = 1 << 22  # in all arrays
_LONGEST_KEY = 1 << 16
_DIMENSIONS = 4
_LARGEST = 1 << 48  # of a dimension
_ALIGNMENT = 32
_MOST_ALIGNMENT = 1 << 20
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _TEXT, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the header has it."""

    name: str
    shape: tuple[int, ...]  # the rows first, as in a checkpoint; the file has the columns first
    type: int  # the number of its ggml type
    offset: int  # bytes from the start of the data


@dataclass(frozen=True)
class Header:
    """A file's metadata and its tensors."""

    path: Path
    size: int  # bytes of the file
    metadata: dict[str, Any]  # numbers, truths, texts, lists of texts, arrays of numbers
    tensors: tuple[GgufTensor, ...]
    data: int  # where the data of tensors begin
    alignment: int


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file; raises CheckpointError where it is not one, or contradicts itself."""
    refuse_pointer(path)
    try:
        with open(path, "rb") as file:
            begin = file.read(24)
            size = file.seek(0, 2)
            if not begin.startswith(_MAGIC):
                says = other_kind(begin)
                raise CheckpointError(
                    f"{path}: not a GGUF file: it begins with {begin[:4]!r}, expected {_MAGIC!r}"
                    + (f"; it is {says}" if says else "")
                )
            if len(begin) < 24:
                raise CheckpointError(f"{path}: truncated: {size} bytes; expected a GGUF header (incomplete download?)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Reader(path, mapped, size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror or error}") from None


class _Reader:
    """Reads one header from its start on."""

    def __init__(self, path: Path, mapped: mmap.mmap, size: int) -> None:
        self.path, self.mapped, self.size = path, mapped, size
        self.end = min(size, _HEADER_LIMIT)
        self.at = 4
        self.texts = 0

    def header(self) -> Header:
        (version,) = self._numbers("<I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            why = "in big-endian byte order, which is not read" if swapped else f"version {version}"
            raise CheckpointError(f"{self.path}: GGUF {why}; expected version 2 or 3 in little-endian byte order")
        count, keys = self._numbers("<QQ")
        if keys > _MOST_KEYS or count > _MOST_TENSORS:
            raise self._fault(
                f"{keys:,} keys and {count:,} tensors; expected at most {_MOST_KEYS:,} and {_MOST_TENSORS:,}"
            )
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text(_LONGEST_KEY, "a key")
            if key in metadata:
                raise self._fault(f"the key {key!r:.80} twice")
            (kind,) = self._numbers("<I")
            metadata[key] = self._value(kind, key)
        found: dict[str, GgufTensor] = {}
        for _ in range(count):
            tensor = self._tensor()
            if tensor.name in found:
                raise self._fault(f"the tensor {tensor.name!r:.80} twice")
            found[tensor.name] = tensor
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self._fault(f"general.alignment {alignment!r:.40}; expected a power of two up to {_MOST_ALIGNMENT:,}")
        return Header(
            self.path, self.size, metadata, tuple(found.values()), -(-self.at // alignment) * alignment, alignment
        )

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: GGUF header: {what}")

    def _take(self, count: int) -> int:
        """Move on by a count of bytes that has to be there; returns where they begin."""
        start = self.at
        if count > self.end - start:
            if self.end < self.size:
                raise self._fault(f"more than {_HEADER_LIMIT:,} bytes")
            raise self._fault(f"ends at byte {self.size:,}, in the middle of its entries (incomplete download?)")
        self.at += count
        return start

    def _numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack_from(layout, self.mapped, self._take(struct.calcsize(layout)))

    def _text(self, longest: int, what: str) -> str:
        (length,) = self._numbers("<Q")
        if length > longest:
            raise self._fault(f"{what} of {length:,} bytes; expected at most {longest:,}")
        start = self._take(length)
        try:
            return self.mapped[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self._fault(f"{what} at byte {start:,} is not UTF-8") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self._array(_NUMBERS[kind], 1)[0].item()
        if kind == _BOOL:
            return self._truths(1, key)[0]
        if kind == _TEXT:
            return self._text(self.end, key)
        if kind != _ARRAY:
            raise self._fault(f"{key!r:.80}: type {kind} is not known")
        inner, count = self._numbers("<IQ")
        if inner in _NUMBERS:
            return self._array(_NUMBERS[inner], count)
        if inner == _BOOL:
            return self._truths(count, key)
        if inner != _TEXT:
            raise self._fault(f"{key!r:.80}: an array of type {inner}; expected numbers, truths or texts")
        self.texts += count
        if self.texts > _MOST_TEXTS or count > (self.end - self.at) // 8:
            raise self._fault(
                f"{key!r:.80}: {count:,} texts; expected at most {_MOST_TEXTS:,}, and what the file holds"
            )
        return [self._text(self.end, key) for _ in range(count)]

    def _array(self, dtype: str, count: int) -> Any:
        size = np.dtype(dtype).itemsize
        start = self._take(count * size)
        return np.frombuffer(self.mapped[start : self.at], dtype)

    def _truths(self, count: int, key: str) -> list[bool]:
        values = self._array("u1", count)
        if values.size and values.max() > 1:
            raise self._fault(f"{key!r:.80}: {values.max()} as a truth; expected 0 or 1")
        return [bool(value) for value in values]

    def _tensor(self) -> GgufTensor:
        name = self._text(_LONGEST_KEY, "the name of a tensor")
        (count,) = self._numbers("<I")
        if not 1 <= count <= _DIMENSIONS:
            raise self._fault(f"{name!r:.80}: {count} dimensions; expected 1 to {_DIMENSIONS}")
        dims = self._numbers(f"<{count}Q")
        if not all(0 < dim < _LARGEST for dim in dims):
            raise self._fault(f"{name!r:.80}: dimensions {list(dims)}; expected numbers from 1 to {_LARGEST:,}")
        kind, offset = self._numbers("<IQ")
        return GgufTensor(name, tuple(reversed(dims)), kind, offset)
