"""How is a store read? Attributes, arrays and assets, each held against its hash and the format."""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import DamagedError, StoreError
from bincompress.process.faults import hinders
from bincompress.sources.assets import is_plain
from bincompress.sources.checkpoint import ITEM_BYTES, OTHER_DTYPES
from bincompress.store.arrays import first_not_finite, in_runs, map_array, map_parts, read_array
from bincompress.store.files import Files, LocalFiles, is_local
from bincompress.store.layout import (
    LAID_OUT,
    LOW_RANK_VERSION,
    NODES,
    SEAL,
    ArrayLayout,
    array_hash,
    check_format,
    parse_array,
    parse_layout,
    parse_node,
    rows_hash,
    seal_problem,
)
from bincompress.store.location import files_at
from bincompress.store.pack_files import PackFiles, names_a_pack, store_files
from bincompress.store.report import LARGEST_WHOLE, report_problem
from bincompress.tensors.forms import ARRAYS, Stored, always, assemble, is_low_rank
from bincompress.tensors.packed import PackedTensor
from bincompress.tensors.weight import DTYPE_NAMES, Weight

if TYPE_CHECKING:
    import zarr

_UNREADABLE = (ArithmeticError, KeyError, MemoryError, OSError, TypeError, ValueError, RuntimeError, AttributeError)

_SLASH = "%2F"  # in names of assets that lie in a folder: an array has no folders


class StoreReader:
    """A store, open for reading."""

    def __init__(self, url: str, attributes: dict[str, Any], trusting: bool = True, files: Files | None = None) -> None:
        """trusting: whether what a finished store says of its tensors in one place stands for what each says.

        files: where they are known; those of a folder, or below a URL, if not given.
        """
        self.url = url
        self._trusting = trusting
        self.attributes = attributes  # the root's: format, version, source, config, recipe, tensors, status, failures
        self.files = files_at(url) if files is None else files
        self._complete: dict[str, dict[str, Any]] = {}  # Zarr metadata of complete tensors, which does not change

    @property
    def root(self) -> "zarr.Group":
        """The store as a zarr group."""
        from bincompress.store.zarr_access import open_root

        return open_root(self.url, isinstance(self.files, PackFiles))

    def tensors(self) -> dict[str, str]:
        """Return the planned tensors by name: "packed" or "plain"."""
        return dict(self.attributes["tensors"])

    @property
    def _finished(self) -> bool:
        """Whether nobody is writing: what was listed or read once holds."""
        return self.attributes.get("status") == "complete" and "run_id" not in self.attributes

    # Attributes

    def node_of(self, path: str) -> dict[str, Any]:
        """Return a node's Zarr metadata; empty where there is none."""
        content = self.files.read(f"{path}/zarr.json")
        return {} if content is None else self._parsed(path, content)

    def _parsed(self, path: str, content: bytes) -> dict[str, Any]:
        try:
            return parse_node(content)
        except (ValueError, RecursionError):
            raise DamagedError(f"{self.url}: {path}: zarr.json is not readable") from None

    @cached_property
    def _finished_nodes(self) -> dict[str, Any]:
        """What a finished store behind a URL says of all its tensors in one object: their attributes by name."""
        found = self.node_of(NODES).get("attributes", {}).get("tensors")
        return found if isinstance(found, dict) else {}

    def node_attributes(self, name: str) -> dict[str, Any]:
        """Return a tensor's attributes; empty where nothing of it is there."""
        return dict(self._tensor_node(name).get("attributes", {}))

    def _tensor_node(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        if not self.files.near and self._finished and self._trusting:
            known = self._finished_nodes.get(name)
            if isinstance(known, dict):
                return {"attributes": known}
        return self.node_of(path)

    def all_attributes(self) -> dict[str, dict[str, Any]]:
        """Return the attributes of all tensors as their own metadata says, read at once."""
        paths = {name: self._path(name) for name in self.tensors()}
        contents = self.files.read_many([f"{path}/zarr.json" for path in paths.values()])
        return {
            name: {} if content is None else dict(self._parsed(path, content).get("attributes", {}))
            for (name, path), content in zip(paths.items(), contents, strict=True)
        }

    def _path(self, name: str) -> str:
        kinds = self.attributes["tensors"]
        if name not in kinds:
            raise StoreError(f"{self.url}: no tensor {name!r}; `bincompress inspect {self.url}` lists those there are")
        return f"{'tensors' if kinds[name] == 'packed' else 'plain'}/{name}"

    def read_log(self, name: str) -> dict[str, Any]:
        """Return what `write_log` wrote; empty where it did not."""
        return dict(self.node_of(f"log/{name}").get("attributes", {}))

    def complete_attributes(self, name: str) -> dict[str, Any]:
        """Return a complete tensor's attributes; raises StoreError where it is not complete."""
        attributes: dict[str, Any] = self.complete_node(name)["attributes"]
        return dict(attributes)

    def complete_node(self, name: str) -> dict[str, Any]:
        """Return a complete tensor's Zarr metadata, or of it what the store says of all; raises StoreError."""
        if name in self._complete:
            return self._complete[name]
        node = self._tensor_node(name)
        attributes = node.get("attributes")
        if not isinstance(attributes, dict) or attributes.get("status") != "complete":
            raise StoreError(
                f"{self.url}: {name} is not complete; run the same `bincompress compress` again to finish it"
            )
        self._complete[name] = node
        return node

    def forget(self, names: Iterable[str]) -> None:
        """Let go of what is remembered of some tensors' metadata; it is read again when it is needed."""
        for name in names:
            self._complete.pop(name, None)

    def hashes(self, name: str) -> dict[str, str]:
        """Return the hashes of a complete tensor's arrays by their names; empty where there are none."""
        found = self.complete_attributes(name).get("hashes")
        return found if isinstance(found, dict) else {}

    def check_attributes(self, name: str) -> None:
        """Raise DamagedError where a tensor's attributes are not those under their hash, or have lost it.

        A store of an earlier version has none (`verify.unsealed`).
        """
        attributes = self.complete_attributes(name)
        problem = seal_problem(name, attributes)
        if not problem and SEAL in self.attributes and SEAL not in attributes:
            problem = "its attributes have lost their hash"
        if problem:
            raise DamagedError(f"{self.url}: {name}: {problem}")

    def report(self, name: str) -> dict[str, Any]:
        """Return what a complete tensor's attributes say of its bits and errors; raises DamagedError if not that."""
        report = self.complete_attributes(name).get("report")
        problem = report_problem(report)
        if problem:
            self.check_attributes(name)  # says it better, where the attributes were changed
            raise DamagedError(f"{self.url}: {name}: {problem}")
        return dict(report or {})

    def stored_bytes(self, name: str) -> int:
        """Return the bytes of a complete tensor's arrays, as its report says; raises DamagedError if it does not.

        The rest of the report, which nothing but a table shows, is not looked at: loading asks for every tensor.
        """
        report = self.complete_attributes(name).get("report")
        found = report.get("stored_bytes") if isinstance(report, dict) else None
        return found if type(found) is int and 0 <= found <= LARGEST_WHOLE else int(self.report(name)["stored_bytes"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a complete tensor."""
        if self.attributes["tensors"][name] != "packed":
            return self._layout(name, self._path(name)).shape
        sizes = self.complete_attributes(name).get("shape")
        if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
            raise DamagedError(f"{self.url}: {name}: shape: {sizes!r:.40}; expected a list of whole numbers")
        return tuple(sizes)

    # Arrays

    def read_packed(
        self, name: str, check_hashes: bool = False, arrays: Mapping[str, NDArray[Any]] | None = None
    ) -> PackedTensor:
        """Map or read a tensor of planes and coefficients, as `read_stored`.

        Raises StoreError for one in another form: who knows the formula of planes alone cannot take it.
        """
        found = self.read_stored(name, check_hashes, arrays)
        if isinstance(found, PackedTensor):
            return found
        raise StoreError(
            f"{self.url}: {name}: is stored in low-rank form, and planes are needed here; compress the model with "
            "another method"
        )

    def read_stored(
        self, name: str, check_hashes: bool = False, arrays: Mapping[str, NDArray[Any]] | None = None
    ) -> Stored:
        """Map or read a packed tensor and check that its arrays fit together; raises DamagedError naming it.

        check_hashes: hold the arrays' bytes and the attributes against their hashes, too. arrays: those that were read
        already, and are not read again.
        """
        attributes = self.complete_attributes(name)
        if is_low_rank(attributes) and self.attributes.get("version") != LOW_RANK_VERSION:
            raise DamagedError(
                f"{self.url}: {name}: has the low-rank form, which a store of version "
                f"{self.attributes.get('version')!r:.40} cannot have; expected version {LOW_RANK_VERSION}"
            )
        arrays = arrays or {key: self._read(name, key) for key in self._keys(name)}
        if check_hashes:
            for key, values in arrays.items():
                self._check_hash(name, key, values)
        try:
            packed = assemble(attributes, arrays)
        except (KeyError, TypeError, OverflowError) as error:
            raise DamagedError(f"{self.url}: {name}: attributes are not those of a packed tensor ({error!r})") from None
        except ValueError as error:
            raise DamagedError(f"{self.url}: {name}: {error}") from None
        if check_hashes:
            self.check_attributes(name)
        return packed

    def read_plain(
        self, name: str, check_hashes: bool = False, arrays: Mapping[str, NDArray[Any]] | None = None
    ) -> tuple[Weight, tuple[int, ...]]:
        """Map or read a tensor that was kept as it is, with its shape; the rest is as for a packed one.

        With it, a value that is not finite is refused by name, too: earlier versions wrote such tensors.
        """
        attributes = self.complete_attributes(name)
        values = arrays["array"] if arrays else self._read(name, "array")
        names = {stored: dtype for dtype, stored in DTYPE_NAMES.items()}
        dtype = names.get(str(attributes.get("dtype")), "")
        if not dtype or values.dtype != np.dtype(OTHER_DTYPES.get(dtype, np.float32 if dtype == "F32" else np.uint16)):
            raise DamagedError(
                f"{self.url}: {name}: holds {values.dtype}, its attributes say {attributes.get('dtype')!r}"
            )
        bits = values.view(np.uint32) if dtype == "F32" else values
        rows = int(np.prod(values.shape[:-1]))
        weight = Weight(bits.reshape(rows, values.shape[-1] if values.ndim else 1), dtype)
        if check_hashes:
            self._check_hash(name, "array", values)
            self.check_attributes(name)
            problem = not_finite(weight, values.shape)
            if problem:
                raise StoreError(f"{self.url}: {name}: {problem}; compress a sound checkpoint")
        return weight, values.shape

    def plain_rows(self, name: str) -> list[Weight]:
        """Map a matrix that was kept as it is in runs of rows, checked as by `read_plain`; read it where it cannot be.

        Of what is mapped nothing is in memory until it is used.
        """
        path = self._path(name)
        parts = map_parts(self.files, path, self._layout(name, path))
        if parts is None or rows_hash(run for part in parts for run in in_runs(part)) != self.hashes(name).get("array"):
            return [self.read_plain(name, check_hashes=True)[0]]  # which says what is wrong
        self.check_attributes(name)
        found = [self.read_plain(name, arrays={"array": part})[0] for part in parts]
        if any(not_finite(Weight(run, one.dtype), run.shape) for one in found for run in in_runs(one.bits)):
            self.read_plain(name, check_hashes=True)
        return found

    def read_part(self, name: str, key: str) -> NDArray[Any] | None:
        """Map or read one array of a packed tensor, held against its hash; None where the tensor has none of it."""
        if key not in self.hashes(name):
            return None
        values = self._read(name, key)
        self._check_hash(name, key, values)
        return values

    def listed(self, name: str) -> int:
        """Return how many weights of a packed tensor are listed; raises DamagedError."""
        key = "listed_index"
        if key not in self.hashes(name):
            return 0
        return math.prod(self._layout(name, f"{self._path(name)}/{key}", key).shape)

    def stored_arrays(self, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
        """Read the arrays of a tensor, checksums included, and yield them by the name of their hash."""
        for key in self._keys(name):
            yield key, self._read(name, key, mapped=False)

    def _keys(self, name: str) -> list[str]:
        """Return the names of a tensor's arrays, as its hashes have them."""
        if self.attributes["tensors"][name] != "packed":
            return ["array"]
        hashes, needed = self.hashes(name), always(self.complete_attributes(name))
        return [key for key in ARRAYS if key in needed or key in hashes]

    def _check_hash(self, name: str, key: str, values: NDArray[Any]) -> None:
        if array_hash(values) != self.hashes(name).get(key):
            raise DamagedError(f"{self.url}: {name}: {key}: its bytes are not those that were written")

    def _read(self, name: str, key: str, mapped: bool = True) -> NDArray[Any]:
        """Return an array: mapped, read-only and unchecked, where it is one uncompressed chunk of a local file."""
        path = self._path(name) if key == "array" else f"{self._path(name)}/{key}"
        return self._read_at(name, key, path, self._layout(name, path, key), mapped)

    def _read_at(self, name: str, key: str, path: str, layout: ArrayLayout, mapped: bool = True) -> NDArray[Any]:
        try:
            found = map_array(self.files, path, layout) if mapped else None
            return read_array(self.files, path, layout, self._size) if found is None else found
        except _UNREADABLE as error:
            if hinders(error):
                raise
            raise DamagedError(f"{self.url}: {name}: array {key} cannot be read: {_cause(error)}") from None

    def _layout(self, name: str, path: str, key: str = "array") -> ArrayLayout:
        """Return how an array lies in its files: as its metadata says, or, behind a URL, its tensor's attributes."""
        attributes = self.complete_attributes(name)
        seal = attributes.get(SEAL)
        arrays = seal.get("arrays") if isinstance(seal, dict) else None
        known = arrays.get(key) if isinstance(arrays, dict) else None
        try:
            if not self.files.near and known is not None and self._trusting:
                return parse_layout(known)
            node = self._complete[name] if "shape" in self._complete[name] else self.node_of(path)
            if not node:
                raise ValueError("its zarr.json is missing")
            layout = parse_array(node)
            if known is not None and layout != parse_layout(known):
                raise ValueError("its zarr.json is not the one that was written")
        except _UNREADABLE as error:
            if hinders(error):
                raise
            raise DamagedError(f"{self.url}: {name}: array {key} cannot be read: {_cause(error)}") from None
        return layout

    @cached_property
    def _listed(self) -> dict[str, int] | None:
        try:
            return self.files.sizes()
        except PermissionError:  # who may read a store may not always list it
            return None

    def _size(self, key: str) -> int | None:
        if self.files.near or not self._finished or self._listed is None:
            return self.files.size(key)
        return self._listed.get(key)

    # Assets

    def read_assets(self) -> dict[str, bytes]:
        """Return the model's small files by name; raises DamagedError where one differs from what was written."""
        found = {}
        names = self._asset_names()
        for name, content in zip(
            names, self.files.read_many([f"{asset_path(n)}/zarr.json" for n in names]), strict=True
        ):
            path = asset_path(name)
            if not is_plain(name):
                raise DamagedError(f"{self.url}: {path}: expected the name of a file beside a model's weights")
            node = self._parsed(path, content or b"")
            try:
                layout = parse_array(node)
            except _UNREADABLE as error:
                if hinders(error):
                    raise
                raise DamagedError(f"{self.url}: {path}: array {name} cannot be read: {_cause(error)}") from None
            values = self._read_at(path, name, path, layout)
            if node.get("attributes", {}).get("hashes") != {"array": array_hash(values)}:
                raise DamagedError(f"{self.url}: {path}: its bytes are not those that were written")
            found[name] = values.tobytes()
        return found

    def _asset_names(self) -> list[str]:
        if isinstance(self.files, LocalFiles):
            paths = (Path(self.url) / "assets").glob("*/zarr.json")
            return sorted(path.parent.name.replace(_SLASH, "/") for path in paths)
        keys = self._listed if self._finished and self._listed is not None else self.files.sizes("assets")
        parts = [key.split("/") for key in keys]
        found = (part[1] for part in parts if len(part) == 3 and part[0] == "assets" and part[2] == "zarr.json")
        return sorted(name.replace(_SLASH, "/") for name in found)

    def total_bytes(self) -> int:
        """Return the bytes of everything in the store: chunks, metadata, assets and logs."""
        return sum(size for key, size in self.files.sizes().items() if not key.startswith(f"{LAID_OUT}/"))


def not_finite(weight: Weight, shape: tuple[int, ...]) -> str:
    """Return what is not finite in a tensor, and where; empty where all of it is."""
    if weight.dtype not in ITEM_BYTES:  # the decoder does not read it
        return ""
    place = first_not_finite(weight.bits, weight.dtype)
    if place is None:
        return ""
    value = Weight(weight.flat[place : place + 1][None], weight.dtype).float32()[0, 0]
    where = ", ".join(map(str, np.unravel_index(place, shape))) if shape else "0"
    return f"{value} at [{where}]; expected finite values"


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__} {error}" if isinstance(error, KeyError | AttributeError | TypeError) else str(error)


def asset_path(name: str) -> str:
    """Return where a small file of the model lies in a store."""
    return f"assets/{name.replace('/', _SLASH)}"


def root_attributes(files: Files) -> dict[str, Any]:
    """Return the attributes of a store's root; raises FileNotFoundError or ValueError where there is no such group."""
    content = files.read("zarr.json")
    if content is None:
        raise FileNotFoundError("it has no zarr.json")
    node = parse_node(content)
    if node.get("zarr_format") != 3 or node.get("node_type") != "group":
        raise ValueError("zarr.json is not a group's")
    return dict(node.get("attributes", {}))


def read_root(url: str) -> tuple[dict[str, Any], Files]:
    """Return the root's attributes of a store, and its files: a folder's, a URL's, or those of one packed file.

    Raises StoreError where there is none or another version wrote it.
    """
    if is_local(url) and not Path(url).exists():
        raise StoreError(f"{url}: no such store; `bincompress compress SOURCE {url}` makes one")
    files = store_files(url)
    return checked_root(url, files), files


def checked_root(url: str, files: Files) -> dict[str, Any]:
    """Return the root's attributes of a store from its files; raises StoreError as `read_root` does."""
    try:
        attributes = root_attributes(files)
    except FileNotFoundError as error:
        if not is_local(url) and names_a_pack(url) and not isinstance(files, PackFiles):
            raise StoreError(f"{url}: not found: no such file, and no store below that name; check the URL") from None
        raise StoreError(f"{url}: not a Zarr v3 store: {error}") from None
    except (KeyError, ValueError, RecursionError) as error:
        raise StoreError(f"{url}: not a Zarr v3 store: {str(error) or type(error).__name__}") from None
    check_format(url, attributes)
    return attributes
