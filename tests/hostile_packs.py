"""Packed stores whose directory is not what it says: each once ended a reader with an error of Python's own."""

import struct
import zlib

from bincompress.store import zip_format


def _end(count: int, size: int, begin: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, begin, 0)


def _placed(name: str) -> bytes:
    """Return a pack in the right form with one chunk of this name."""
    first = zip_format.Entry(name, 0, 3, zlib.crc32(b"abc"))
    root = zip_format.Entry("zarr.json", first.end, 2, zlib.crc32(b"{}"))
    return first.header + b"abc" + root.header + b"{}" + zip_format.directory([first, root])


def hostile_packs() -> dict[str, tuple[bytes, str]]:
    """Return each file's bytes with the reason for which it is to be refused."""
    root = zip_format.Entry("zarr.json", 0, 2, zlib.crc32(b"{}"))
    data = root.header + b"{}"
    record = bytearray(zip_format._record(root))
    named = bytes(record[:46])  # and the name is not there
    record[30:32], record[42:46] = struct.pack("<H", 12), b"\xff" * 4  # eight bytes more of an offset: none is there
    cut, long = r"directory ends within the entry", "a place of more than 18 digits"
    return {
        "cut64": (data + record + _end(1, len(record), len(data)), f"{cut} 'zarr\\.json'"),
        "cut_name": (data + named + _end(1, len(named), len(data)), cut),
        "digits5000": (_placed("plain/x/c/" + "1" * 5000), long),
        "digits60000": (_placed("plain/x/c/" + "1" * 60_000), long),
        "digits19": (_placed("plain/x/c/0/" + "9" * 19), long),
    }
