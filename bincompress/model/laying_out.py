"""How are a store's matrices laid out for a kind of CPU, to be kept in its packed file, and compared with that?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from bincompress.errors import BincompressError, DamagedError
from bincompress.model.decoder import Decoder
from bincompress.model.linear import Floats
from bincompress.model.low_rank_linear import lay_out_factors, low_rank_differences
from bincompress.model.matrices import LOW_RANK, Entry, differences, lay_out, runs
from bincompress.model.store_source import store_config
from bincompress.store.laid_out import VERSION, LaidOut, Record, array_layout, array_path, forms_in, source_of
from bincompress.store.layout import CHECKSUM_BYTES, LAID_OUT, array_hash, array_node, group_node, sealed
from bincompress.store.store import Store
from bincompress.tensors.low_rank import LowRankTensor
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.matmul.prepacking import FAMILIES, PackedMatrix, form_of
from cpu_kernels.parallel.workers import Workers

_BITS = 8  # of the activations that matrices are laid out for; 6 take the same
Arrays = dict[str, NDArray[Any]]


class LayingOut:
    """What a packed file is to hold beside a store: its matrices in some forms, each made when its bytes are asked for.

    The keys are asked for in their order; one matrix is in memory at a time.
    """

    def __init__(self, store: Store, families: Sequence[str]) -> None:
        """families: of FAMILIES, or "auto" for this CPU; raises BincompressError for another one, or a model that does
        not run.
        """
        self.forms = forms_of(families)
        self._store = store
        self._matrices = {name: run for kind, run in _runs(store) for name in _matrices_of(kind, run)}
        self._made: tuple[str, str, Record, Arrays] | None = None  # the form and matrix that were made last
        self._nodes: dict[str, bytes] = {f"{LAID_OUT}/zarr.json": group_node({})}
        self._records: dict[str, dict[str, Any]] = {form: {} for form in self.forms}

    def keys(self) -> list[str]:
        """Return the keys of all arrays and of their metadata."""
        found = [f"{LAID_OUT}/zarr.json"]
        for form in self.forms:
            found.append(f"{LAID_OUT}/{form}/zarr.json")
            for name in self._matrices:
                groups = {name, name.partition("/")[0]}
                found += [f"{LAID_OUT}/{form}/{group}/zarr.json" for group in groups]
                for array in self._arrays(name):
                    found += [f"{array_path(form, name, array)}/{end}" for end in ("c/0", "zarr.json")]
        return list(dict.fromkeys(found))

    def content(self, key: str) -> bytes:
        """Return the bytes of a key; all arrays are asked for before any metadata."""
        _, form, *rest = key.split("/")
        if key.endswith("zarr.json"):
            return self._node(key, form)
        name, array = "/".join(rest[:-3]), rest[-3]
        if self._made is None or self._made[:2] != (form, name):
            self._made = None  # its memory is free before the next one is made
            self._made = (form, name, *made(self._store, self._matrices[name], name, form))
            self._records[form][name] = self._made[2].json()
        values = self._made[3][array]
        self._nodes[f"{array_path(form, name, array)}/zarr.json"] = array_node(array_layout(array, values.size), {})
        data = values.view(np.uint8)
        checksum: bytes = google_crc32c.value(data).to_bytes(CHECKSUM_BYTES, "little")
        return data.tobytes() + checksum

    def _node(self, key: str, form: str) -> bytes:
        if key != f"{LAID_OUT}/{form}/zarr.json":
            return self._nodes.get(key, group_node({}))
        kernel, tile = form.rstrip("0123456789"), int(form.lstrip("abcdefghijklmnopqrstuvwxyz"))
        attributes = {"version": VERSION, "kernel": kernel, "tile": tile, "matrices": self._records[form]}
        return group_node(sealed(f"{LAID_OUT}/{form}", attributes))

    def _arrays(self, name: str) -> list[str]:
        listed = 0 if name.endswith("/right") else sum(map(self._store.listed, self._matrices[name]))
        return ["stream", "multipliers", *(["difference"] if listed else [])]


def forms_of(families: Sequence[str]) -> list[str]:
    """Return the forms that families of CPUs read, sorted; raises BincompressError for an unknown family."""
    for family in families:
        if family not in (*FAMILIES, "auto"):
            raise BincompressError(f"--layout {family}: expected {', '.join(FAMILIES)}, or auto for this CPU")
    return sorted({form_of(family=None if family == "auto" else family) for family in families})


def made(store: Store, run: Sequence[str], name: str, form: str) -> tuple[Record, Arrays]:
    """Lay out a matrix of these tensors; returns what the file says of it, and its arrays."""
    family = next(family for family in FAMILIES if form_of(family=family) == form)
    (_, entries), *_ = runs([(tensor, store.read_stored(tensor)) for tensor in run], _BITS)
    matrix, listed = _laid_out(entries, name.partition("/")[2], family)
    arrays: Arrays = {"stream": matrix.stream, "multipliers": matrix.multipliers}
    if listed:
        arrays["difference"] = np.concatenate(listed)
    lowered = entries[0][2]
    weights = None if lowered is None else lowered.plane_weights
    record = Record(
        name, tuple(run), {tensor: source_of(tensor, store.complete_attributes(tensor)) for tensor in run},
        matrix.block, matrix.plane_weights.size, None if weights is None else tuple(map(float, weights)),
        bool(matrix.has_offset), bool(matrix.half), {key: array_hash(values) for key, values in arrays.items()},
    )  # fmt: skip
    return record, arrays


def _laid_out(entries: Sequence[Entry], factor: str, family: str) -> tuple[PackedMatrix, list[Floats]]:
    tensors = [packed for _, packed, _ in entries]
    first = tensors[0]
    if isinstance(first, LowRankTensor):
        right, left = lay_out_factors(first, family=family, own_pages=True)
        listed = [low_rank_differences(first).difference] if first.listed_index.size and factor == "left" else []
        return (left if factor == "left" else right), listed
    found = [differences(one).difference for one in tensors if isinstance(one, PackedTensor) and one.listed_index.size]
    return lay_out(entries, family=family, own_pages=True), found


def _matrices_of(kind: object, names: list[str]) -> list[str]:
    return [f"{names[0]}/left", f"{names[0]}/right"] if kind == LOW_RANK else [names[0]]


def compare(store: Store) -> Iterator[tuple[str, str]]:
    """Yield (form, problem) for each form that a packed store holds: is it what follows from its planes?

    Nothing is read that `store.verify` has not found sound.
    """
    for form in forms_in(store):
        yield f"{LAID_OUT}/{form}", _difference(store, form)


def _difference(store: Store, form: str) -> str:
    try:
        found = LaidOut(store, form)
        for name, record in found.records.items():
            there = found.arrays(record)[1]
            now, arrays = made(store, record.tensors, name, form)
            if now.json() != record.json() or any(not np.array_equal(arrays[key], there[key]) for key in arrays):
                return f"{store.url}: {LAID_OUT}/{form}: {name}: is not what follows from its planes; pack it again"
    except DamagedError as error:
        return str(error)
    return ""


class _Names:
    """The weights of a store as zeros, which notes which tensors are one matrix."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.found: list[tuple[str, ...]] = []
        self._shapes = shapes

    def vector(self, names: Sequence[str]) -> Floats:
        return np.zeros(sum(math.prod(self._shapes[name]) for name in names), np.float32)

    def linear(self, names: Sequence[str]) -> "_Unread":
        self.found.append(tuple(names))
        return _Unread(sum(self._shapes[name][0] for name in names), self._shapes[names[0]][-1])

    def embedding(self, name: str) -> "_Unread":
        return _Unread(*self._shapes[name])


class _Unread:
    """A matrix of which only the shape is known; a decoder that is made, and not run, asks for no more."""

    def __init__(self, rows: int, cols: int) -> None:
        self.rows, self.cols = rows, cols

    def __call__(self, x: Floats) -> Floats:
        raise TypeError("a matrix of which only the shape is known multiplies nothing")

    def rows_of(self, ids: NDArray[np.int64]) -> Floats:
        return np.zeros((len(ids), self.cols), np.float32)


def _runs(store: Store) -> Iterator[tuple[object, list[str]]]:
    """Yield the runs of tensors that a decoder multiplies as one, with what they share; of one low-rank tensor each."""
    config = store_config(store, store.read_assets())
    names = _Names(config.tensors())
    Decoder(config, names, Workers(1))
    kinds = store.tensors()
    for group in dict.fromkeys(names.found):
        read = [(name, store.read_stored(name) if kinds[name] == "packed" else None) for name in group]
        for kind, entries in runs(read, _BITS):
            if kind == LOW_RANK:
                yield from ((kind, [name]) for name, _, _ in entries)
            elif kind is not None:
                yield kind, [name for name, _, _ in entries]
