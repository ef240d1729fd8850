"""The objects below an fsspec URL as the files of a store, with as few requests as it can be done with."""

import contextlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from bincompress.errors import StoreError
from bincompress.process.faults import explain
from bincompress.store.files import Bytes

# Of object stores whose first name is a bucket (or a container), which holds more than one program's objects.
_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "cos", "obs", "tos", "r2", "b2", "oci")
_IN_PARTS = 32 << 20  # bytes of an object that is quicker read in parts at the same time
ANSWER_SECONDS = 30.0  # until the first answer of a bucket or a web server
# Buckets and servers that have answered, kept on the file system: one of another endpoint may be equal to it.
_ANSWERED = "_bincompress_answered"


def options_of(url: str) -> dict[str, Any]:
    """Return what fsspec is to be told of a URL: in a folder named by one, folders are made as they are needed."""
    return {"auto_mkdir": True} if url.split("://")[0] in ("file", "local") else {}


def _parameters(fs: Any, method: str) -> set[str]:
    return set(inspect.signature(getattr(fs, f"_{method}", getattr(fs, method))).parameters)


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path there.

    Raises StoreError where a server does not answer in time; what it answers is left to whoever reads or writes.
    ImportError and ValueError come from fsspec.
    """
    import fsspec

    fs, path = fsspec.core.url_to_fs(url, **options_of(url))
    place = urlsplit(url).netloc  # a bucket, or a web server
    answered: set[str] = fs.__dict__.setdefault(_ANSWERED, set())
    if getattr(fs, "async_impl", False) and place not in answered:
        _expect_answer(fs, path, url)
        answered.add(place)
    return fs, str(path)


def _expect_answer(fs: Any, path: str, url: str) -> None:
    """Ask for anything, as clients try again for many minutes where nothing comes."""
    from fsspec.asyn import sync
    from fsspec.exceptions import FSTimeoutError

    late = False
    with contextlib.suppress(Exception):  # no credentials, say, which the call that matters tells of
        try:
            sync(fs.loop, fs._info, path, timeout=ANSWER_SECONDS)
        except FSTimeoutError:
            late = True
    if late:
        raise StoreError(
            f"{url}: no answer within {ANSWER_SECONDS:g} s; check the network and the endpoint (S3: AWS_ENDPOINT_URL)"
        )


class ObjectFiles:
    """The objects below an fsspec URL."""

    near = False

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, path = file_system(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{url}: cannot be opened: {explain(error) or error}") from None
        self.path = path.rstrip("/")
        if {".", ".."} & set(self.path.split("/")):
            raise StoreError(f"{url}: object stores take . and .. for names of their own; write the place without them")
        # s3fs asks for an object's size before it reads it, to read a large one in parts at the same time.
        reads_in_parts = "max_concurrency" in _parameters(self._fs, "cat_file")
        self._at_once: dict[str, Any] = {"max_concurrency": 1} if reads_in_parts else {}

    @property
    def is_whole_bucket(self) -> bool:
        """Whether the URL names no place within its bucket or file system."""
        protocols = self._fs.protocol
        names = (protocols,) if isinstance(protocols, str) else tuple(protocols)
        depth = len([part for part in self.path.split("/") if part])
        return depth < (2 if set(names) & set(_BUCKETS) else 1)

    def _at(self, key: str) -> str:
        return f"{self.path}/{key}".rstrip("/")

    def read(self, key: str, expected: int = 0) -> bytes | None:
        """See `Files`."""
        try:
            return bytes(self._fs.cat_file(self._at(key), **({} if expected > _IN_PARTS else self._at_once)))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `Files`."""
        found: list[bytes | None] = []
        if not self._fs.async_impl or any(set(key) & set("*?[") for key in keys):  # which `cat` takes for a pattern
            return [self.read(key) for key in keys]
        if len(keys) == 1:
            return [self.read(keys[0])]
        paths = [self._at(key) for key in keys]
        results: dict[str, Any] = self._fs.cat(paths, on_error="return", **self._at_once) if keys else {}
        for key in keys:
            result = results.get(self._at(key))
            if isinstance(result, Exception) and not isinstance(result, FileNotFoundError):
                raise result
            found.append(bytes(result) if isinstance(result, bytes | bytearray) else None)
        return found

    def mapped(self, key: str, size: int) -> Any:
        """See `Files`."""
        return None

    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """See `Files`."""
        self._fs.pipe_file(self._at(key), bytes(parts[0]) if len(parts) == 1 else b"".join(parts))

    def size(self, key: str) -> int | None:
        """See `Files`."""
        try:
            self._fs.invalidate_cache(self._at(key))
            found = self._fs.info(self._at(key))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See `Files`."""
        start = self._at(prefix)
        self._fs.invalidate_cache(start)  # it would answer from what it has seen before
        folder, _, name = start.rpartition("/")
        # One listing by a prefix, where the file system has that: else it also looks for an object of this name.
        known = folder and "prefix" in _parameters(self._fs, "find")
        try:
            found: dict[str, Any] = (
                self._fs.find(folder, detail=True, prefix=f"{name}/") if known else self._fs.find(start, detail=True)
            )
        except FileNotFoundError:
            return {}
        cut = len(self.path) + 1
        # A key that ends in "/" is what consoles make of an empty folder.
        return {
            path[cut:]: int(entry["size"] or 0)
            for path, entry in found.items()
            if path.startswith(f"{self.path}/") and not path.endswith("/")
        }

    def delete(self, keys: Iterable[str]) -> None:
        """See `Files`."""
        paths = [self._at(key) for key in keys]
        plain = [path for path in paths if not set(path) & set("*?[")]
        if plain and self._fs.async_impl:
            self._fs.rm(plain)  # many to a request, where the store can
        for path in paths:
            if path not in plain or not self._fs.async_impl:  # which `rm` takes for a pattern
                try:
                    self._fs.rm_file(path)
                except FileNotFoundError:
                    continue
