"""How do arrays become chunk files and arrays again? Sizes are held against the files before memory is taken."""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from bincompress.process.systems import forget_pages
from bincompress.store.files import Files
from bincompress.store.layout import CHECKSUM_BYTES, ZSTD_LEVEL, ArrayLayout, array_node, layout_of

_FREE_BYTES = 32 << 20  # of a coded chunk, whatever its file's size: an all-zero plane is coded in a few bytes
_MOST_RATIO = 1024  # of a larger one; planes and scales are far below 10
_ZSTD_HEADER_BYTES = 18
_RUN_BYTES = 1 << 23  # of rows that are read at a time
_FINITE_STEP = 1 << 17  # values that are looked at in one go: they stay in the cache


def write_array(
    files: Files, path: str, values: NDArray[Any], archive: bool, attributes: Mapping[str, Any] | None = None
) -> int:
    """Write an array, its metadata last, and return the bytes of its chunks.

    The bytes are zarr's (a test compares them); it takes a quarter of the time and no copy of the data.
    """
    stored = write_chunks(files, path, values, archive)
    files.write(f"{path}/zarr.json", [array_node(layout_of(values, archive), attributes or {})])
    return stored


def write_chunks(files: Files, path: str, values: NDArray[Any], archive: bool) -> int:
    """Write an array's chunks and return their bytes."""
    layout, stored = layout_of(values, archive), 0
    for key, part in layout.parts():
        chunk = values[part]
        if chunk.shape != layout.chunks:  # the last one: a file is of a whole chunk
            whole = np.zeros(layout.chunks, values.dtype)
            whole[tuple(slice(size) for size in chunk.shape)] = chunk
            chunk = whole
        little = np.ascontiguousarray(chunk).astype(chunk.dtype.newbyteorder("<"), copy=False)
        data: Any = little.reshape(-1).view(np.uint8).data
        if archive:
            data = memoryview(_zstd().encode(data))
        checksum = google_crc32c.value(np.frombuffer(data, np.uint8)).to_bytes(CHECKSUM_BYTES, "little")
        files.write(f"{path}/{key}", [data, checksum])
        stored += data.nbytes + CHECKSUM_BYTES
    return stored


def read_array(
    files: Files, path: str, layout: ArrayLayout, size: Callable[[str], int | None] | None = None
) -> NDArray[Any]:
    """Read an array and check its checksums; raises ValueError where files and layout do not fit.

    size: gives a file's bytes, None where it is not there; by default each file is asked for.
    """
    check_sizes(layout, path, size or files.size)
    if layout.count == 1:  # what is read is the array
        chunk = _chunk(files.read(f"{path}/{next(layout.parts())[0]}", layout.chunk_nbytes), layout)
        if layout.chunks == layout.shape:
            return chunk.reshape(layout.shape)
    values = np.empty(layout.shape, layout.dtype)
    for key, part in layout.parts():
        chunk = _chunk(files.read(f"{path}/{key}", layout.chunk_nbytes), layout).reshape(layout.chunks)
        target = values[part]
        target[...] = chunk[tuple(slice(length) for length in target.shape)]
    return values


def check_sizes(layout: ArrayLayout, path: str, size: Callable[[str], int | None]) -> None:
    """Raise ValueError where a chunk's file is missing, or not of a size that justifies the memory it asks for."""
    expected = layout.chunk_nbytes + CHECKSUM_BYTES
    for key, _ in layout.parts():
        found = size(f"{path}/{key}")
        if found is None:
            raise ValueError(f"its file {key} is missing")
        if not layout.archive and found != expected:
            raise ValueError(f"{found:,} bytes; expected {expected:,}")
        if layout.archive and layout.chunk_nbytes > max(_FREE_BYTES, _MOST_RATIO * found):
            raise ValueError(f"{found:,} bytes are said to hold {layout.chunk_nbytes:,}; expected at most "
                             f"{_MOST_RATIO} times as many")  # fmt: skip


def _chunk(content: bytes | None, layout: ArrayLayout) -> NDArray[Any]:
    """Return a chunk's values, flat; raises ValueError where its checksum or its length is not what it has to be."""
    if content is None or len(content) < CHECKSUM_BYTES:
        raise ValueError("a file of it is missing or cut short")
    data = memoryview(content)[:-CHECKSUM_BYTES]
    if google_crc32c.value(np.frombuffer(data, np.uint8)) != int.from_bytes(content[-CHECKSUM_BYTES:], "little"):
        raise ValueError("its bytes do not fit their checksum")
    if layout.archive:
        found = _coded_size(bytes(data[:_ZSTD_HEADER_BYTES]))
        if found != layout.chunk_nbytes:
            raise ValueError(f"its coded bytes hold {found:,}; expected {layout.chunk_nbytes:,}")
        decoded = np.empty(layout.chunk_nbytes, np.uint8)
        _zstd().decode(data, decoded)
        return decoded.view(np.dtype(layout.dtype).newbyteorder("<"))
    if len(data) != layout.chunk_nbytes:
        raise ValueError(f"{len(data):,} bytes; expected {layout.chunk_nbytes:,}")
    return np.frombuffer(data, np.dtype(layout.dtype).newbyteorder("<"))


def _coded_size(header: bytes) -> int:
    """Return how many bytes a zstd frame says it holds (RFC 8878, 3.1.1.1); raises ValueError where it does not say."""
    if len(header) < 6 or header[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("its bytes are not zstd's")
    single = header[4] >> 5 & 1
    size = (single, 2, 4, 8)[header[4] >> 6]
    start = 6 - single + (0, 1, 2, 4)[header[4] & 3]
    if not size:
        raise ValueError("its coded bytes do not say how many they hold")
    return int.from_bytes(header[start : start + size], "little") + (256 if size == 2 else 0)


def _zstd() -> Any:
    import numcodecs

    return numcodecs.Zstd(level=ZSTD_LEVEL, checksum=False)


def map_array(files: Files, path: str, layout: ArrayLayout) -> NDArray[Any] | None:
    """Map an array of this machine, read-only and unchecked; None where it is not one uncompressed chunk."""
    parts = map_parts(files, path, layout) if layout.chunks == layout.shape else None
    return None if parts is None else parts[0]


def map_parts(files: Files, path: str, layout: ArrayLayout) -> list[NDArray[Any]] | None:
    """Map an array of this machine in the runs of rows that are a chunk each, read-only and unchecked.

    None where chunks are coded, not local files, or cut along another axis than the first.
    """
    if layout.archive or layout.chunks[1:] != layout.shape[1:] or not layout.nbytes:
        return None
    found, dtype = [], np.dtype(layout.dtype).newbyteorder("<")
    for key, place in layout.parts():
        mapped = files.mapped(f"{path}/{key}", layout.chunk_nbytes + CHECKSUM_BYTES)
        if mapped is None:
            return None
        rows = len(range(*place[0].indices(layout.shape[0]))) if place else 1  # the last chunk is filled up
        shape = (rows, *layout.shape[1:]) if layout.shape else ()
        found.append(np.frombuffer(mapped, dtype, math.prod(shape)).reshape(shape))
    return found


def in_runs(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield an array's rows, some MB at a time; of a mapped one no more than these are in memory."""
    step = max(1, _RUN_BYTES // max(1, values.nbytes // max(1, len(values))))
    for start in range(0, len(values), step):
        yield values[start : start + step]
        let_go(values)


def let_go(values: NDArray[Any]) -> None:
    """Let go of the memory of a mapped array, which checking its hash has filled; what is used is read again."""
    owner: Any = values
    while isinstance(owner, np.ndarray):
        owner = owner.base
    mapped = owner.obj if isinstance(owner, memoryview) else None
    if isinstance(mapped, mmap.mmap):  # never of an array in memory, whose contents would be lost
        forget_pages(mapped)


def first_not_finite(bits: NDArray[Any], dtype: str) -> int | None:
    """Return the flat place of the first NaN or infinity among bit patterns of "BF16", "F16" or "F32"; else None."""
    flat = np.ascontiguousarray(bits).reshape(-1)
    limit = {"BF16": 0xFF00, "F16": 0xF800, "F32": 0xFF000000}[dtype]
    for start in range(0, flat.size, _FINITE_STEP):
        # Shifted, the sign is gone, and what is not finite has the greatest exponent.
        shifted = flat[start : start + _FINITE_STEP] << flat.dtype.type(1)
        if int(shifted.max()) >= limit:
            return start + int(np.argmax(shifted >= limit))
    return None
