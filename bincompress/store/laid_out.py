"""Which matrices does a packed store hold as the product kernels read them, and do they fit the file and its tensors?

docs/format.md specifies it. What the file claims is held against its tensors' shapes and its size before it is used.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bincompress.errors import DamagedError
from bincompress.store.layout import CHECKSUM_BYTES, LAID_OUT, ArrayLayout, array_hash, array_node, seal_problem
from bincompress.store.pack_files import PackFiles
from bincompress.store.reading import StoreReader
from bincompress.tensors.packed import MOST, whole_number
from cpu_kernels.matmul.tiling import Shape, tiling_of

VERSION = 1
MOST_PLANES = 8  # of a matrix that kernels multiply
FACTORS = ("left", "right")  # matrices of a tensor in low-rank form
_OF_SOURCE = ("shape", "block", "terms", "mix", "coef_exponent", "rank")
_FORM = re.compile(r"(lookup|popcount)(32|64)")
_LARGEST_WEIGHT = 1e30  # of a plane, within float32's
_DTYPES = {"stream": np.uint8, "multipliers": np.float32, "difference": np.float32}


@dataclass(frozen=True)
class Record:
    """What a packed store says of a matrix that is laid out."""

    name: str  # that of its first tensor, and the factor of one in low-rank form
    tensors: tuple[str, ...]
    sources: Mapping[str, str]
    block: int
    planes: int
    plane_weights: tuple[float, ...] | None
    offset: bool
    half: bool
    hashes: Mapping[str, str]

    @property
    def factor(self) -> str:
        """Which factor of a tensor in low-rank form it is; empty for a matrix of planes."""
        return self.name.partition("/")[2]

    def json(self) -> dict[str, Any]:
        """Return the entry of `matrices`."""
        return {
            "tensors": list(self.tensors), "source": dict(self.sources), "block": self.block, "planes": self.planes,
            "plane_weights": None if self.plane_weights is None else list(self.plane_weights), "offset": self.offset,
            "half": self.half, "hashes": dict(self.hashes),
        }  # fmt: skip


def source_of(name: str, attributes: Mapping[str, Any]) -> str:
    """Return the hash of what a tensor's matrix follows from: its formula, and the hashes of its arrays."""
    said = [name, {key: attributes.get(key) for key in _OF_SOURCE}, attributes.get("hashes")]
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())


def array_path(form: str, matrix: str, array: str) -> str:
    """Return where an array of a laid-out matrix lies in a packed store."""
    return f"{LAID_OUT}/{form}/{matrix}/{array}"


def array_layout(array: str, count: int) -> ArrayLayout:
    """Return how an array of a laid-out matrix, of so many items, lies in its one chunk."""
    return ArrayLayout((count,), np.dtype(_DTYPES[array]).name, (count,), archive=False)


def forms_in(store: StoreReader) -> dict[str, int]:
    """Return the forms in which a packed store holds matrices, sorted, and their bytes; empty for another store."""
    found: dict[str, int] = {}
    if isinstance(store.files, PackFiles):
        for key, entry in store.files.entries.items():
            parts = key.split("/", 2)
            if parts[0] == LAID_OUT and len(parts) > 2:
                found[parts[1]] = found.get(parts[1], 0) + entry.size
    return dict(sorted(found.items()))


class LaidOut:
    """The matrices of one form in a packed store; threads may read different ones at the same time."""

    def __init__(self, store: StoreReader, form: str) -> None:
        """Read what the store says of them; raises DamagedError where that is not so, or of another version."""
        self.form = form
        self._store = store
        self._where = f"{store.url}: {LAID_OUT}/{form}"
        found = _FORM.fullmatch(form)
        if found is None:
            raise DamagedError(f"{self._where}: no kernel reads that; pack the store again")
        self._tile = int(found[2])
        attributes = store.node_of(f"{LAID_OUT}/{form}").get("attributes", {})
        self.version = attributes.get("version")
        self.records: dict[str, Record] = {}
        if self.version != VERSION:
            return
        problem = seal_problem(f"{LAID_OUT}/{form}", attributes) or ("" if "sealed" in attributes else "has no hash")
        if problem or (attributes.get("kernel"), attributes.get("tile")) != (found[1], self._tile):
            raise DamagedError(f"{self._where}: {problem or 'says that it is of another form'}; pack the store again")
        matrices = attributes.get("matrices")
        for name, content in (matrices if isinstance(matrices, dict) else {}).items():
            try:
                self.records[name] = _record(name, content)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise DamagedError(f"{self._where}: {name[:80]}: {error}") from None
        files = store.files
        self._region = files.region(f"{LAID_OUT}/{form}/") if isinstance(files, PackFiles) else None

    @property
    def is_near(self) -> bool:
        """Whether the file is on this machine, so that matrices can be mapped."""
        return self._region is not None

    def starting(self, names: Sequence[str]) -> Record | None:
        """Return the matrix that the first of these tensors make together, None where there is none."""
        record = self.records.get(names[0])
        return record if record is not None and tuple(names[: len(record.tensors)]) == record.tensors else None

    def shape(self, record: Record) -> Shape:
        """Return the shape of a matrix; raises DamagedError where it is not that of its tensors as they are."""
        rows, cols = 0, 0
        for name in record.tensors:
            if self._store.tensors().get(name) != "packed":
                raise DamagedError(f"{self._where}: {record.name}: the store has no packed tensor {name[:80]}")
            attributes = self._store.complete_attributes(name)
            if record.sources.get(name) != source_of(name, attributes):
                raise DamagedError(
                    f"{self._where}: {record.name}: was made of another {name} than the store holds; pack it again"
                )
            found = _shape(self._store, name, record.factor)
            if cols not in (0, found[1]):
                raise DamagedError(f"{self._where}: {record.name}: its tensors have {cols} and {found[1]} columns")
            rows, cols = rows + found[0], found[1]
        return Shape(rows, cols, record.block, record.planes, record.plane_weights, record.offset)

    def arrays(self, record: Record, own: bool = False) -> tuple[Shape, dict[str, NDArray[Any]]]:
        """Map the arrays of a matrix, held against their hashes; raises DamagedError naming what is wrong.

        own: in mappings of their own, which end with them.
        """
        shape, found = self.shape(record), {}
        for array, count in self._counts(record, shape).items():
            key, layout = f"{array_path(self.form, record.name, array)}/c/0", array_layout(array, count)
            try:
                content = self._content(key, layout.nbytes + CHECKSUM_BYTES, own)
            except ValueError as error:
                raise DamagedError(f"{self._where}: {record.name}: {array}: {error}") from None
            values = np.frombuffer(content, np.dtype(layout.dtype).newbyteorder("<"), count)
            if array_hash(values) != record.hashes[array]:
                raise DamagedError(
                    f"{self._where}: {record.name}: {array}: its bytes are not those that were written; pack the "
                    "store again"
                )
            found[array] = values
        return shape, found

    def _content(self, key: str, size: int, own: bool) -> Any:
        """Map the bytes of a key, or read them behind a URL; raises ValueError where there are not so many."""
        files = self._store.files
        if self._region is not None:
            return files.mapped(key, size) if own else self._region.mapped(key, size)
        if files.size(key) != size:
            raise ValueError(f"{files.size(key)} bytes; expected {size:,}")
        return files.read(key)

    def _counts(self, record: Record, shape: Shape) -> dict[str, int]:
        """Return how many items each array has to have."""
        try:
            counts = {
                "stream": tiling_of(shape, self._tile).stream_bytes(int(record.half)), "multipliers": shape.rows,
            }  # fmt: skip
            listed = 0 if record.factor == "right" else sum(map(self._store.listed, record.tensors))
            if listed:
                counts["difference"] = listed
        except ValueError as error:
            raise DamagedError(f"{self._where}: {record.name}: {error}") from None
        if counts.keys() != record.hashes.keys():
            raise DamagedError(f"{self._where}: {record.name}: hashes: expected those of {', '.join(counts)}")
        return counts

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each matrix, and with the metadata that other readers of Zarr go by."""
        for record in self.records.values():
            try:
                shape, _ = self.arrays(record)
                for array, count in self._counts(record, shape).items():
                    path = array_path(self.form, record.name, array)
                    if self._store.files.read(f"{path}/zarr.json") != array_node(array_layout(array, count), {}):
                        yield f"{self._store.url}: {path}: zarr.json is not the one that was written"
            except DamagedError as error:
                yield str(error)
        known = {array_path(self.form, r.name, array) for r in self.records.values() for array in r.hashes}
        for key in self._store.files.sizes(f"{LAID_OUT}/{self.form}"):
            if key.endswith("/c/0") and key.removesuffix("/c/0") not in known:
                yield f"{self._where}: does not list {key}, which lies there"


def _shape(store: StoreReader, name: str, factor: str) -> tuple[int, int]:
    rows, cols = store.shape(name)
    rank = store.complete_attributes(name).get("rank")
    if (rank is not None) != bool(factor):
        form = "in low-rank form" if rank is not None else "of planes"
        raise DamagedError(f"{store.url}: {name}: is {form}, and what is laid out of it is not")
    if not factor:
        return rows, cols
    rank = whole_number("rank", rank, 1, MOST)
    return (rows, rank) if factor == "left" else (rank, cols)


def _record(name: str, content: Mapping[str, Any]) -> Record:
    """Return an entry of `matrices`; raises ValueError, TypeError or KeyError where it is none."""
    tensors, sources, hashes = content["tensors"], content["source"], content["hashes"]
    tensor, _, factor = name.partition("/")
    if factor and factor not in FACTORS:
        raise ValueError(f"a matrix {factor!r:.40}; expected {' or '.join(FACTORS)}")
    if not isinstance(tensors, list) or not all(isinstance(one, str) for one in tensors) or tensors[:1] != [tensor]:
        raise ValueError(f"tensors: {tensors!r:.80}; expected a list of names that begins with its own")
    if len(set(tensors)) < len(tensors) or (factor and len(tensors) > 1):
        raise ValueError("tensors: more than there can be")
    if not isinstance(sources, dict) or not isinstance(hashes, dict) or not set(hashes) <= set(_DTYPES):
        raise ValueError("source and hashes: expected objects of hashes by name")
    planes, weights = whole_number("planes", content["planes"], 1, MOST_PLANES), content["plane_weights"]
    if weights is not None:
        if not isinstance(weights, list) or any(type(one) not in (int, float) for one in weights):
            raise ValueError(f"plane_weights: {weights!r:.60}; expected a list of numbers")
        if len(weights) != planes or not all(math.isfinite(one) and abs(one) <= _LARGEST_WEIGHT for one in weights):
            raise ValueError(f"plane_weights: expected {planes} numbers of at most {_LARGEST_WEIGHT:g}")
    if type(content["offset"]) is not bool or type(content["half"]) is not bool:
        raise ValueError("offset and half: expected true or false")
    return Record(
        name, tuple(tensors), sources, whole_number("block", content["block"], 1, MOST), planes,
        None if weights is None else tuple(map(float, weights)), content["offset"], content["half"], hashes,
    )  # fmt: skip
