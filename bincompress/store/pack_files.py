"""The files of a packed store: read from one local file, mapped, or from one behind a URL, part by part."""

import mmap
import os
import stat
import threading
import weakref
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bincompress.errors import DamagedError, StoreError
from bincompress.process.faults import explain
from bincompress.process.systems import open_to_read, prefer_large_pages, read_at
from bincompress.store.files import Bytes, Files, is_local
from bincompress.store.location import files_at
from bincompress.store.zip_format import Entry, Window, array_of, is_metadata, read_directory

SUFFIX = ".zip"


def store_files(url: str) -> Files:
    """Return the files of a store that is to be read: of a folder, of what lies below a URL, or of one packed file.

    Behind a URL a packed file is known by its name, which ends in ".zip". Raises StoreError where a file is no packed
    store, DamagedError where it is cut short.
    """
    if is_local(url):
        return PackFiles(LocalRanges(url)) if Path(url).is_file() else files_at(url)
    if names_a_pack(url):
        ranges = RemoteRanges.there(url)
        if ranges is not None:
            return PackFiles(ranges)
    return files_at(url)


def names_a_pack(url: str) -> bool:
    """Return whether a path or URL has the name of a packed store."""
    return (url if is_local(url) else urlsplit(url).path).lower().endswith(SUFFIX)


class LocalRanges:
    """A local file of which parts are read or mapped; what is opened stays the same file, whatever is renamed."""

    def __init__(self, path: str | Path) -> None:
        self.url = str(path)
        try:
            self.descriptor = open_to_read(path)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
        weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size

    def read(self, start: int, end: int) -> bytes:
        """See `Ranges`."""
        parts = []
        while start < end:
            part = read_at(self.descriptor, end - start, start)
            if not part:
                raise DamagedError(f"{self.url}: has become shorter while it was read")
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def mapped(self, start: int, size: int) -> memoryview:
        """Map a part of the file, in a mapping of its own, so that its pages can be let go of."""
        if start + size > os.fstat(self.descriptor).st_size:  # else reading would end the process
            raise DamagedError(f"{self.url}: has become shorter while it was read")
        before = start % mmap.ALLOCATIONGRANULARITY
        found = mmap.mmap(self.descriptor, before + size, access=mmap.ACCESS_READ, offset=start - before)
        return memoryview(found)[before:]


class RemoteRanges:
    """A file behind an fsspec URL of which parts are read, each by one request."""

    def __init__(self, url: str, file: Any) -> None:
        self.url = url
        self._file, self._lock = file, threading.Lock()
        weakref.finalize(self, file.close)
        size = getattr(file, "size", None)
        self.size = int(file.seek(0, os.SEEK_END) if size is None else size)

    @staticmethod
    def there(url: str) -> "RemoteRanges | None":
        """Open a URL; None where no file is there."""
        from bincompress.store.objects import file_system

        try:
            fs, path = file_system(url)
            file = fs.open(path, "rb", cache_type="none")
        except FileNotFoundError as error:
            cause = error.__cause__  # of a web server's answer, whatever it was
            if cause is None or getattr(cause, "status", None) == 404:
                return None
            status = getattr(cause, "status", None)
            raise StoreError(f"{url}: {f'the server says {status}' if status else explain(cause) or cause}") from None
        except (IsADirectoryError, PermissionError):
            return None
        except ImportError as error:
            what = "http" if url.startswith("http") else ""
            hint = f"pip install 'bincompress[{what}]'" if what else explain(error) or str(error)
            raise StoreError(f"{url}: cannot be opened: {hint}") from None
        except ValueError as error:
            raise StoreError(f"{url}: cannot be opened: {explain(error) or error}") from None
        if (getattr(file, "details", None) or {}).get("type") == "directory":
            file.close()
            return None
        if not file.seekable():
            file.close()
            raise StoreError(f"{url}: {_NO_PARTS}")
        return RemoteRanges(url, file)

    def read(self, start: int, end: int) -> bytes:
        """See `Ranges`."""
        if start == end:
            return b""
        with self._lock:
            try:
                self._file.seek(start)
                found = bytes(self._file.read(end - start))
            except ValueError as error:  # as fsspec says that the answer was the whole file
                raise StoreError(f"{self.url}: {_NO_PARTS} ({error})") from None
        if len(found) != end - start:
            raise DamagedError(f"{self.url}: {len(found):,} bytes came; {end - start:,} were asked for")
        return found


_NO_PARTS = "the server does not answer requests for parts of a file (HTTP ranges); download the file, and use it here"


@dataclass(frozen=True)
class Region:
    """Neighbouring arrays of a packed store in one mapping: a file may be mapped only so many times."""

    places: dict[str, tuple[int, int]]  # by key: where its bytes begin, and how many there are
    content: memoryview

    def mapped(self, key: str, size: int) -> memoryview:
        """Return the bytes of a key, of which there are so many; raises ValueError where that is not so."""
        if key not in self.places:
            raise ValueError(f"its file {key} is missing")
        begin, found = self.places[key]
        if found != size:
            raise ValueError(f"{found:,} bytes; expected {size:,}")
        return self.content[begin : begin + size]


class PackFiles:
    """The files of a packed store, which is only read. What is read is checked, what is mapped is not."""

    near = True  # where a key's size and metadata are known without a request

    def __init__(self, source: LocalRanges | RemoteRanges) -> None:
        self.url = source.url
        self._source = source
        self._window = Window(source)
        self.entries = read_directory(self._window, whole=isinstance(source, RemoteRanges))
        self._unread = set(self.entries)
        self._arrays: dict[str, tuple[int, bytes]] = {}  # those of several chunks that are being read, and where

    @property
    def is_whole_bucket(self) -> bool:
        """See `Files`."""
        return False

    @cached_property
    def _spans(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = {}
        for entry in self.entries.values():
            if not is_metadata(entry.name):
                found.setdefault(array_of(entry.name), []).append(entry)
        return found

    def read(self, key: str, expected: int = 0) -> bytes | None:
        """See `Files`; raises DamagedError where a key's bytes are not those under its checksum."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        content = self._bytes_of(entry)
        before = entry.start - entry.offset
        data = content[before:]
        if content[:before] != entry.header or zlib.crc32(data) != entry.crc:
            raise DamagedError(f"{self.url}: {key}: its bytes are not those that were written")
        self._unread.discard(key)
        return data

    def _bytes_of(self, entry: Entry) -> bytes:
        """Return an entry with its header; of an array of several chunks behind a URL all are asked for at once."""
        chunks = [] if isinstance(self._source, LocalRanges) else self._spans.get(array_of(entry.name), [])
        if len(chunks) < 2:
            return self._window.read(entry.offset, entry.end)
        array = array_of(entry.name)
        if array not in self._arrays:
            self._arrays[array] = chunks[0].offset, self._source.read(chunks[0].offset, chunks[-1].end)
        begin, content = self._arrays[array]
        if entry is chunks[-1]:
            del self._arrays[array]
        return content[entry.offset - begin : entry.end - begin]

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `Files`."""
        return [self.read(key) for key in keys]

    def mapped(self, key: str, size: int) -> Any:
        """See `Files`."""
        entry = self.entries.get(key)
        if entry is None:
            raise ValueError(f"its file {key} is missing")
        if entry.size != size:
            raise ValueError(f"{entry.size:,} bytes; expected {size:,}")
        return self._source.mapped(entry.start, size) if isinstance(self._source, LocalRanges) else None

    def region(self, prefix: str) -> "Region | None":
        """Map all arrays below a prefix as one; None where the file is not on this machine, or has none there."""
        found = [entry for name, entry in self.entries.items() if name.startswith(prefix) and not is_metadata(name)]
        if not found or not isinstance(self._source, LocalRanges):
            return None
        begin = found[0].start
        content = self._source.mapped(begin, found[-1].end - begin)
        prefer_large_pages(content.obj)
        return Region({entry.name: (entry.start - begin, entry.size) for entry in found}, content)

    def size(self, key: str) -> int | None:
        """See `Files`."""
        entry = self.entries.get(key)
        return None if entry is None else entry.size

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See `Files`."""
        start = f"{prefix.strip('/')}/" if prefix else ""
        return {name: entry.size for name, entry in self.entries.items() if name.startswith(start)}

    def nothing_read(self) -> None:
        """Forget what has been read: from now on `unread_problem` reads all that nobody else does."""
        self._unread = set(self.entries)

    def unread_problem(self) -> str:
        """Return what is wrong with the entries that nobody has read so far; empty where all is well."""
        for key in sorted(self._unread):
            try:
                self.read(key)
            except DamagedError as error:
                return str(error)
        return ""

    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """Refuse: raises StoreError."""
        raise StoreError(f"{self.url}: {READ_ONLY}")

    def delete(self, keys: Iterable[str]) -> None:
        """Refuse: raises StoreError."""
        raise StoreError(f"{self.url}: {READ_ONLY}")


READ_ONLY = "is a packed store, which is only read; `bincompress unpack` makes a folder of it"


def check_no_file(url: str) -> None:
    """Raise StoreError where a store is to be written into a folder, and a file is there."""
    try:
        mode = os.stat(url).st_mode  # noqa: PTH116 - a URL may be given, too
    except (OSError, ValueError):
        return
    if not stat.S_ISDIR(mode):
        what = "a packed store" if names_a_pack(url) else "a file"
        raise StoreError(f"{url}: is {what}; a store is written into a folder: choose another place")
