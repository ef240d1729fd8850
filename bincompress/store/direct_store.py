"""A Zarr store in a local folder, for a program that writes one small file after the other."""

import functools
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore, MemoryStore


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends well, and leaves nothing where it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class DirectStore(LocalStore):
    """LocalStore without a hop to a thread and back for every file.

    A tensor is some thirty small reads and writes, and the hops cost more than those: 18 ms a tensor with them, 9
    without (Xeon, zarr 3.1.6). Nothing else runs in the event loop meanwhile, so blocking it costs nothing.
    """

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        """Return a file's bytes as a buffer, or None where there is no such file."""
        if byte_range is not None or prototype is None:
            return await super().get(key, prototype, byte_range)
        try:
            return prototype.buffer.from_bytes((self.root / key).read_bytes())
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    async def set(self, key: str, value: Any) -> None:
        """Write a file: under another name, then renamed."""
        self._check_writable()
        with replacing(self.root / key) as file:
            file.write(value.as_buffer_like())


def write_one_chunk(folder: Path, values: NDArray[Any]) -> int:
    """Write an array of one uncompressed chunk with its checksum, as zarr does, and return the chunk's bytes.

    The bytes are zarr's (a test compares them); it takes 1 ms instead of 4 and no copy of the data, which
    is a quarter of the time of packing a matrix.
    """
    data = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
    with replacing(folder / "c" / "/".join("0" * values.ndim)) as file:
        file.write(data.data)
        file.write(google_crc32c.value(data).to_bytes(4, "little"))
    node = json.loads(_metadata(values.dtype.name, values.ndim))
    node["shape"] = list(values.shape)
    node["chunk_grid"]["configuration"]["chunk_shape"] = list(values.shape)
    with replacing(folder / "zarr.json") as file:
        file.write(json.dumps(node, indent=2).encode())
    return data.nbytes + 4


@functools.cache
def _metadata(dtype: str, ndim: int) -> bytes:
    """Return the metadata that zarr writes for an array of one item with our codecs."""
    store: dict[str, Any] = {}
    ones = (1,) * ndim
    codecs = [Crc32cCodec()]
    zarr.create_array(
        MemoryStore(store), shape=ones, chunks=ones, dtype=dtype, filters=None, compressors=codecs, zarr_format=3
    )
    return bytes(store["zarr.json"].to_bytes())
