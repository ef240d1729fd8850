"""What Linux, macOS and Windows do not have in common: locks on open files, reading at a place, replacing open
files, addresses of one process alone.

All of it is in this file, as far as psutil and filelock do not hide it (and cpu_kernels, which knows NumPy and Numba
only, has what it needs in kernel_cache.py and aligned_memory.py).
"""

import contextlib
import ctypes
import mmap
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Windows locks bytes, and nobody else can read them meanwhile: one that no file of ours comes to.
_LOCKED_BYTE = 1 << 43
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{3}p) ")
_LIBRARY = re.compile(r" /.*\.so[.0-9]*$")
_reading = threading.Lock()


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file for as long as it is open; returns whether it was free (and the file system has locks)."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            _lock_byte(file.fileno())
    except OSError:
        return False
    return True


def _lock_byte(descriptor: int) -> None:
    import msvcrt

    library: Any = msvcrt  # mypy knows its functions on Windows alone
    before = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        library.locking(descriptor, library.LK_NBLCK, 1)
    finally:
        os.lseek(descriptor, before, os.SEEK_SET)


def replace_held(partial: Path, target: Path, close: Callable[[], None]) -> None:
    """Give a file another's name; `close` closes files that are held open for their lock.

    They are held until the name is taken, except on Windows, which renames no file that is open, and replaces none.
    """
    try:
        os.replace(partial, target)
    except PermissionError:
        close()
        os.replace(partial, target)


def open_to_read(path: str | Path) -> int:
    """Return a descriptor of a file, for `read_at` and mmap; raises OSError."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))


def read_at(descriptor: int, size: int, start: int) -> bytes:
    """Return at most `size` bytes of a file from `start` on; several threads may read one descriptor."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, start)
    with _reading:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, size)


def bind_alone(made: socket.socket, address: Any) -> None:
    """Bind a socket to an address that no other process has; raises OSError where one has it.

    Windows lets two processes have one where SO_REUSEADDR is set, which elsewhere means an address whose connections
    have just ended.
    """
    name = "SO_EXCLUSIVEADDRUSE" if hasattr(socket, "SO_EXCLUSIVEADDRUSE") else "SO_REUSEADDR"
    made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
    made.bind(address)


def own_temporary_folder() -> Path:
    """Return a place for this user's files that are not to be in the home folder, of which other nodes may have one."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""  # Windows has one such folder for each user
    return Path(tempfile.gettempdir()) / f"bincompress{user}"


def forget_pages(mapped: Any) -> None:
    """Let the system take back the memory of a mapped file, whose contents are read again when they are used."""
    import mmap

    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_DONTNEED)


def forget_library_pages() -> None:
    """Let the system take back what this process has read of libraries, which is read again when it is used.

    Importing LLVM and the like reads 60 MB of them, of which a model that runs needs 3. Linux; nothing elsewhere.
    Only mappings that cannot be written to and hold no page of this process's own: nothing else could be read again.
    """
    import mmap

    with contextlib.suppress(OSError, AttributeError, TypeError, ValueError):
        forget = ctypes.CDLL(None).madvise
        for begin, end in _read_only_libraries(Path("/proc/self/smaps").read_text("utf-8", "replace")):
            forget(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _read_only_libraries(smaps: str) -> list[tuple[int, int]]:
    """Return where libraries are mapped privately, not writable and without a page of the process's own."""
    found: list[tuple[int, int]] = []
    mapping: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if head := _MAPPING.match(line):
            mapping = (int(head[1], 16), int(head[2], 16)) if _LIBRARY.search(line) and "w" not in head[3] else None
        elif mapping is not None and line.startswith("Anonymous:"):
            if line.split()[1] == "0":
                found.append(mapping)
            mapping = None
    return found


def prefer_large_pages(mapped: Any) -> None:
    """Let the system read a mapped file into large pages, where it can; what it has read already stays as it is.

    Products of matrices in small pages take 1.05 to 1.1 x the time (Zen 4, ext4 of Linux 6.18).
    """
    import mmap

    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)


def give_back_freed_memory() -> None:
    """Give the system the memory that this process has freed and its allocator keeps; glibc alone keeps much."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        ctypes.CDLL(None).malloc_trim(0)


def private_pages(size: int) -> mmap.mmap | None:
    """Return so many bytes of zeros in pages of their own, or None where a system has no such call.

    A page takes memory when it is first written to, and all go back when nobody refers to them any more. Raises
    MemoryError.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return None
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{size:,} bytes: {error}") from None
