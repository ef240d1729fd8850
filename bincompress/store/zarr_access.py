"""What a store asks of the zarr library: writing, object stores, compressed arrays.

zarr takes 0.3 s to import, so a store imports this module when it first needs one of these.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.api.asynchronous
import zarr.storage
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.sync import sync

from bincompress.store.direct_store import DirectStore, write_one_chunk

_CHUNK_LIMIT = 256 << 20  # bytes of one chunk file: a larger array is cut by rows, so that no writer holds it twice
_ZSTD_LEVEL = 9


def zarr_store(url: str) -> Any:
    """Return zarr's view of a path or fsspec URL."""
    # zarr takes its root's name out of the paths of files wherever it stands in them, and "s/" stands in "assets/".
    return zarr.storage.FsspecStore.from_url(url) if "://" in url else DirectStore(Path(url).resolve())


def open_root(url: str) -> zarr.Group:
    """Open the root group of a store; raises what zarr raises where there is none."""
    return zarr.open_group(zarr_store(url), mode="r+", zarr_format=3)


class ZarrAccess:
    """A store's nodes by their paths, through zarr."""

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def root(self) -> zarr.Group:
        """The root group, opened when it is first asked for."""
        return open_root(self._url)

    def create_root(self, attributes: dict[str, Any], overwrite: bool) -> None:
        """Create the root group."""
        store = zarr_store(self._url)
        self.root = zarr.create_group(store, zarr_format=3, overwrite=overwrite, attributes=attributes)

    def read(self, path: str) -> bytes | None:
        """Return the bytes of one key, None where it is not there."""
        found = sync(self.root.store.get(path, default_buffer_prototype()))
        return None if found is None else bytes(found.to_bytes())

    def read_array(self, path: str) -> NDArray[Any]:
        """Return a whole array."""
        return np.asarray(self.root[path][...])  # type: ignore[index]

    def array_names(self, path: str) -> list[str]:
        """Return the names of the arrays in a group."""
        return [name for name, _ in zarr.open_group(self.root.store, path=path, mode="r", zarr_format=3).arrays()]

    def remove(self, path: str) -> None:
        """Remove a node and everything below it."""
        sync(self.root.store.delete_dir(path))

    def total_bytes(self) -> int:
        """Return the bytes of everything in the store."""
        return int(sync(self.root.store.getsize_prefix("")))

    def put_group(self, path: str, attributes: Mapping[str, Any]) -> None:
        """Write a group's metadata, whatever was there before, without looking: a third of what creating one costs."""

        async def put() -> None:
            metadata = GroupMetadata(attributes=dict(attributes), zarr_format=3)
            for key, content in metadata.to_buffer_dict(default_buffer_prototype()).items():
                await self.root.store.set(f"{path}/{key}", content)

        sync(put())

    def put_attributes(self, path: str, attributes: dict[str, Any]) -> None:
        """Write the attributes of the root ("") or of a node that is there."""
        node = self.root[path] if path else self.root
        node.attrs.put(attributes)

    def write_arrays(self, arrays: Mapping[str, NDArray[Any]], archive: bool) -> int:
        """Write arrays by their paths, one after the other; returns the bytes of their chunks."""
        stored = 0
        others = {}
        store = self.root.store
        folder = store.root if isinstance(store, DirectStore) and not archive else None
        for path, values in arrays.items():
            if folder is not None and values.ndim and 0 < values.nbytes <= _CHUNK_LIMIT:
                stored += write_one_chunk(folder / path, values)
            else:
                others[path] = values
        return stored + (sync(_write_with_zarr(store, others, archive)) if others else 0)


async def _write_with_zarr(store: Any, arrays: Mapping[str, NDArray[Any]], archive: bool) -> int:
    """Write arrays of several chunks, with compression, or into a store that is no local folder."""
    stored = 0
    for path, values in arrays.items():
        axis = 1 if values.ndim == 3 else 0  # the rows
        pieces = max(1, -(-values.nbytes // _CHUNK_LIMIT))
        step = max(1, -(-values.shape[axis] // pieces)) if values.ndim else 1
        array = await zarr.api.asynchronous.create_array(
            store,
            name=path,
            shape=values.shape,
            dtype=values.dtype,
            chunks=tuple(step if i == axis else max(1, size) for i, size in enumerate(values.shape)),
            filters=None,
            compressors=[*([ZstdCodec(level=_ZSTD_LEVEL)] if archive else []), Crc32cCodec()],
            # Without this an all-zero plane would have no file, and could not be memory-mapped.
            config={"write_empty_chunks": True},
            zarr_format=3,
        )
        for start in range(0, values.shape[axis] if values.ndim else 1, step):
            part = (slice(None),) * axis + (slice(start, start + step),) if values.ndim else ()
            if values[part].size:
                await array.setitem(part, values[part])
        stored += await store.getsize_prefix(f"{path}/c")
    return stored
