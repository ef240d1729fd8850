"""What are the bytes of a packed store? A zip file in one form: entries as they are, in one order, chunks aligned.

Python's zipfile is not used: the bytes would be those of its version. As there is one form only, a reader writes the
directory anew and compares it: where entries lie follows from their names and sizes, so none can overlap, or leave the
file. docs/format.md specifies it; tests read what is written with zipfile and with zarr.
"""

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from bincompress.errors import DamagedError, StoreError
from bincompress.sources.json_files import POINTER, begins_a_pointer
from bincompress.store.layout import LAID_OUT, MODEL

ALIGNMENT = 64  # bytes, of a chunk's first: a cache line, and a multiple of every item's size
PAGE = 4096  # the same of what kernels read where it lies: no page is also another entry's
LARGEST_ENTRY = 0xFFFFFFFE  # bytes, beyond which its own header would be another; chunks are below 256 MB
LIMIT = 0xFFFFFFFF  # of an offset in the directory; from there the eight bytes of zip64
MOST_DIRECTORY = 256 << 20  # bytes
_TAIL = 128 << 10  # bytes that are read first: they hold the end and, of a small store, the directory
_HELD = 64 << 20  # bytes of directory and metadata that are read in one go
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_TIME, _DATE = 0, 0x21  # 1980-01-01, the first day of zip
_MODE = 0o100644 << 16  # of a file, readable
_LINK, _KIND = 0o120000, 0o170000
_PADDING_ID = 0xD935  # of the extra field with which zipalign fills up
_COMMENT = b"bincompress pack 1 "
_COMMENT_LAID_OUT = b"bincompress pack 2 "  # which programs that know version 1 alone refuse
_OWNED = replace(MODEL, groups=(*MODEL.groups, LAID_OUT))
_CHUNK = re.compile(r"(.*?)/c((?:/\d+)*)", re.ASCII)
_MOST_DIGITS = 18  # of a chunk's place, below 2^63; Python refuses to read thousands


class Ranges(Protocol):
    """A file of which parts can be read."""

    url: str
    size: int

    def read(self, start: int, end: int) -> bytes:
        """Return exactly these bytes; raises DamagedError where there are fewer."""


@dataclass(frozen=True)
class Entry:
    """One file in a pack."""

    name: str
    offset: int  # of its header
    size: int
    crc: int

    @property
    def header(self) -> bytes:
        """The bytes before its data."""
        name, extra = self.name.encode(), padding(self.name, self.offset)
        return (
            _LOCAL.pack(b"PK\3\4", 20, 0, 0, _TIME, _DATE, self.crc, self.size, self.size, len(name), len(extra))
            + name
            + extra
        )

    @property
    def start(self) -> int:
        """Where its data begins in the file."""
        return self.offset + _LOCAL.size + len(self.name) + len(padding(self.name, self.offset))

    @property
    def end(self) -> int:
        """Where its data ends in the file."""
        return self.start + self.size


def is_metadata(name: str) -> bool:
    """Return whether an entry is a node's metadata, and no chunk."""
    return name.endswith("zarr.json")


def is_laid_out(name: str) -> bool:
    """Return whether an entry is of a laid-out matrix, which is no part of the store itself."""
    return name.startswith(f"{LAID_OUT}/")


def padding(name: str, offset: int) -> bytes:
    """Return the extra field after which a chunk's data begins at a multiple of 64 or 4,096; metadata has none."""
    if is_metadata(name):
        return b""
    bare = offset + _LOCAL.size + len(name) + 6
    alignment = PAGE if is_laid_out(name) else ALIGNMENT
    fill = -bare % alignment
    return struct.pack("<3H", _PADDING_ID, 2 + fill, alignment) + bytes(fill)


def array_of(name: str) -> str:
    """Return the array that a chunk belongs to."""
    found = _CHUNK.fullmatch(name)
    return found[1] if found else name


def in_order(names: Iterable[str]) -> list[str]:
    """Return keys in the order in which they lie in a pack: arrays by name, their chunks by place, then metadata.

    Metadata is together at the end, before the directory, so that one request behind a URL brings all of it. The
    root is last.
    """

    def place(name: str) -> tuple[bool, bool, str, tuple[int, ...]]:
        if is_metadata(name):
            return True, name == "zarr.json", name, ()
        found = _CHUNK.fullmatch(name)
        if found is None:
            return False, False, name, ()
        return False, False, found[1], tuple(map(int, found[2].split("/")[1:]))

    return sorted(names, key=place)


def directory(entries: Sequence[Entry]) -> bytes:
    """Return what follows the entries: the directory of a zip file, and its end."""
    begin = entries[-1].end if entries else 0
    metadata = next((entry.offset for entry in entries if is_metadata(entry.name)), begin)
    records = b"".join(map(_record, entries))
    version = _COMMENT_LAID_OUT if any(is_laid_out(entry.name) for entry in entries) else _COMMENT
    comment = version + f"{metadata:016x}".encode()
    count, size = len(entries), len(records)
    end64 = b""
    if count >= 0xFFFF or size >= LIMIT or begin >= LIMIT:
        end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, size, begin)
        end64 += _LOCATOR.pack(b"PK\6\7", 0, begin + size, 1)
        count, size, begin = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF
    return records + end64 + _END.pack(b"PK\5\6", 0, 0, count, count, size, begin, len(comment)) + comment


def _record(entry: Entry) -> bytes:
    name, extra, version, offset = entry.name.encode(), b"", 20, entry.offset
    if offset >= LIMIT:
        extra, version, offset = struct.pack("<2HQ", 1, 8, offset), 45, 0xFFFFFFFF
    fields = (
        b"PK\1\2", 3 << 8 | version, version, 0, 0, _TIME, _DATE, entry.crc, entry.size, entry.size, len(name),
        len(extra), 0, 0, 0, _MODE, offset,
    )  # fmt: skip
    return _CENTRAL.pack(*fields) + name + extra


class Window:
    """A file whose end is held in memory, to be asked for once."""

    def __init__(self, source: Ranges) -> None:
        self.source = source
        self.begin, self._held = source.size, b""

    def hold(self, start: int) -> None:
        """Read from here to the end, as far as it is not held."""
        if start < self.begin:
            self._held = self.source.read(start, self.begin) + self._held
            self.begin = start

    def read(self, start: int, end: int) -> bytes:
        """Return these bytes."""
        if start >= self.begin:
            return self._held[start - self.begin : end - self.begin]
        return self.source.read(start, end)

    def last(self, signature: bytes) -> int:
        """Return where a signature stands for the last time in what is held, -1 where it does not."""
        found = self._held.rfind(signature)
        return found if found < 0 else self.begin + found


def read_directory(window: Window, whole: bool) -> dict[str, Entry]:
    """Return the entries of a pack by name, in their order.

    whole: hold the metadata too. Raises DamagedError where the file is cut short, and StoreError where it is no zip
    file of the one form; the reason is named. Nothing that it says is acted upon before it was held against its size.
    """
    url, size = window.source.url, window.source.size
    window.hold(max(0, size - _TAIL))
    at = window.last(b"PK\5\6")
    if at < 0 or at + _END.size > size:
        if size >= 4 and window.read(0, 4) == b"PK\3\4":
            raise DamagedError(f"{url}: a zip file whose end is missing (was the copy cut short?); copy it again")
        if begins_a_pointer(window.read(0, min(size, 64))):
            raise StoreError(f"{url}: {POINTER}")
        raise StoreError(
            f"{url}: a file, but not a packed store; expected a folder, or a file that `bincompress pack` has written"
        )
    *_, count, length, begin, comment = _END.unpack(window.read(at, at + _END.size))
    if at + _END.size + comment != size:
        raise DamagedError(f"{url}: a zip file of {size:,} bytes, whose end says {at + _END.size + comment:,}")
    end = at
    if count == 0xFFFF or length == 0xFFFFFFFF or begin == 0xFFFFFFFF:
        end = at - _LOCATOR.size - _END64.size
        if end < 0:
            raise DamagedError(f"{url}: a zip file whose directory has no place")
        *_, count, length, begin = _END64.unpack(window.read(end, end + _END64.size))
    if begin + length != end or length > MOST_DIRECTORY or count * _CENTRAL.size > length:
        raise DamagedError(
            f"{url}: a zip file of {size:,} bytes, which a directory of {count:,} entries in {length:,} bytes at "
            f"{begin:,} does not fit"
        )
    mark = window.read(at + _END.size, size)
    known = re.fullmatch(rb"(?:%b|%b)[0-9a-f]{16}" % (_COMMENT, _COMMENT_LAID_OUT), mark)
    start = int(mark[len(_COMMENT) :], 16) if known else begin
    window.hold(start if whole and begin - _HELD <= start <= begin else max(begin, size - _HELD))
    content = window.read(begin, end)
    return _checked(url, content, _entries(url, content, count), window.read(begin, size))


def _entries(url: str, content: bytes, count: int) -> dict[str, Entry]:
    """Return the entries that a directory lists; raises StoreError for what no store has."""
    found: dict[str, Entry] = {}
    place = 0
    for _ in range(count):
        if place + _CENTRAL.size > len(content):
            raise DamagedError(f"{url}: a zip file whose directory ends too early")
        record = _CENTRAL.unpack_from(content, place)
        name_size, extra_size, comment_size = record[10:13]
        begin = place + _CENTRAL.size
        name = content[begin : begin + name_size].decode("latin-1")
        place = begin + name_size + extra_size + comment_size
        if place > len(content):
            raise DamagedError(f"{url}: a zip file whose directory ends within the entry {name[:80]!r}")
        problem = _problem(name, found, flags=record[3], method=record[4], sizes=record[8:10], mode=record[15] >> 16)
        if problem:
            raise StoreError(f"{url}: {problem}")
        offset = record[16]
        if offset == 0xFFFFFFFF and extra_size == 12:
            offset = struct.unpack_from("<Q", content, begin + name_size + 4)[0]
        found[name] = Entry(name, offset, record[9], record[7])
    return found


def _problem(
    name: str, known: Mapping[str, Entry], *, flags: int, method: int, sizes: tuple[int, int], mode: int
) -> str:
    """Return what an entry is that no pack has; empty where it is sound."""
    shown, parts = repr(name[:80]), name.removesuffix("/").split("/")
    if ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
        return f"a zip file with the entry {shown}, which leads out of the store"
    if mode & _KIND == _LINK:
        return f"a zip file with the entry {shown}, which is a link; a packed store has none"
    if name in known:
        return f"a zip file that has the entry {shown} twice"
    if flags & 1:
        return f"a zip file whose entry {shown} is encrypted"
    if method or sizes[0] != sizes[1]:
        return (
            f"a zip file whose entry {shown} is compressed; a packed store holds its entries as they are: unzip it "
            "into a folder, and `bincompress pack` that"
        )
    if not name.endswith("/") and not (name.isascii() and _OWNED.owns(name) and all(p not in ("", ".") for p in parts)):
        return f"a zip file with the entry {shown}, which is no part of a store"
    chunk = _CHUNK.fullmatch(name)
    if chunk is not None and any(len(number) > _MOST_DIGITS for number in chunk[2].split("/")):
        return f"a zip file with the entry {shown}, whose chunk has a place of more than {_MOST_DIGITS} digits"
    return ""


def _checked(url: str, content: bytes, found: dict[str, Entry], written: bytes) -> dict[str, Entry]:
    """Return the entries where the directory is the one that they give; raises StoreError where it is not."""
    entries, end = list(found.values()), 0
    for name, entry in found.items():
        if name.endswith("/") or entry.offset != end:
            break
        end = entry.end
    else:
        if [*found] == in_order(found) and directory(entries) == written:
            return found
    raise StoreError(
        f"{url}: a zip file, but not laid out as `bincompress pack` does it; unzip it into a folder, and pack that"
    )
