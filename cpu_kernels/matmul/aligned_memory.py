"""Memory that begins with a cache line; for many matrices that stay, in arenas of large pages.

A fresh page costs a fault whatever its size: 1 GB takes 0.5 s in pages of 4 KB and 0.3 s in pages of 2 MB, and giving
it back 80 ms and 5 ms (Xeon). An array by itself would have such pages only in its middle.
"""

import contextlib
import mmap
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

_ARENA = 128 << 20  # bytes; what is not used yet takes no memory, and a small model never fills it
_LINE = 64

_lock = threading.Lock()
_arena: "weakref.ref[NDArray[np.uint8]] | None" = None  # the last one: it goes with the last array in it
_used = 0  # bytes of it


def aligned(size: int, zero: bool = False) -> NDArray[np.uint8]:
    """Return uint8 (size,) that begins with a cache line, in memory of its own."""
    found = np.zeros(size + _LINE - 1, np.uint8) if zero else np.empty(size + _LINE - 1, np.uint8)
    start = -found.ctypes.data % _LINE
    return found[start : start + size]


def allocate(size: int, own_pages: bool = False) -> NDArray[np.uint8]:
    """Return zeros, uint8 (size,), that begin with a cache line: the next part of an arena, or pages of their own."""
    global _arena, _used
    whole = -(-size // _LINE) * _LINE
    if own_pages or whole > _ARENA // 2:
        return _fresh(whole)[:size]
    with _lock:
        arena = _arena() if _arena else None
        if arena is None or _used + whole > arena.size:
            arena, _used = _fresh(_ARENA), 0
            _arena = weakref.ref(arena)
        taken = arena[_used : _used + size]
        _used += whole
    return taken


def _fresh(size: int) -> NDArray[np.uint8]:
    if hasattr(mmap, "MAP_PRIVATE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:  # Windows, where no such mapping is shared with processes that are started
        pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux; a hint, without which the pages are small
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)
