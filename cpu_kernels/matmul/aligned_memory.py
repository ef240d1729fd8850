"""Memory that begins with a cache line; for many matrices that stay, in arenas of large pages.

A fresh page costs a fault whatever its size: 1 GB takes 0.5 s in pages of 4 KB and 0.3 s in pages of 2 MB, and giving
it back 80 ms and 5 ms (Xeon). An array by itself would have such pages only in its middle.
"""

import contextlib
import mmap
import threading
import weakref
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ARENA = 128 << 20  # bytes; what is not used yet takes no memory, and a small model never fills it
ALIGNMENT = 64  # a cache line


@dataclass
class _Arena:
    """An arena, which goes with the last array in it, and how many bytes of it are used."""

    memory: "weakref.ref[NDArray[np.uint8]]"
    used: int = 0


_lock = threading.Lock()
_last: _Arena | None = None  # one object, so that an interrupt cannot set one part of it and not the other


def aligned(size: int, zero: bool = False) -> NDArray[np.uint8]:
    """Return uint8 (size,) that begins with a cache line, in memory of its own."""
    found = np.zeros(size + ALIGNMENT - 1, np.uint8) if zero else np.empty(size + ALIGNMENT - 1, np.uint8)
    start = -found.ctypes.data % ALIGNMENT
    return found[start : start + size]


def allocate(size: int, own_pages: bool = False) -> NDArray[np.uint8]:
    """Return zeros, uint8 (size,), that begin with a cache line: the next part of an arena, or pages of their own."""
    global _last
    whole = -(-size // ALIGNMENT) * ALIGNMENT
    if own_pages or whole > _ARENA // 2:
        return _fresh(whole)[:size]
    with _lock:
        last = _last
        memory = None if last is None else last.memory()
        if last is None or memory is None or last.used + whole > memory.size:
            memory = _fresh(_ARENA)
            last = _last = _Arena(weakref.ref(memory))
        # Counted before it is handed out: an interrupt in between wastes it, and nobody gets it twice.
        start, last.used = last.used, last.used + whole
        return memory[start : start + size]


def _fresh(size: int) -> NDArray[np.uint8]:
    if hasattr(mmap, "MAP_PRIVATE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:  # Windows, where no such mapping is shared with processes that are started
        pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux; a hint, without which the pages are small
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)
