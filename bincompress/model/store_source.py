"""A store as the decoder's weights: every matrix laid out for this CPU, by the form that it is stored in."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import StoreError
from bincompress.model.config import ModelConfig, parse
from bincompress.model.errors import NotFiniteError
from bincompress.model.layout import settle
from bincompress.model.linear import DenseLinear, Embedding, Floats, KeptEmbedding, Linear
from bincompress.model.low_rank_linear import DecodedLowRank, LowRankEmbedding, LowRankLinear, low_rank_linear
from bincompress.model.mapped_matrices import mapped_matrices
from bincompress.model.matrices import LOW_RANK, Entry, differences, lay_out, runs
from bincompress.model.packed_linear import (
    ActivationSettings,
    DecodedLinear,
    PackedEmbedding,
    PackedLinear,
    ScaledLinear,
    StackedLinear,
)
from bincompress.store.arrays import in_runs
from bincompress.store.store import Store, let_go
from bincompress.tensors.forms import Stored
from bincompress.tensors.low_rank import LowRankTensor
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import Weight
from cpu_kernels.parallel.workers import Workers

_Matrix = PackedLinear | ScaledLinear | LowRankLinear | DecodedLinear | DecodedLowRank | DenseLinear
_TOKENS_MAPPED = 16  # single tokens whose rows of a table stay mapped: a page brings up to 2 MB around it


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
        # notes: what a user should know of how the store is loaded
        self._mapped, self.notes = mapped_matrices(store, settings, workers, kernel, apart)
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
        place = 0
        while place < len(names):
            found = None if self._mapped is None else self._mapped.next_of(names[place:])
            if found is not None:
                yield self._noted(*found)
                place += len(found[0])
                continue
            begin, place = place, place + 1
            while place < len(names) and not (self._mapped is not None and self._mapped.has(names[place:])):
                place += 1
            yield from self._from_planes(names[begin:place])

    def _from_planes(self, names: Sequence[str]) -> Iterator[Linear]:
        for kind, entries in runs([(name, self._read(name)) for name in names], self._settings.bits):
            if kind is None:
                for name, packed, _ in entries:
                    yield self._noted([name], self._decoded(name, packed))
            elif kind == LOW_RANK:
                tensors = [packed for _, packed, _ in entries if isinstance(packed, LowRankTensor)]
                own_pages = entries[0][0] in self._apart
                linear = low_rank_linear(tensors, self._settings, self._workers, self._kernel, own_pages)
                yield self._noted([name for name, _, _ in entries], linear)
            else:
                yield self._noted([name for name, _, _ in entries], self._from_entries(entries))

    def _read(self, name: str) -> Stored | None:
        return self._store.read_stored(name, check_hashes=True) if self._kinds[name] == "packed" else None

    def _decoded(self, name: str, packed: Stored | None) -> DenseLinear | DecodedLinear | DecodedLowRank:
        """Return a matrix that is multiplied in float32."""
        if packed is None:
            return self._kept(name)
        if isinstance(packed, LowRankTensor):
            return DecodedLowRank(packed, self._workers)
        return DecodedLinear(packed, self._workers)

    def _from_entries(self, entries: Sequence[Entry]) -> PackedLinear | ScaledLinear:
        tensors = [packed for _, packed, _ in entries if isinstance(packed, PackedTensor)]
        matrix = lay_out(entries, self._kernel, own_pages=entries[0][0] in self._apart)
        listed, row = [], 0
        for packed in tensors:
            if packed.listed_index.size:
                listed.append((row, differences(packed)))
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
