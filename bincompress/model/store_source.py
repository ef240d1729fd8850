"""A store as the decoder's weights: every matrix laid out for this CPU, by the form that it is stored in."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import StoreError
from bincompress.model.config import ModelConfig, parse
from bincompress.model.errors import NotFiniteError
from bincompress.model.layout import settle
from bincompress.model.linear import DenseLinear, Embedding, Floats, KeptEmbedding, Linear
from bincompress.model.low_rank_linear import DecodedLowRank, LowRankEmbedding, LowRankLinear
from bincompress.model.lowering import Lowered, lower
from bincompress.model.packed_linear import (
    ActivationSettings,
    DecodedLinear,
    Listed,
    PackedEmbedding,
    PackedLinear,
    ScaledLinear,
    StackedLinear,
)
from bincompress.store.arrays import in_runs
from bincompress.store.store import Store, let_go
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.forms import Stored
from bincompress.tensors.low_rank import LowRankTensor
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight
from cpu_kernels.matmul.prepacking import prepack_rows
from cpu_kernels.parallel.workers import Workers

Entry = tuple[str, Stored | None, Lowered | None]  # a tensor's name, how it is stored, and its planes

_Matrix = PackedLinear | ScaledLinear | LowRankLinear | DecodedLinear | DecodedLowRank | DenseLinear
_LOW_RANK = "low rank"  # what neighbours of that form share

_TOKENS_MAPPED = 16  # single tokens whose rows of a table stay mapped: a page brings up to 2 MB around it
_ROWS_AT_ONCE = 256  # whose planes are decoded to find what listed weights differ by


class StoreSource:
    """Matrices of a finished store, their bytes held against the hashes in it as they are laid out.

    Threads may ask for different ones at the same time.
    """

    def __init__(
        self,
        store: Store,
        config: ModelConfig,
        settings: ActivationSettings,
        workers: Workers,
        kernel: str | None = None,
        apart: frozenset[str] = frozenset(),
    ) -> None:
        """Check that the store is finished and has every tensor of the decoder in its shape; nothing is read yet.

        apart: matrices that may be read more than once, and whose memory is given back with each of them.
        """
        _check_complete(store)
        kinds = store.tensors()
        for name, shape in config.tensors().items():
            if name not in kinds:
                raise StoreError(f"{store.url}: tensor {name} is missing; config.json requires it")
            found = store.shape(name)
            if found != shape:
                raise StoreError(f"{store.url}: {name}: shape {found}; config.json gives {shape}")
        self._store = store
        self._kinds = kinds
        self._settings = settings
        self._workers = workers
        self._kernel = kernel
        self._apart = apart
        self._tied = config.declaration.names.embedding if config.tied else None
        self._tables: dict[str, Embedding] = {}
        self._lock = threading.Lock()
        self.paths: dict[str, str] = {}  # by tensor: which kernel multiplies it
        self.nbytes = 0  # of all matrices as they are laid out, without those that are `apart`

    def vector(self, names: Sequence[str]) -> Floats:
        """Return one-dimensional tensors, one after the other."""
        found = []
        for name in names:
            values = self._store.read_plain(name, check_hashes=True)[0].float32().reshape(-1)
            if not np.isfinite(values).all():  # quantizing what it makes of activations would turn it into numbers
                raise NotFiniteError(
                    f"{self._store.url}: {name} holds NaN or infinity; check the checkpoint and compress it again"
                )
            found.append(values)
        return np.concatenate(found)

    def linear(self, names: Sequence[str]) -> Linear:
        """Return matrices with the same input as one, rows one below the other."""
        parts = [part for part in self._forms(names) if part is not None]
        if self._apart:
            self._store.forget(name for name in names if name in self._apart)
        return parts[0] if len(parts) == 1 else StackedLinear(parts)

    def embedding(self, name: str) -> Embedding:
        """Return the table of token vectors; it stays mapped where the store is local, unless the head needs it."""
        if name not in self._tables:
            if self._kinds[name] == "packed":
                packed = self._store.read_stored(name, check_hashes=True)
                if isinstance(packed, LowRankTensor):
                    self._tables[name] = LowRankEmbedding(packed)
                else:
                    self._tables[name] = _InFiles(PackedEmbedding(packed), [packed.planes])
            elif name == self._tied:
                self._tables[name] = self._kept(name)
            else:
                parts = self._store.plain_rows(name)
                table = KeptEmbedding([_values(part) for part in parts])
                self._tables[name] = _InFiles(table, [part.bits for part in parts])
        return self._tables[name]

    def _forms(self, names: Sequence[str]) -> Iterator[Linear]:
        """Yield the matrices in order; neighbours of one layout become one."""
        found = [(name, *self._read(name)) for name in names]
        for kind, group in groupby(found, key=lambda entry: _kind(entry, self._settings.bits)):
            entries = list(group)
            if kind is None:
                for name, packed, _ in entries:
                    yield self._noted([name], self._decoded(name, packed))
            elif kind == _LOW_RANK:
                tensors = [packed for _, packed, _ in entries if isinstance(packed, LowRankTensor)]
                own_pages = entries[0][0] in self._apart
                linear = LowRankLinear(tensors, self._settings, self._workers, self._kernel, own_pages)
                yield self._noted([name for name, _, _ in entries], linear)
            else:
                yield self._noted([name for name, _, _ in entries], self._laid_out(entries))

    def _read(self, name: str) -> tuple[Stored | None, Lowered | None]:
        if self._kinds[name] != "packed":
            return None, None
        packed = self._store.read_stored(name, check_hashes=True)
        if self._settings.bits == 16 or isinstance(packed, LowRankTensor):
            return packed, None
        return packed, lower(packed)

    def _decoded(self, name: str, packed: Stored | None) -> DenseLinear | DecodedLinear | DecodedLowRank:
        """Return a matrix that is multiplied in float32."""
        if packed is None:
            return self._kept(name)
        if isinstance(packed, LowRankTensor):
            return DecodedLowRank(packed, self._workers)
        return DecodedLinear(packed, self._workers)

    def _laid_out(self, entries: Sequence[Entry]) -> PackedLinear | ScaledLinear:
        lowered = [entry for _, _, entry in entries if entry is not None]
        tensors = [packed for _, packed, _ in entries if isinstance(packed, PackedTensor)]
        matrix = prepack_rows(
            [entry.part for entry in lowered],
            lowered[0].block,
            tensors[0].shape[1],
            plane_weights=lowered[0].plane_weights,
            kernel=self._kernel,
            own_pages=entries[0][0] in self._apart,
        )
        listed, row = [], 0
        for packed in tensors:
            if packed.listed_index.size:
                listed.append((row, _differences(packed)))
            row += packed.shape[0]
        linear = PackedLinear(matrix, listed, self._settings, self._workers)
        in_scale = tensors[0].in_scale
        return linear if in_scale is None else ScaledLinear(linear, in_scale)

    def _kept(self, name: str) -> DenseLinear:
        if name in self._tables:
            table = self._tables[name]
            assert isinstance(table, DenseLinear)
            return table
        parts = self._store.plain_rows(name)
        # In memory of its own, whose pages are large: from a file's, a product takes a third longer.
        dtype = np.uint16 if parts[0].dtype == "BF16" else np.float32
        found = np.empty((sum(len(part.bits) for part in parts), parts[0].shape[1]), dtype)
        row = 0
        for part in parts:
            for run in in_runs(part.bits):
                found[row : row + len(run)] = _values(Weight(run, part.dtype))
                row += len(run)
        return DenseLinear(found, self._workers)

    def _noted(self, names: Sequence[str], linear: _Matrix) -> Linear:
        with self._lock:
            self.paths |= dict.fromkeys(names, linear.path)
            self.nbytes += 0 if names[0] in self._apart else linear.nbytes
        return linear


class _InFiles:
    """A table that lies in the store's files. What its rows took of them is let go of, so that memory does not grow."""

    def __init__(self, table: Embedding, mapped: Sequence[NDArray[Any]]) -> None:
        self._table, self._mapped, self._calls = table, mapped, 0
        self._let_go()

    def rows_of(self, ids: NDArray[np.int64]) -> Floats:
        """Return the vectors of these tokens, (n, hidden), in a new array."""
        found = self._table.rows_of(ids)
        self._calls += 1
        if len(ids) > 1 or self._calls % _TOKENS_MAPPED == 0:
            self._let_go()
        return found

    def _let_go(self) -> None:
        for values in self._mapped:
            let_go(values)


def _values(weight: Weight) -> NDArray[Any]:
    """Return what products read of kept weights: bfloat16 patterns as they are, others as float32."""
    return weight.bits if weight.dtype == "BF16" else weight.float32()


def store_config(store: Store, assets: Mapping[str, bytes]) -> ModelConfig:
    """Return a finished store's config checked, with the names and the output head that its tensors have.

    Raises UnsupportedModelError, ConfigError, or StoreError where the store is not finished.
    """

    def same(one: str, other: str) -> bool:
        first, second = store.complete_attributes(one), store.complete_attributes(other)
        # Of what the checkpoint had: the two may be packed with different settings.
        sources = [attributes.get("fingerprint") for attributes in (first, second)]
        keys = [(found.get("content"), found.get("dtype")) for found in sources if isinstance(found, dict)]
        return keys[0] == keys[1] if len(keys) == 2 else bool(first["hashes"] == second["hashes"])

    _check_complete(store)
    raw = store.attributes.get("config")
    config = parse(raw if isinstance(raw, dict) else json.loads(assets.get("config.json", b"{}")))
    names = store.tensors()
    return settle(config, _Shapes(store, names), same)


class _Shapes(Mapping[str, tuple[int, ...]]):
    """The shapes of a store's tensors, read when they are asked for: each is in a file of its own."""

    def __init__(self, store: Store, names: Mapping[str, str]) -> None:
        self._store, self._names = store, names

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self._names:
            raise KeyError(name)
        return self._store.shape(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_complete(store: Store) -> None:
    if store.attributes["status"] != "complete":
        raise StoreError(f"{store.url}: not complete; run the same `bincompress compress` again to finish it")


def _kind(entry: Entry, bits: int) -> object:
    """Return what neighbours have to share to be laid out as one matrix; None where a tensor is multiplied in float32.

    bits: of the activations.
    """
    name, packed, lowered = entry
    if isinstance(packed, LowRankTensor):
        return None if bits == 16 else _LOW_RANK
    if lowered is None or packed is None:
        return None
    return lowered.kind if packed.in_scale is None else name


def _differences(packed: PackedTensor) -> Listed:
    """Return what the listed weights of a matrix are above what its planes say."""
    rows, cols = np.divmod(packed.listed_index.astype(np.int64), packed.shape[1])
    difference = np.empty(rows.size, np.float32)
    bare = replace(packed, listed_index=np.empty(0, np.uint64), listed_value=np.empty(0, np.float32), in_scale=None)
    values = packed.listed_value if packed.in_scale is None else packed.listed_value / packed.in_scale[cols]
    start = 0
    while start < rows.size:
        first = int(rows[start])
        stop = int(np.searchsorted(rows, first + _ROWS_AT_ONCE))
        decoded = dequantize(bare, slice(first, int(rows[stop - 1]) + 1))
        difference[start:stop] = values[start:stop] - decoded[rows[start:stop] - first, cols[start:stop]]
        start = stop
    return Listed(rows, cols, difference)
