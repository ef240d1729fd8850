"""How does a file come to be under its name whole, or not at all? What a killed run left is removed by the next."""

import contextlib
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bincompress.errors import StoreError
from bincompress.process.faults import explain
from bincompress.process.systems import replace_held, try_lock
from bincompress.store.files import Bytes, is_local

PIECE = 8 << 20  # bytes
_PARTIAL = re.compile(r"\.pack-[0-9a-f]{32}\.partial")


@contextlib.contextmanager
def new_file(file: str) -> Iterator[Path]:
    """Yield a file to be written, which takes its place when the block ends well, and is removed where it does not."""
    if not is_local(file):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"new{Path(file).suffix}"
            path.touch()
            yield path
            _upload(path, file)
        return
    target = Path(file).resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    partial = target.parent / f".pack-{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "xb") as held:
            try_lock(held)  # so that nobody takes it for a killed run's
            yield partial
            replace_held(partial, target, held.close)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class Pieces:
    """Writes an empty file in pieces that begin at multiples of their size: Linux then has it in large pages.

    Matrices that are multiplied where they lie are read 1.05 to 1.1 x as fast from these (Zen 4, ext4 of Linux 6.18).
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._held = out, bytearray()

    def write(self, content: Bytes) -> None:
        """Write these bytes, in the end."""
        view = memoryview(content).cast("B")
        while len(view):
            taken = view[: PIECE - len(self._held)]
            self._held += taken
            view = view[len(taken) :]
            if len(self._held) == PIECE:
                self.flush()

    def flush(self) -> None:
        """Write what is held, the last piece of all."""
        held = memoryview(self._held)
        while len(held):  # a disk that is nearly full takes a part of them, and then says so
            held = held[self._out.write(held) :]
        self._held = bytearray()


def _upload(path: Path, url: str) -> None:
    from bincompress.store.objects import file_system

    fs, place = file_system(url)
    fs.put_file(str(path), place)
    fs.invalidate_cache()


def _remove_stale(folder: Path) -> None:
    """Remove what killed runs have half written here."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if try_lock(file):
                    path.unlink()


@contextlib.contextmanager
def explained(place: str) -> Iterator[None]:
    """Say in one line what cannot be written, and why."""
    try:
        yield
    except OSError as error:
        cause = error.strerror if error.errno is not None else None
        raise StoreError(f"{place}: cannot be written: {explain(error) or cause or error}") from None
