"""Where do the bytes of a store lie? A local folder, or the objects below an fsspec URL: keys, their bytes and sizes.

Both ask for as little as they can: an object store answers a request in a tenth of a second.
"""

import inspect
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from bincompress.errors import StoreError

Bytes = bytes | memoryview

# Of object stores whose first name is a bucket (or a container), which holds more than one program's objects.
_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "cos", "obs", "tos", "r2", "b2", "oci")
# In a folder of a fresh disk, or the lock of a run: nobody's data.
LOCK = ".bincompress.lock"
_IN_PARTS = 32 << 20  # bytes of an object that is quicker read in parts at the same time
_NOBODYS = (LOCK, "lost+found/")


class Files(Protocol):
    """Bytes by their keys, names with "/" between them."""

    url: str

    def read(self, key: str, expected: int = 0) -> bytes | None:
        """Return the bytes of a key, None where it is not there; expected: how many there are, where that is known."""

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of several keys, at once where that saves time."""

    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """Write a key, whole or not at all."""

    def size(self, key: str) -> int | None:
        """Return the bytes of a key, None where it is not there."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the size of everything below a prefix, by its key; a link, and an empty folder, are keys with "/"."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove keys, and the folders that become empty; of a link, the link. What is not there is no fault."""


def is_local(url: str) -> bool:
    """Return whether a store's name is a path of this machine."""
    return "://" not in url


def options_of(url: str) -> dict[str, Any]:
    """Return what fsspec is to be told of a URL: in a folder named by one, folders are made as they are needed."""
    return {"auto_mkdir": True} if url.split("://")[0] in ("file", "local") else {}


def files_at(url: str) -> Files:
    """Return the files of a path or an fsspec URL; nothing is looked at yet."""
    return LocalFiles(url) if is_local(url) else ObjectFiles(url)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends well, and leaves nothing where it does not."""
    partial = path.parent / f".{uuid.uuid4().hex}.partial"
    try:
        with _opened(partial) as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "wb")
    except FileNotFoundError:  # seldom: a folder is looked at only then
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "wb")


class LocalFiles:
    """The files of a folder."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self.root = Path(url)

    def read(self, key: str, expected: int = 0) -> bytes | None:
        """See `Files`."""
        try:
            # Without Path: loading a model reads hundreds of small files.
            with open(f"{self.url}/{key}", "rb", buffering=0) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `Files`."""
        return [self.read(key) for key in keys]

    def write(self, key: str, parts: Sequence[Bytes]) -> None:
        """See `Files`."""
        with replacing(self.root / key) as file:
            for part in parts:
                file.write(part)

    def size(self, key: str) -> int | None:
        """See `Files`."""
        try:
            found = os.stat(f"{self.url}/{key}")  # noqa: PTH116 - without Path: loading asks for many
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See `Files`; links are not followed."""
        found: dict[str, int] = {}

        def walk(folder: str, key: str) -> bool:
            empty = True
            with os.scandir(folder) as entries:
                for entry in entries:
                    empty = False
                    below = f"{key}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        if not walk(entry.path, f"{below}/"):
                            found[f"{below}/"] = 0
                    elif entry.is_symlink():
                        found[f"{below}/" if entry.is_dir() else below] = _size_of(entry.path)
                    else:
                        found[below] = entry.stat(follow_symlinks=False).st_size
            return not empty

        start = prefix.strip("/")
        folder = f"{self.url}/{start}" if start else self.url
        if Path(folder).is_dir():
            walk(folder, f"{start}/" if start else "")
        return found

    def delete(self, keys: Iterable[str]) -> None:
        """See `Files`."""
        folders: set[Path] = set()
        for key in keys:
            path = self.root / key
            try:
                if path.is_symlink() or not key.endswith("/"):
                    path.unlink()
                else:
                    path.rmdir()
            except (FileNotFoundError, NotADirectoryError):
                continue
            folders.add(path.parent)
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            while folder != self.root and self.root in folder.parents:
                try:
                    folder.rmdir()
                except OSError:  # not empty, or gone
                    break
                folder = folder.parent


def _size_of(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # a link to nothing
        return 0


def _parameters(fs: Any, method: str) -> set[str]:
    return set(inspect.signature(getattr(fs, f"_{method}", getattr(fs, method))).parameters)


class ObjectFiles:
    """The objects below an fsspec URL."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._fs, path = fsspec.core.url_to_fs(url, **options_of(url))
        except (ImportError, ValueError) as error:
            raise StoreError(f"{url}: cannot be opened: {error}") from None
        self.path = str(path).rstrip("/")
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


def nobodys(key: str) -> bool:
    """Return whether a key stands for nothing that anybody put there."""
    return key in _NOBODYS
