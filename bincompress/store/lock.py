"""Who writes to a local store? One process: the lock lies in the store's own folder, whatever path leads there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from bincompress.errors import StoreError
from bincompress.process.out_file import refuse_tilde
from bincompress.store.files import LOCK, is_local
from bincompress.store.pack_files import check_no_file


@contextlib.contextmanager
def exclusive(store: str) -> Iterator[None]:
    """Hold a local store for this process alone; object stores are guarded at commit instead.

    The folder is made where it is not there, and removed again where nothing came to be in it. Raises StoreError where
    another process holds the store, or where nothing can be written.
    """
    if not is_local(store):
        yield
        return
    check_no_file(store)
    refuse_tilde(Path(store))
    try:
        folder = Path(store).resolve()
        made = _make(folder)
        lock = FileLock(folder / LOCK, timeout=0)
        _acquire(lock, folder, store)
    except OSError as error:
        raise StoreError(
            f"{store}: cannot be written: {error.strerror or error}; choose a path you can write"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(folder / LOCK)
        lock.release()
        for path in made:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that were not there, the innermost first."""
    made = []
    path = folder
    while not path.exists():
        made.append(path)
        path = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _acquire(lock: FileLock, folder: Path, store: str) -> None:
    try:
        lock.acquire()
    except Timeout:
        if not (folder / LOCK).exists():  # the lock waits for a file that can never be made, too
            raise StoreError(f"{store}: cannot be written: no file can be made in it; choose another path") from None
        raise StoreError(
            f"{store}: another bincompress is writing to it; wait for it to end, or use another store"
        ) from None
