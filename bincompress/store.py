"""How does a model lie in a Zarr v3 store? The README's "Store format" says it; this file does it.

A tensor is complete once its attributes say so; they are written last, after its arrays. Nothing else marks completion.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zarr
import zarr.api.asynchronous
import zarr.storage
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.sync import sync

from bincompress.direct_store import DirectStore, write_one_chunk
from bincompress.errors import DamagedError, StoreError
from bincompress.records import Binarized, Weight

FORMAT = "bincompress"
VERSION = 1
_CHUNK_LIMIT = 256 << 20  # bytes of one chunk file: a larger array is cut by rows, so that no writer holds it twice
_ZSTD_LEVEL = 9
_CHECKSUM_BYTES = 4  # of crc32c, behind the data
_PLAIN_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Packed:
    """A packed tensor as the store has it, its coefficients ready for the formula."""

    planes: NDArray[np.uint64]  # (planes, rows, words)
    coef: NDArray[np.float32]  # (terms, rows or 1, blocks or 1)
    terms: tuple[int, ...]
    block: int
    shape: tuple[int, int]
    listed_index: NDArray[np.uint64]  # flat places of weights kept as they are
    listed_value: NDArray[np.float32]
    attributes: dict[str, Any]


def is_local(url: str) -> bool:
    """Return whether a store's name is a path of this machine."""
    return "://" not in url


def _zarr_store(url: str) -> Any:
    return DirectStore(url) if is_local(url) else zarr.storage.FsspecStore.from_url(url)


class Store:
    """A bincompress store, open for reading or writing."""

    def __init__(self, url: str, root: zarr.Group) -> None:
        self.url = url
        self.root = root

    @property
    def attributes(self) -> dict[str, Any]:
        """The root's attributes: format, version, source, config, recipe, tensors, status, failures."""
        return dict(self.root.attrs)

    def tensors(self) -> dict[str, str]:
        """Return the planned tensors by name: "packed" or "plain"."""
        return dict(self.attributes["tensors"])

    # Tensors

    def _node(self, path: str) -> dict[str, Any]:
        """Return a node's Zarr metadata; empty where there is none."""
        # Read straight: opening a node through zarr takes a millisecond, and loading a model opens hundreds.
        key = f"{self.root.path}/{path}/zarr.json".strip("/")
        if is_local(self.url):
            try:
                content = (Path(self.url) / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return {}
        else:
            found = sync(self.root.store.get(key, default_buffer_prototype()))
            if found is None:
                return {}
            content = found.to_bytes()
        try:
            node = json.loads(content)
        except ValueError:
            raise DamagedError(f"{self.url}: {path}: zarr.json is not readable") from None
        return node if isinstance(node, dict) else {}

    def node_attributes(self, name: str) -> dict[str, Any]:
        """Return a tensor's attributes; empty where nothing of it is there."""
        return dict(self._node(self._path(name)).get("attributes", {}))

    def _path(self, name: str) -> str:
        kinds = self.root.attrs["tensors"]
        if not isinstance(kinds, dict) or name not in kinds:
            raise StoreError(f"{self.url}: no tensor {name!r}; `bincompress inspect {self.url}` lists those there are")
        return f"{'tensors' if kinds[name] == 'packed' else 'plain'}/{name}"

    def remove(self, name: str) -> None:
        """Remove what a broken run left of a tensor."""
        sync(self.root.store.delete_dir(f"{self.root.path}/{self._path(name)}".strip("/")))

    def write_packed(self, name: str, found: Binarized, archive: bool) -> tuple[dict[str, str], int]:
        """Write a packed tensor's arrays; returns their hashes and stored bytes. `commit` makes it count."""
        arrays: dict[str, NDArray[Any]] = {"planes": found.planes, "coef": found.coef}
        if found.listed_index.size:
            arrays |= {"listed_index": found.listed_index, "listed_value": found.listed_value}
        self.remove(name)
        path = self._path(name)
        stored = _write_all(self.root, {f"{path}/{key}": values for key, values in arrays.items()}, archive)
        return {key: array_hash(values) for key, values in arrays.items()}, stored

    def write_plain(
        self, name: str, weight: Weight, shape: tuple[int, ...], archive: bool
    ) -> tuple[dict[str, str], int]:
        """Write a tensor as it is; returns its hash and stored bytes. `commit` makes it count."""
        values = weight.bits.reshape(shape)
        if weight.dtype == "F32":
            values = values.view(np.float32)
        self.remove(name)
        stored = _write_all(self.root, {self._path(name): values}, archive)
        return {"array": array_hash(values)}, stored

    def total_bytes(self) -> int:
        """Return the bytes of everything in the store: chunks, metadata, assets and logs."""
        return int(sync(self.root.store.getsize_prefix("")))

    def commit(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Mark a tensor complete: its arrays are there, and these are its attributes."""
        complete = {**attributes, "status": "complete"}
        if self.tensors()[name] == "packed":
            sync(_put_group(self.root, self._path(name), complete))
        else:
            self.root[self._path(name)].attrs.put(complete)

    def write_log(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Write what differs between equal runs (times), outside the bytes that a run determines."""
        sync(_put_group(self.root, f"log/{name}", attributes))

    def read_log(self, name: str) -> dict[str, Any]:
        """Return what `write_log` wrote; empty where it did not."""
        return dict(self._node(f"log/{name}").get("attributes", {}))

    def complete_attributes(self, name: str) -> dict[str, Any]:
        """Return a complete tensor's attributes; raises StoreError where it is not complete."""
        attributes = self.node_attributes(name)
        if attributes.get("status") != "complete":
            raise StoreError(
                f"{self.url}: {name} is not complete; run the same `bincompress compress` again to finish it"
            )
        return attributes

    def read_packed(self, name: str, check_hashes: bool = False) -> Packed:
        """Map or read a packed tensor and check that its arrays fit together; raises DamagedError naming it.

        check_hashes: hold the arrays' bytes against the hashes in the attributes, too.
        """
        attributes = self.complete_attributes(name)
        path = self._path(name)
        try:
            rows, cols = (int(size) for size in attributes["shape"])
            block, terms = int(attributes["block"]), tuple(int(term) for term in attributes["terms"])
            planes, stored = self._read(name, f"{path}/planes"), self._read(name, f"{path}/coef")
            mix, exponent = attributes["mix"], int(attributes["coef_exponent"])
            listed = "listed_index" in attributes["hashes"]
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{self.url}: {name}: attributes are not those of a packed tensor ({error!r})") from None
        if check_hashes:
            for key, values in (("planes", planes), ("coef", stored)):
                if array_hash(values) != attributes["hashes"].get(key):
                    raise DamagedError(f"{self.url}: {name}: {key}: its bytes are not those that were written")
        units = -(-cols // block) if block > 0 else 0
        if planes.ndim != 3 or planes.shape[1:] != (rows, -(-cols // 64)) or planes.dtype != np.uint64:
            raise DamagedError(
                f"{self.url}: {name}: planes {planes.shape} {planes.dtype} do not fit shape {rows} x {cols}"
            )
        if stored.ndim != 3 or stored.shape[1:] not in ((rows, units), (1, 1)) or stored.dtype.kind != "f":
            raise DamagedError(f"{self.url}: {name}: coef {stored.shape} does not fit {rows} rows of {units} blocks")
        if len(mix or stored) != len(terms) or any(not 0 <= term < 1 << planes.shape[0] for term in terms):
            raise DamagedError(f"{self.url}: {name}: {len(terms)} terms do not fit {planes.shape[0]} planes and coef")
        coef = np.ldexp(stored.astype(np.float32), exponent)
        if mix is not None:
            weights = np.array(mix, np.float32)
            coef = np.stack([sum(w * c for w, c in zip(row, coef, strict=True)) for row in weights]).astype(np.float32)
        index, value = np.empty(0, np.uint64), np.empty(0, np.float32)
        if listed:
            index, value = self._read(name, f"{path}/listed_index"), self._read(name, f"{path}/listed_value")
            if index.shape != value.shape or index.ndim != 1 or (index.size and int(index.max()) >= rows * cols):
                raise DamagedError(f"{self.url}: {name}: listed weights lie outside the matrix")
        return Packed(planes, coef, terms, block, (rows, cols), index, value, attributes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a complete tensor."""
        if self.tensors()[name] == "packed":
            return tuple(int(size) for size in self.complete_attributes(name)["shape"])
        return tuple(int(size) for size in self._node(self._path(name)).get("shape", ()))

    def read_plain(self, name: str) -> tuple[Weight, tuple[int, ...]]:
        """Read a tensor that was kept as it is, with its shape."""
        attributes = self.complete_attributes(name)
        values = self._read(name, self._path(name))
        names = {stored: dtype for dtype, stored in _PLAIN_DTYPES.items()}
        dtype = names.get(str(attributes.get("dtype")))
        if dtype is None or values.dtype != (np.float32 if dtype == "F32" else np.uint16):
            raise DamagedError(
                f"{self.url}: {name}: holds {values.dtype}, its attributes say {attributes.get('dtype')!r}"
            )
        bits = values.view(np.uint32) if dtype == "F32" else values
        rows = int(np.prod(values.shape[:-1]))
        return Weight(bits.reshape(rows, values.shape[-1] if values.ndim else 1), dtype), values.shape

    def _read(self, name: str, path: str, mapped: bool = True) -> NDArray[Any]:
        """Return an array: mapped, read-only and unchecked, where it is one uncompressed chunk of a local file."""
        try:
            found = self._mapped(path) if mapped else None
            return np.asarray(self.root[path][...]) if found is None else found  # type: ignore[index]
        except (KeyError, OSError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedError(f"{self.url}: {name}: array {path.split('/')[-1]} cannot be read: {error}") from None

    def _mapped(self, path: str) -> NDArray[Any] | None:
        node = self._node(path)
        if not is_local(self.url) or [codec["name"] for codec in node.get("codecs", [])] != ["bytes", "crc32c"]:
            return None
        shape, dtype = tuple(int(size) for size in node["shape"]), np.dtype(str(node["data_type"])).newbyteorder("<")
        size = math.prod(shape) * dtype.itemsize
        if tuple(node["chunk_grid"]["configuration"]["chunk_shape"]) != shape or not size:
            return None
        chunk = Path(self.url) / path / "c" / "/".join("0" * len(shape))
        found = chunk.stat().st_size
        if found != size + _CHECKSUM_BYTES:
            raise ValueError(f"{found:,} bytes; expected {size + _CHECKSUM_BYTES:,}")
        return np.asarray(np.memmap(chunk, dtype, "r", shape=shape))

    def stored_arrays(self, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
        """Read the arrays of a tensor, checksums included, and yield them by the name of their hash."""
        if self.tensors()[name] == "plain":
            yield "array", self._read(name, self._path(name), mapped=False)
            return
        for key in self.complete_attributes(name)["hashes"]:
            yield key, self._read(name, f"{self._path(name)}/{key}", mapped=False)

    # Assets and manifest

    def write_assets(self, assets: Mapping[str, bytes]) -> None:
        """Write the model's small files."""
        group = self.root.create_group("assets", overwrite=True)
        arrays = {name: np.frombuffer(content, np.uint8) for name, content in assets.items()}
        _write_all(group, arrays, archive=False)
        for name, values in arrays.items():
            group[name].attrs.put({"hashes": {"array": array_hash(values)}})

    def read_assets(self) -> dict[str, bytes]:
        """Return the model's small files by name; raises DamagedError where one differs from what was written."""
        found = {}
        group = zarr.open_group(self.root.store, path=f"{self.root.path}/assets".strip("/"), mode="r", zarr_format=3)
        for name, array in group.arrays():
            values = self._read(f"assets/{name}", f"assets/{name}")
            if array.attrs.get("hashes") != {"array": array_hash(values)}:
                raise DamagedError(f"{self.url}: assets/{name}: its bytes are not those that were written")
            found[name] = values.tobytes()
        return found

    def finish(self, failures: Mapping[str, str]) -> bool:
        """Write the manifest: the store is complete if every planned tensor is."""
        missing = [name for name in self.tensors() if self.node_attributes(name).get("status") != "complete"]
        attributes = {key: value for key, value in self.attributes.items() if key != "run_id"}
        self.root.attrs.put(
            {**attributes, "failures": dict(failures), "status": "incomplete" if missing or failures else "complete"}
        )
        return not missing and not failures


def array_hash(values: NDArray[Any]) -> str:
    """Return the xxh3-128 hash of an array's bytes, row-major, little-endian."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


async def _put_group(root: zarr.Group, path: str, attributes: Mapping[str, Any]) -> None:
    """Write a group's metadata, whatever was there before, without looking: a third of what creating one costs."""
    metadata = GroupMetadata(attributes=dict(attributes), zarr_format=3)
    for key, content in metadata.to_buffer_dict(default_buffer_prototype()).items():
        await root.store.set(f"{root.path}/{path}/{key}".strip("/"), content)


def _write_all(group: zarr.Group, arrays: Mapping[str, NDArray[Any]], archive: bool) -> int:
    """Write arrays by their paths below a group, one after the other; returns the bytes of their chunks."""
    stored = 0
    others = {}
    folder = group.store.root / group.path if isinstance(group.store, DirectStore) and not archive else None
    for name, values in arrays.items():
        if folder is not None and values.ndim and 0 < values.nbytes <= _CHUNK_LIMIT:
            stored += write_one_chunk(folder / name, values)
        else:
            others[name] = values
    return stored + (sync(_write_with_zarr(group, others, archive)) if others else 0)


async def _write_with_zarr(group: zarr.Group, arrays: Mapping[str, NDArray[Any]], archive: bool) -> int:
    """Write arrays of several chunks, with compression, or into a store that is no local folder."""
    stored = 0
    for name, values in arrays.items():
        path = f"{group.path}/{name}".strip("/")
        axis = 1 if values.ndim == 3 else 0  # the rows
        pieces = max(1, -(-values.nbytes // _CHUNK_LIMIT))
        step = max(1, -(-values.shape[axis] // pieces)) if values.ndim else 1
        array = await zarr.api.asynchronous.create_array(
            group.store,
            name=path,
            shape=values.shape,
            dtype=values.dtype,
            chunks=tuple(step if i == axis else max(1, size) for i, size in enumerate(values.shape)),
            filters=None,
            compressors=[*([ZstdCodec(level=_ZSTD_LEVEL)] if archive else []), Crc32cCodec()],
            # Without this an all-zero plane would have no file, and could not be memory-mapped.
            config={"write_empty_chunks": True},
            zarr_format=3,
        )
        for start in range(0, values.shape[axis] if values.ndim else 1, step):
            part = (slice(None),) * axis + (slice(start, start + step),) if values.ndim else ()
            if values[part].size:
                await array.setitem(part, values[part])
        stored += await group.store.getsize_prefix(f"{path}/c")
    return stored


def open_store(url: str) -> Store:
    """Open a store for reading; raises StoreError where there is none or another version wrote it."""
    if is_local(url) and not Path(url).is_dir():
        raise StoreError(f"{url}: no such store; `bincompress compress SOURCE {url}` makes one")
    try:
        root = zarr.open_group(_zarr_store(url), mode="r+", zarr_format=3)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise StoreError(f"{url}: not a Zarr v3 store: {str(error) or type(error).__name__}") from None
    _check_format(url, dict(root.attrs))
    return Store(url, root)


def _check_format(url: str, attributes: dict[str, Any]) -> None:
    if attributes.get("format") != FORMAT:
        raise StoreError(f"{url}: a Zarr store, but not of bincompress (format {attributes.get('format')!r})")
    if attributes.get("version") != VERSION:
        raise StoreError(
            f"{url}: store version {attributes.get('version')!r}; this program reads version {VERSION}: "
            "install the one that wrote it, or compress again"
        )
    if not isinstance(attributes.get("tensors"), dict):
        raise StoreError(f"{url}: its manifest lacks the list of tensors; compress again with --overwrite")


def begin_store(url: str, plan: Mapping[str, Any], assets: Mapping[str, bytes], run_id: str, overwrite: bool) -> Store:
    """Create a store, or open one that the same plan began; raises StoreError where another plan began it.

    plan: what has to be equal, as JSON. run_id: kept in the root of a store that is no local folder, where a later
    run that takes the store over is noticed at commit.
    """
    record = {"format": FORMAT, "version": VERSION, **plan}
    extra = {} if is_local(url) else {"run_id": run_id}
    if overwrite and is_local(url) and Path(url).exists():
        remove_store(Path(url))
    elif is_local(url) and Path(url).exists() and any(Path(url).iterdir()):
        return _continue(url, record, extra)
    elif not is_local(url) and not overwrite:
        with contextlib.suppress(FileNotFoundError):
            zarr.open_group(_zarr_store(url), mode="r", zarr_format=3)
            return _continue(url, record, extra)
    root = zarr.create_group(_zarr_store(url), zarr_format=3, overwrite=overwrite, attributes={"format": FORMAT})
    store = Store(url, root)
    store.write_assets(assets)
    for name in ("tensors", "plain", "log"):
        root.create_group(name)
    root.attrs.put({**record, **extra, "status": "incomplete", "failures": {}})
    return store


def _continue(url: str, record: dict[str, Any], extra: dict[str, str]) -> Store:
    try:
        store = open_store(url)
    except StoreError as error:
        raise StoreError(f"{error}; nothing was changed (--overwrite replaces a bincompress store)") from None
    difference = _difference(store.attributes, record)
    if difference:
        raise StoreError(
            f"{url}: was begun with other settings: {difference}; use another store, the same settings, or --overwrite"
        )
    if is_local(url):
        for leftover in Path(url).rglob(".*.partial"):
            leftover.unlink()
    if extra:
        store.root.attrs.update(extra)
    return store


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> str:
    """Return the first setting that differs, with both values; empty if none does."""
    for key, value in wanted.items():
        name, other = f"{where}{key}", found.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            inner = _difference(other, value, f"{name}.") or _difference(value, other, f"{name}.")
            if inner:
                return inner
        elif value != other:
            return f"{name} is {other!r:.60} there and {value!r:.60} now"
    return ""


def remove_store(path: Path) -> None:
    """Remove a store to make room for another; refuses a folder that holds anything else."""
    if any(path.iterdir()):
        try:
            known = dict(zarr.open_group(DirectStore(path), mode="r", zarr_format=3).attrs)
        except (FileNotFoundError, KeyError, ValueError):
            known = {}
        if known.get("format") != FORMAT:
            raise StoreError(f"{path}: not a bincompress store, so --overwrite does not remove it; choose another path")
    shutil.rmtree(path)
