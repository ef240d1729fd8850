"""Where do the bytes of a store lie? A local folder, or the objects below an fsspec URL: keys, their bytes and sizes.

Both ask for as little as they can: an object store answers a request in a tenth of a second.
"""

import mmap
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

Bytes = bytes | memoryview

# In a folder of a fresh disk, or the lock of a run: nobody's data.
LOCK = ".bincompress.lock"
_NOBODYS = (LOCK, "lost+found/")


class Files(Protocol):
    """Bytes by their keys, names with "/" between them."""

    url: str
    near: bool  # whether asking for one key costs next to nothing

    @property
    def is_whole_bucket(self) -> bool:
        """Whether the place is all of a bucket or file system."""

    def read(self, key: str, expected: int = 0) -> bytes | None:
        """Return the bytes of a key, None where it is not there; expected: how many there are, where that is known."""

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of several keys, at once where that saves time."""

    def mapped(self, key: str, size: int) -> Any:
        """Map a key of so many bytes, None where it is not on this machine; raises ValueError where it has others."""

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

    near = True

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self.root = Path(url)

    @property
    def is_whole_bucket(self) -> bool:
        """See `Files`."""
        return False

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

    def mapped(self, key: str, size: int) -> Any:
        """See `Files`."""
        # Without Path and np.memmap, which take 0.3 ms an array together.
        with open(f"{self.url}/{key}", "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise ValueError(f"{found:,} bytes; expected {size:,}")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)

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


def nobodys(key: str) -> bool:
    """Return whether a key stands for nothing that anybody put there."""
    return key in _NOBODYS
