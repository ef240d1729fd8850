"""What does the format of a store say? Names, Zarr metadata, and the hashes that arrays and attributes are under.

The metadata is written and read here, without the zarr library: its bytes do not change with a version of it (a test
compares them), and what a file claims is held against the format before it is acted upon.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bincompress.errors import DamagedError, StoreError

BEGINNING = "beginning"  # the status of a store that is being created, or made room for: nothing in it counts
FORMAT = "bincompress"
VERSION = 1
LOW_RANK_VERSION = 2  # of a store with a tensor in low-rank form, which programs that know version 1 alone refuse
VERSIONS = (VERSION, LOW_RANK_VERSION)
NODES = "nodes"  # what a store behind a URL knows of its finished tensors, in one object
LAID_OUT = "laid_out"  # what a packed store holds beside it: matrices as the product kernels read them
NEW = ".bincompress-new"  # a folder in a store's, where what is to take its place is written first
SEAL = "sealed"  # the attribute that the others are under

CHUNK_LIMIT = 256 << 20  # bytes of one chunk file: a larger array is cut by rows, so that no writer holds it twice
CHECKSUM_BYTES = 4  # of crc32c, behind the data
ZSTD_LEVEL = 9
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")  # of a tensor: it becomes a folder's
_DTYPES = (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64",
)  # fmt: skip
_MOST_DIMENSIONS = 16
_MOST_SIZE = 1 << 40  # of one dimension: far beyond any model, and small enough to multiply
_ZSTD: dict[str, Any] = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
_CRC32C: dict[str, Any] = {"name": "crc32c"}

# What a program of this format may write: metadata, chunks, and what a killed writer leaves.
_WRITTEN = r"(?:[^/]+/)*(?:zarr\.json|c(?:/\d+)*)"
_PARTIAL = r"(?:[^/]+/)*(?:zarr)?\.[0-9a-f]+\.partial"


@dataclass(frozen=True)
class Format:
    """A kind of store: what its root says it is, and the groups that it owns."""

    name: str
    lacking: str  # what is said of a place that holds none
    another: str  # what is said of another store
    groups: tuple[str, ...]

    def owns(self, key: str) -> bool:
        """Return whether a key is one that this format writes."""
        key = key.removeprefix(f"{NEW}/")
        top, _, rest = key.partition("/")
        if key == "zarr.json" or re.fullmatch(_PARTIAL, key):
            return not rest or top in self.groups
        return top in self.groups and (not rest or re.fullmatch(_WRITTEN, rest) is not None)

    def owns_link(self, key: str) -> bool:
        """Return whether a link, or an empty folder, stands where this format has its own."""
        key = key.removeprefix(f"{NEW}/")
        return not key or key.split("/")[0] in self.groups

    def owned(self, keys: Iterable[str]) -> list[str]:
        """Return those of a place's keys that this format writes: nothing else is ever removed."""
        return [key for key in keys if (self.owns_link(key) if key.endswith("/") else self.owns(key))]


MODEL = Format(
    FORMAT,
    "not a bincompress store",
    "a Zarr store, but not a bincompress store",
    ("tensors", "plain", "assets", "log", NODES),
)
STATISTICS = Format(
    "bincompress-statistics",
    "holds something else, and no statistics",
    "holds no statistics",
    ("inputs", "trials", "work"),
)


@dataclass(frozen=True)
class ArrayLayout:
    """How an array lies in its chunk files: cut along one axis at most."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    archive: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one chunk's data; the last is filled up."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    @property
    def count(self) -> int:
        """How many chunk files there are."""
        return math.prod(-(-size // step) for size, step in zip(self.shape, self.chunks, strict=True))

    def parts(self) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Yield each chunk's key below the array, and its place in the array."""
        if not self.count:
            return
        axis = next((i for i in range(len(self.shape)) if self.chunks[i] < self.shape[i]), 0)
        for number in range(self.count):
            place = [0] * len(self.shape)
            part = [slice(None)] * len(self.shape)
            if place:
                place[axis] = number
                part[axis] = slice(number * self.chunks[axis], (number + 1) * self.chunks[axis])
            yield "/".join(("c", *map(str, place))), tuple(part)

    def record(self) -> dict[str, Any]:
        """Return the layout as JSON."""
        return {
            "shape": list(self.shape), "dtype": self.dtype, "chunks": list(self.chunks), "archive": self.archive,
        }  # fmt: skip


def layout_of(values: NDArray[Any], archive: bool) -> ArrayLayout:
    """Return how an array is to be written."""
    axis = 1 if values.ndim == 3 else 0  # the rows
    pieces = max(1, -(-values.nbytes // CHUNK_LIMIT))
    step = max(1, -(-values.shape[axis] // pieces)) if values.ndim else 1
    chunks = tuple(step if i == axis else max(1, size) for i, size in enumerate(values.shape))
    return ArrayLayout(values.shape, values.dtype.name, chunks, archive)


def array_node(layout: ArrayLayout, attributes: Mapping[str, Any]) -> bytes:
    """Return an array's zarr.json."""
    endian: dict[str, Any] = {} if layout.dtype == "uint8" else {"configuration": {"endian": "little"}}
    return _json(
        {
            "shape": list(layout.shape),
            "data_type": layout.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(layout.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if layout.dtype.startswith("float") else 0,
            "codecs": [{"name": "bytes", **endian}, *([_ZSTD] if layout.archive else []), _CRC32C],
            "attributes": dict(attributes),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
    )


def group_node(attributes: Mapping[str, Any]) -> bytes:
    """Return a group's zarr.json."""
    return _json({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def _json(node: Mapping[str, Any]) -> bytes:
    return json.dumps(node, indent=2).encode()


def parse_node(content: bytes) -> dict[str, Any]:
    """Return a node's metadata; raises ValueError where it, or its attributes, are no JSON objects."""
    found = json.loads(content)
    if not isinstance(found, dict) or not isinstance(found.get("attributes", {}), dict):
        raise ValueError("zarr.json is not a node's")
    return found


def parse_array(node: Mapping[str, Any]) -> ArrayLayout:
    """Return the layout that an array's metadata gives; raises ValueError, TypeError or KeyError where it is not ours.

    Nothing is allocated by what it says: sizes are held against the files by those who read them.
    """
    if node.get("zarr_format") != 3 or node.get("node_type") != "array":
        raise ValueError("its zarr.json is not an array's")
    codecs = [codec["name"] for codec in node["codecs"]]
    if codecs not in (["bytes", "crc32c"], ["bytes", "zstd", "crc32c"]):
        raise ValueError(f"codecs {codecs!r:.80}; expected bytes, zstd (of an archive) and crc32c")
    endian = (node["codecs"][0].get("configuration") or {}).get("endian", "little")
    separator = (node["chunk_key_encoding"].get("configuration") or {}).get("separator", "/")
    if endian != "little" or node["chunk_key_encoding"]["name"] != "default" or separator != "/":
        raise ValueError("its bytes or chunk names are laid out in another way than the format's")
    if node.get("storage_transformers"):
        raise ValueError("it has storage transformers, which the format has not")
    grid = node["chunk_grid"]
    if grid["name"] != "regular":
        raise ValueError(f"chunk grid {grid['name']!r:.40}; expected a regular one")
    return parse_layout(
        {
            "shape": node["shape"], "dtype": node["data_type"], "chunks": grid["configuration"]["chunk_shape"],
            "archive": len(codecs) == 3,
        }
    )  # fmt: skip


def parse_layout(found: Mapping[str, Any]) -> ArrayLayout:
    """Return a layout from its record; raises ValueError, TypeError or KeyError where it is none of the format."""
    shape, chunks, dtype = found["shape"], found["chunks"], found["dtype"]
    if dtype not in _DTYPES:
        raise ValueError(f"data type {dtype!r:.40}; expected one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not isinstance(chunks, list) or len(shape) != len(chunks):
        raise ValueError(f"shape {shape!r:.80} and chunks {chunks!r:.80} are not lists of one length")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions; expected at most {_MOST_DIMENSIONS}")
    if any(type(size) is not int or not 0 <= size <= _MOST_SIZE for size in shape):
        raise ValueError(f"shape: {shape!r:.80}; expected a list of whole numbers")
    if any(type(size) is not int or not 1 <= size <= _MOST_SIZE for size in chunks):
        raise ValueError(f"chunks: {chunks!r:.80}; expected a list of whole numbers from 1")
    if sum(step != max(1, size) for size, step in zip(shape, chunks, strict=True)) > 1:
        raise ValueError(f"chunks {chunks!r:.80} cut shape {shape!r:.80} along more than one axis")
    if any(step > max(1, size) for size, step in zip(shape, chunks, strict=True)):
        raise ValueError(f"chunks {chunks!r:.80} are larger than shape {shape!r:.80}")
    return ArrayLayout(tuple(shape), dtype, tuple(chunks), found["archive"] is True)


def array_hash(values: NDArray[Any]) -> str:
    """Return the xxh3-128 hash of an array's bytes, row-major, little-endian."""
    return rows_hash([values])


def rows_hash(runs: Iterable[NDArray[Any]]) -> str:
    """Return the `array_hash` of an array whose rows come in runs."""
    digest = xxhash.xxh3_128()
    for values in runs:
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def sealed(name: str, attributes: Mapping[str, Any], layouts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return attributes with their hash, and that of the shapes and dtypes of arrays, in `sealed`.

    name: the tensor's, empty for the root: attributes of another tensor are no better than changed ones. layouts: the
    arrays', as JSON.
    """
    own: dict[str, Any] = {key: value for key, value in attributes.items() if key != SEAL}
    seal: dict[str, Any] = {"arrays": dict(layouts)} if layouts is not None else {}
    return {**own, SEAL: {**seal, "hash": _hash(name, own, seal)}}


def seal_problem(name: str, attributes: Mapping[str, Any]) -> str:
    """Return what is wrong with attributes that are under a hash; empty where all is well, or where there is none."""
    seal = attributes.get(SEAL)
    if seal is None:
        return ""
    if isinstance(seal, dict):
        own = {key: value for key, value in attributes.items() if key != SEAL}
        if seal.get("hash") == _hash(name, own, {key: value for key, value in seal.items() if key != "hash"}):
            return ""
    return "its attributes are not those that were written"


def _hash(name: str, attributes: Mapping[str, Any], seal: Mapping[str, Any]) -> str:
    content = json.dumps([name, attributes, seal], sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(content.encode())


def check_format(url: str, attributes: Mapping[str, Any]) -> None:
    """Raise StoreError where the root's attributes are not those of a store that this program reads."""
    if attributes.get("format") != FORMAT:
        raise StoreError(f"{url}: a Zarr store, but not a bincompress store (format {attributes.get('format')!r})")
    if type(attributes.get("version")) is not int or attributes["version"] not in VERSIONS:
        raise StoreError(
            f"{url}: store version {attributes.get('version')!r:.40}; this program reads versions "
            f"{' and '.join(map(str, VERSIONS))}: "
            "install the one that wrote it, or compress again"
        )
    if attributes.get("status") == BEGINNING:
        raise StoreError(f"{url}: a run ended while it was creating this store; run the same command again")
    for key, kind in (("tensors", dict), ("status", str), ("failures", dict)):
        if not isinstance(attributes.get(key), kind):
            raise StoreError(f"{url}: its manifest lacks {key}; compress again with --overwrite")
    for key in ("source", "config"):
        if not isinstance(attributes.get(key, {}), dict):
            raise DamagedError(f"{url}: zarr.json: {key}: {attributes[key]!r:.40}; expected an object")
    for name, kind in attributes["tensors"].items():
        if kind not in ("packed", "plain") or not _NAME.fullmatch(name) or ".." in name:
            raise StoreError(f"{url}: its manifest lists {name!r:.80} as {kind!r:.40}, which names no tensor")
    check_root(url, attributes)


def check_root(url: str, attributes: Mapping[str, Any]) -> None:
    """Raise DamagedError where the root's attributes are not those under their hash."""
    problem = seal_problem("", attributes)
    if problem:
        raise DamagedError(f"{url}: zarr.json: {problem}; compress this store again")
