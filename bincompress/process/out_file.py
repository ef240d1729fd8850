"""Can a file or folder be made where a command is to write it at its end? Asked before the work."""

import os
import tempfile
from pathlib import Path

from bincompress.errors import BincompressError
from bincompress.process.faults import explain

_PROBE = bytes(4096)  # as much as a disk gives out at once


def refuse_unwritable(path: Path, what: str, *, makes_folders: bool = False, appends: bool = False) -> None:
    """Raise BincompressError where no file can be written at `path`, and change nothing there.

    what: option or argument, for the message. makes_folders: the command makes the folders above. appends: lines are
    added to a file that stays in its place; a disk that is full does not count then, as the command goes on without.
    """
    refuse_tilde(path)
    try:
        if path.is_dir():
            raise BincompressError(f"{what} {path}: is a folder; give the name of a file")
        if path.exists():
            if path.is_file():
                os.close(os.open(path, os.O_WRONLY))
            if appends or not path.is_file():  # such as a pipe: what it takes shows when it is written to
                return
        _probe(_folder(path, what, makes_folders), b"" if appends else _PROBE)
    except OSError as error:
        raise BincompressError(f"{what} {path}: cannot be written: {explain(_nameless(error))}") from None


def refuse_unwritable_folder(path: Path, what: str) -> None:
    """Raise BincompressError where nothing can be written in a folder, or it cannot be made; change nothing there."""
    refuse_tilde(path)
    try:
        if os.path.lexists(path) and not path.is_dir():
            raise BincompressError(f"{what} {path}: is no folder; give another path")
        _probe(path if path.is_dir() else _folder(path, what, makes_folders=True), _PROBE)
    except OSError as error:
        raise BincompressError(f"{what} {path}: cannot be written: {explain(_nameless(error))}") from None


def refuse_tilde(path: Path) -> None:
    """Raise BincompressError for ~/name, which no shell has read, as in a manifest: a folder ~ would be made."""
    first = path.parts[0] if path.parts else ""
    if first.startswith("~") and len(path.parts) > 1 and not Path(first).exists():
        raise BincompressError(
            f"{path}: ~ is a home folder only where a shell reads it, without quotes; write the path"
        )


def _folder(path: Path, what: str, makes_folders: bool) -> Path:
    """Return the folder in which the file will be made, or the one in which its folders will be."""
    folder = Path(os.path.realpath(path)).parent  # a link stays one
    while makes_folders and not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        fault = "is no folder" if os.path.lexists(folder) else "there is no such folder"
        raise BincompressError(f"{what} {path}: {folder}: {fault}; make it first, or give another path")
    return folder


def _probe(folder: Path, content: bytes) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:  # on Linux without a name, so that a kill leaves nothing
        file.write(content)
        file.flush()


def _nameless(error: OSError) -> OSError:
    return OSError(error.errno, error.strerror)
