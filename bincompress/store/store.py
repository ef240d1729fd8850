"""How does a model lie in a Zarr v3 store? The README's "Store format" says it; this file does it.

A tensor is complete once its attributes say so; they are written last, after its arrays. Nothing else marks completion.
"""

import contextlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bincompress.errors import DamagedError, StoreError
from bincompress.faults import hinders
from bincompress.records import Binarized, Weight
from bincompress.tensors.packed import Packed, assemble

if TYPE_CHECKING:
    import zarr

    from bincompress.store.zarr_access import ZarrAccess

FORMAT = "bincompress"
VERSION = 1
_CHECKSUM_BYTES = 4  # of crc32c, behind the data
_ALWAYS = ("planes", "coef")  # arrays of every packed tensor
_ARRAYS = (*_ALWAYS, "column_planes", "in_scale", "listed_index", "listed_value")
_PLAIN_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def is_local(url: str) -> bool:
    """Return whether a store's name is a path of this machine."""
    return "://" not in url


class Store:
    """A bincompress store, open for reading or writing.

    Importing zarr takes longer than loading a small model, so zarr is used only to write and to read what is not an
    uncompressed array in a local folder.
    """

    def __init__(self, url: str, attributes: dict[str, Any]) -> None:
        self.url = url
        self.attributes = attributes  # the root's: format, version, source, config, recipe, tensors, status, failures
        self._complete: dict[str, dict[str, Any]] = {}  # Zarr metadata of complete tensors, which does not change

    @cached_property
    def _access(self) -> "ZarrAccess":
        from bincompress.store.zarr_access import ZarrAccess

        return ZarrAccess(self.url)

    @property
    def root(self) -> "zarr.Group":
        """The store as a zarr group."""
        return self._access.root

    def tensors(self) -> dict[str, str]:
        """Return the planned tensors by name: "packed" or "plain"."""
        return dict(self.attributes["tensors"])

    # Tensors

    def _node(self, path: str) -> dict[str, Any]:
        """Return a node's Zarr metadata; empty where there is none."""
        # Read straight: opening a node through zarr takes a millisecond, and loading a model opens hundreds.
        if is_local(self.url):
            try:
                with open(f"{self.url}/{path}/zarr.json", "rb", buffering=0) as file:
                    content = file.read()
            except (FileNotFoundError, NotADirectoryError):
                return {}
        else:
            found = self._access.read(f"{path}/zarr.json")
            if found is None:
                return {}
            content = found
        try:
            return _checked_node(json.loads(content))
        except (ValueError, RecursionError):
            raise DamagedError(f"{self.url}: {path}: zarr.json is not readable") from None

    def node_attributes(self, name: str) -> dict[str, Any]:
        """Return a tensor's attributes; empty where nothing of it is there."""
        return dict(self._node(self._path(name)).get("attributes", {}))

    def _path(self, name: str) -> str:
        kinds = self.attributes["tensors"]
        if name not in kinds:
            raise StoreError(f"{self.url}: no tensor {name!r}; `bincompress inspect {self.url}` lists those there are")
        return f"{'tensors' if kinds[name] == 'packed' else 'plain'}/{name}"

    def remove(self, name: str) -> None:
        """Remove what a broken run left of a tensor."""
        self._complete.pop(name, None)
        self._access.remove(self._path(name))

    def write_packed(self, name: str, found: Binarized, archive: bool) -> tuple[dict[str, str], int]:
        """Write a packed tensor's arrays; returns their hashes and stored bytes. `commit` makes it count."""
        arrays: dict[str, NDArray[Any]] = {"planes": found.planes, "coef": found.coef}
        if found.column_planes.size:
            arrays["column_planes"] = found.column_planes
        if found.in_scale is not None:
            arrays["in_scale"] = found.in_scale
        if found.listed_index.size:
            arrays |= {"listed_index": found.listed_index, "listed_value": found.listed_value}
        self.remove(name)
        path = self._path(name)
        stored = self._access.write_arrays({f"{path}/{key}": values for key, values in arrays.items()}, archive)
        return {key: array_hash(values) for key, values in arrays.items()}, stored

    def write_plain(
        self, name: str, weight: Weight, shape: tuple[int, ...], archive: bool
    ) -> tuple[dict[str, str], int]:
        """Write a tensor as it is; returns its hash and stored bytes. `commit` makes it count."""
        values = weight.bits.reshape(shape)
        if weight.dtype == "F32":
            values = values.view(np.float32)
        self.remove(name)
        stored = self._access.write_arrays({self._path(name): values}, archive)
        return {"array": array_hash(values)}, stored

    def total_bytes(self) -> int:
        """Return the bytes of everything in the store: chunks, metadata, assets and logs."""
        return self._access.total_bytes()

    def commit(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Mark a tensor complete: its arrays are there, and these are its attributes."""
        complete = {**attributes, "status": "complete"}
        if self.tensors()[name] == "packed":
            self._access.put_group(self._path(name), complete)
        else:
            self._access.put_attributes(self._path(name), complete)

    def write_log(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Write what differs between equal runs (times), outside the bytes that a run determines."""
        self._access.put_group(f"log/{name}", attributes)

    def read_log(self, name: str) -> dict[str, Any]:
        """Return what `write_log` wrote; empty where it did not."""
        return dict(self._node(f"log/{name}").get("attributes", {}))

    def complete_attributes(self, name: str) -> dict[str, Any]:
        """Return a complete tensor's attributes; raises StoreError where it is not complete."""
        attributes: dict[str, Any] = self._complete_node(name)["attributes"]
        return attributes

    def _complete_node(self, name: str) -> dict[str, Any]:
        if name in self._complete:
            return self._complete[name]
        node = self._node(self._path(name))
        attributes = node.get("attributes")
        if not isinstance(attributes, dict) or attributes.get("status") != "complete":
            raise StoreError(
                f"{self.url}: {name} is not complete; run the same `bincompress compress` again to finish it"
            )
        self._complete[name] = node
        return node

    def hashes(self, name: str) -> dict[str, str]:
        """Return the hashes of a complete tensor's arrays by their names; empty where there are none."""
        found = self.complete_attributes(name).get("hashes")
        return found if isinstance(found, dict) else {}

    def read_packed(self, name: str, check_hashes: bool = False) -> Packed:
        """Map or read a packed tensor and check that its arrays fit together; raises DamagedError naming it.

        check_hashes: hold the arrays' bytes against the hashes in the attributes, too.
        """
        attributes = self.complete_attributes(name)
        path = self._path(name)
        hashes = self.hashes(name)
        arrays = {key: self._read(name, f"{path}/{key}") for key in _ARRAYS if key in _ALWAYS or key in hashes}
        if check_hashes:
            for key, values in arrays.items():
                self._check_hash(name, key, values, hashes)
        try:
            return assemble(attributes, arrays)
        except (KeyError, TypeError, OverflowError) as error:
            raise DamagedError(f"{self.url}: {name}: attributes are not those of a packed tensor ({error!r})") from None
        except ValueError as error:
            raise DamagedError(f"{self.url}: {name}: {error}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a complete tensor."""
        node = self._complete_node(name)
        sizes = (node["attributes"] if self.attributes["tensors"][name] == "packed" else node).get("shape")
        if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
            raise DamagedError(f"{self.url}: {name}: shape: {sizes!r:.40}; expected a list of whole numbers")
        return tuple(sizes)

    def read_plain(self, name: str, check_hashes: bool = False) -> tuple[Weight, tuple[int, ...]]:
        """Map or read a tensor that was kept as it is, with its shape; `check_hashes` as for a packed one."""
        node = self._complete_node(name)
        attributes = node["attributes"]
        values = self._read(name, self._path(name), node)
        if check_hashes:
            self._check_hash(name, "array", values, self.hashes(name))
        names = {stored: dtype for dtype, stored in _PLAIN_DTYPES.items()}
        dtype = names.get(str(attributes.get("dtype")))
        if dtype is None or values.dtype != (np.float32 if dtype == "F32" else np.uint16):
            raise DamagedError(
                f"{self.url}: {name}: holds {values.dtype}, its attributes say {attributes.get('dtype')!r}"
            )
        bits = values.view(np.uint32) if dtype == "F32" else values
        rows = int(np.prod(values.shape[:-1]))
        return Weight(bits.reshape(rows, values.shape[-1] if values.ndim else 1), dtype), values.shape

    def _check_hash(self, name: str, key: str, values: NDArray[Any], hashes: Mapping[str, str]) -> None:
        if array_hash(values) != hashes.get(key):
            raise DamagedError(f"{self.url}: {name}: {key}: its bytes are not those that were written")

    def _read(self, name: str, path: str, node: dict[str, Any] | None = None, mapped: bool = True) -> NDArray[Any]:
        """Return an array: mapped, read-only and unchecked, where it is one uncompressed chunk of a local file.

        node: the array's Zarr metadata where it is known.
        """
        try:
            found = self._mapped(path, node or self._node(path)) if mapped else None
            return self._access.read_array(path) if found is None else found
        except (ArithmeticError, KeyError, MemoryError, OSError, TypeError, ValueError, RuntimeError) as error:
            if hinders(error):
                raise
            raise DamagedError(f"{self.url}: {name}: array {path.split('/')[-1]} cannot be read: {error}") from None

    def _mapped(self, path: str, node: dict[str, Any]) -> NDArray[Any] | None:
        if not is_local(self.url) or [codec["name"] for codec in node.get("codecs", [])] != ["bytes", "crc32c"]:
            return None
        shape, dtype = tuple(int(size) for size in node["shape"]), np.dtype(str(node["data_type"])).newbyteorder("<")
        size = math.prod(shape) * dtype.itemsize
        if tuple(node["chunk_grid"]["configuration"]["chunk_shape"]) != shape or not size:
            return None
        # Without Path and np.memmap, which take 0.3 ms an array together.
        with open(f"{self.url}/{path}/c/{'/'.join('0' * len(shape))}", "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size + _CHECKSUM_BYTES:
                raise ValueError(f"{found:,} bytes; expected {size + _CHECKSUM_BYTES:,}")
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype).reshape(shape)

    def stored_arrays(self, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
        """Read the arrays of a tensor, checksums included, and yield them by the name of their hash."""
        if self.tensors()[name] == "plain":
            yield "array", self._read(name, self._path(name), mapped=False)
            return
        hashes = self.hashes(name)
        for key in (key for key in _ARRAYS if key in _ALWAYS or key in hashes):
            yield key, self._read(name, f"{self._path(name)}/{key}", mapped=False)

    # Assets and manifest

    def write_assets(self, assets: Mapping[str, bytes]) -> None:
        """Write the model's small files."""
        self._access.put_group("assets", {})
        arrays = {f"assets/{name}": np.frombuffer(content, np.uint8) for name, content in assets.items()}
        self._access.write_arrays(arrays, archive=False)
        for path, values in arrays.items():
            self._access.put_attributes(path, {"hashes": {"array": array_hash(values)}})

    def read_assets(self) -> dict[str, bytes]:
        """Return the model's small files by name; raises DamagedError where one differs from what was written."""
        found = {}
        for name in self._asset_names():
            values = self._read(f"assets/{name}", f"assets/{name}")
            if self._node(f"assets/{name}").get("attributes", {}).get("hashes") != {"array": array_hash(values)}:
                raise DamagedError(f"{self.url}: assets/{name}: its bytes are not those that were written")
            found[name] = values.tobytes()
        return found

    def _asset_names(self) -> list[str]:
        if not is_local(self.url):
            return self._access.array_names("assets")
        folder = Path(self.url) / "assets"
        return sorted(path.parent.name for path in folder.glob("*/zarr.json"))

    def finish(self, failures: Mapping[str, str]) -> bool:
        """Write the manifest: the store is complete if every planned tensor is."""
        missing = [name for name in self.tensors() if self.node_attributes(name).get("status") != "complete"]
        attributes = {key: value for key, value in self.attributes.items() if key != "run_id"}
        status = "incomplete" if missing or failures else "complete"
        self.put_attributes({**attributes, "failures": dict(failures), "status": status})
        return not missing and not failures

    def create(self, assets: Mapping[str, bytes], attributes: dict[str, Any], overwrite: bool) -> None:
        """Write a new store without tensors; its attributes come last."""
        self._access.create_root(self.attributes, overwrite)
        self.write_assets(assets)
        for name in ("tensors", "plain", "log"):
            self._access.put_group(name, {})
        self.put_attributes(attributes)

    def put_attributes(self, attributes: dict[str, Any]) -> None:
        """Write the root's attributes."""
        self._access.put_attributes("", attributes)
        self.attributes = attributes


def let_go(values: NDArray[Any]) -> None:
    """Let go of the memory of a mapped array, which checking its hash has filled; what is used is read again."""
    owner: Any = values
    while isinstance(owner, np.ndarray):
        owner = owner.base
    mapped = owner.obj if isinstance(owner, memoryview) else None
    # Never of an array in memory, whose contents would be lost; and not every system can.
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def array_hash(values: NDArray[Any]) -> str:
    """Return the xxh3-128 hash of an array's bytes, row-major, little-endian."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def open_store(url: str) -> Store:
    """Open a store for reading; raises StoreError where there is none or another version wrote it."""
    if is_local(url) and not Path(url).is_dir():
        raise StoreError(f"{url}: no such store; `bincompress compress SOURCE {url}` makes one")
    try:
        attributes = _root_attributes(url)
    except (FileNotFoundError, KeyError, ValueError, RecursionError) as error:
        raise StoreError(f"{url}: not a Zarr v3 store: {str(error) or type(error).__name__}") from None
    _check_format(url, attributes)
    return Store(url, attributes)


def _root_attributes(url: str) -> dict[str, Any]:
    if not is_local(url):
        from bincompress.store.zarr_access import open_root

        return dict(open_root(url).attrs)
    path = Path(url) / "zarr.json"
    if not path.is_file():
        raise FileNotFoundError("it has no zarr.json")
    node = _checked_node(json.loads(path.read_bytes()))
    if node.get("zarr_format") != 3 or node.get("node_type") != "group":
        raise ValueError("zarr.json is not a group's")
    return dict(node.get("attributes", {}))


def _checked_node(found: Any) -> dict[str, Any]:
    """Return a node's metadata; raises ValueError where it, or its attributes, are no JSON objects."""
    if not isinstance(found, dict) or not isinstance(found.get("attributes", {}), dict):
        raise ValueError("zarr.json is not a node's")
    return found


def _check_format(url: str, attributes: dict[str, Any]) -> None:
    if attributes.get("format") != FORMAT:
        raise StoreError(f"{url}: a Zarr store, but not of bincompress (format {attributes.get('format')!r})")
    if attributes.get("version") != VERSION:
        raise StoreError(
            f"{url}: store version {attributes.get('version')!r}; this program reads version {VERSION}: "
            "install the one that wrote it, or compress again"
        )
    for key, kind in (("tensors", dict), ("status", str), ("failures", dict)):
        if not isinstance(attributes.get(key), kind):
            raise StoreError(f"{url}: its manifest lacks {key}; compress again with --overwrite")


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
            _root_attributes(url)
            return _continue(url, record, extra)
    store = Store(url, {"format": FORMAT})
    store.create(assets, {**record, **extra, "status": "incomplete", "failures": {}}, overwrite)
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
        store.put_attributes({**store.attributes, **extra})
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
            known = _root_attributes(str(path))
        except (FileNotFoundError, KeyError, ValueError):
            known = {}
        if known.get("format") != FORMAT:
            raise StoreError(f"{path}: not a bincompress store, so --overwrite does not remove it; choose another path")
    shutil.rmtree(path)
