"""A store as the zarr library sees it: for statistics, and for whoever wants a store's arrays by other means.

zarr takes 0.3 s to import, and what a model needs of it is done without (`arrays`).
"""

from pathlib import Path
from typing import Any

import zarr
import zarr.storage
from zarr.storage import LocalStore

from bincompress.store.files import is_local, replacing
from bincompress.store.objects import options_of


class DirectStore(LocalStore):
    """LocalStore without a hop to a thread and back for every file.

    An input's statistics are some thirty small reads and writes, and the hops cost more than those. Nothing else runs
    in the event loop meanwhile, so blocking it costs nothing.
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

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        """Write a file that is not there yet; LocalStore's own partial files have names that are not the format's."""
        if not (self.root / key).exists():
            await self.set(key, value)


def zarr_store(url: str) -> Any:
    """Return zarr's view of a path or fsspec URL."""
    # zarr takes its root's name out of the paths of files wherever it stands in them, and "s/" stands in "assets/".
    if is_local(url):
        return DirectStore(Path(url).resolve())
    return zarr.storage.FsspecStore.from_url(url, storage_options=options_of(url))


def open_root(url: str, packed: bool = False) -> zarr.Group:
    """Open the root group of a store; raises what zarr raises where there is none. packed: it is one local file."""
    if packed:
        return zarr.open_group(zarr.storage.ZipStore(url, mode="r"), mode="r", zarr_format=3)
    return zarr.open_group(zarr_store(url), mode="r+", zarr_format=3)
