"""How is a store written? A tensor's arrays first, its attributes last: they say that it is complete."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import DamagedError, StoreError, TensorError
from bincompress.store.arrays import write_array, write_chunks
from bincompress.store.files import Files, is_local
from bincompress.store.layout import (
    MODEL,
    NODES,
    SEAL,
    ArrayLayout,
    array_hash,
    array_node,
    group_node,
    layout_of,
    seal_problem,
    sealed,
)
from bincompress.store.reading import StoreReader, asset_path, not_finite, root_attributes
from bincompress.tensors.forms import Stored
from bincompress.tensors.weight import Weight

_LOG = logging.getLogger(__name__)


def plain_values(weight: Weight, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the array as which a tensor that is kept is stored."""
    values = weight.bits.reshape(shape)
    return values.view(np.float32) if weight.dtype == "F32" else values


class Store(StoreReader):
    """A bincompress store, open for reading or writing."""

    def __init__(
        self, url: str, attributes: dict[str, Any], run_id: str | None = None, files: Files | None = None
    ) -> None:
        super().__init__(url, attributes, files=files)
        self._run_id = run_id
        self.refreshed: list[str] = []  # assets that a continued run has taken over anew
        self._written: dict[str, dict[str, ArrayLayout]] = {}  # arrays of tensors that this process has written
        self._found: dict[str, list[str]] = {}  # keys of tensors that this process has looked at and not yet written

    def look_at(self, name: str) -> dict[str, Any]:
        """Return the attributes that a tensor has before it is written; empty where nothing of it is there.

        Attributes that are not those under their hash count for nothing: the tensor is to be written again.
        """
        if not is_local(self.url):
            path = self._path(name)
            self._found[name] = list(self.files.sizes(path))
            if f"{path}/zarr.json" not in self._found[name]:
                return {}
        found = self.node_attributes(name)
        return {} if seal_problem(name, found) else found

    def remove(self, name: str) -> None:
        """Remove what a broken run left of a tensor; what the format does not write stays."""
        self._complete.pop(name, None)
        path = self._path(name)
        found = self._found.pop(name, None)
        keys = MODEL.owned(self.files.sizes(path) if found is None else found)
        # Its metadata first: without it the tensor is not complete, whatever is still there.
        self.files.delete(sorted(keys, key=lambda key: key != f"{path}/zarr.json"))

    def write_packed(self, name: str, packed: Stored, archive: bool) -> tuple[dict[str, str], int]:
        """Write a packed tensor's arrays; returns their hashes and stored bytes. `commit` makes it count."""
        arrays = packed.arrays()
        self.remove(name)
        path = self._path(name)
        stored = sum(write_array(self.files, f"{path}/{key}", values, archive) for key, values in arrays.items())
        self._written[name] = {key: layout_of(values, archive) for key, values in arrays.items()}
        return {key: array_hash(values) for key, values in arrays.items()}, stored

    def check_plain(self, name: str, weight: Weight, shape: tuple[int, ...], refuse: bool) -> str:
        """Return what is not finite in a tensor that is to be kept, having said so; empty where all of it is.

        refuse: raise TensorError instead.
        """
        problem = not_finite(weight, shape)
        if problem and refuse:
            raise TensorError(f"{name}: {problem} (is the checkpoint damaged?)")
        if problem:
            _LOG.warning(
                "%s: %s; it is kept as it is, and `verify` and whatever loads the store will refuse it", name, problem
            )
        return problem

    def write_plain(
        self, name: str, weight: Weight, shape: tuple[int, ...], archive: bool
    ) -> tuple[dict[str, str], int]:
        """Write a tensor as it is; returns its hash and stored bytes. `commit` makes it count."""
        values = plain_values(weight, shape)
        self.remove(name)
        stored = write_chunks(self.files, self._path(name), values, archive)
        self._written[name] = {"array": layout_of(values, archive)}
        return {"array": array_hash(values)}, stored

    def commit(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Mark a tensor complete: its arrays, which this process wrote, are there, and these are its attributes.

        Raises StoreError where another run has taken the store over; a local one is locked for its run.
        """
        shared = self._run_id is not None and not is_local(self.url)
        if shared and root_attributes(self.files).get("run_id") != self._run_id:
            raise StoreError(f"{name}: another run has taken over {self.url}; wait for it, or use another store")
        layouts = self._written[name]
        records = {key: layout.record() for key, layout in layouts.items()}
        complete = sealed(name, {**attributes, "status": "complete"}, records)
        packed = self.attributes["tensors"][name] == "packed"
        node = group_node(complete) if packed else array_node(layouts["array"], complete)
        self._complete.pop(name, None)
        self.files.write(f"{self._path(name)}/zarr.json", [node])

    def write_log(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Write what differs between equal runs (times), outside the bytes that a run determines."""
        self.files.write(f"log/{name}/zarr.json", [group_node(attributes)])

    def write_assets(self, assets: Mapping[str, bytes]) -> None:
        """Write the model's small files."""
        self.files.write("assets/zarr.json", [group_node({})])
        for name, content in assets.items():
            values = np.frombuffer(content, np.uint8)
            attributes = {"hashes": {"array": array_hash(values)}}
            write_array(self.files, asset_path(name), values, archive=False, attributes=attributes)

    def refresh_assets(self, assets: Mapping[str, bytes]) -> list[str]:
        """Take over the model's small files where they have changed; returns the names of those that had."""
        try:
            found = self.read_assets()
        except DamagedError:
            found = {}
        gone = sorted(set(self._asset_names()) - set(assets))
        changed = {name: content for name, content in assets.items() if found.get(name) != content}
        for name in (*gone, *changed):
            self.files.delete(MODEL.owned(self.files.sizes(asset_path(name))))
        if changed:
            self.write_assets(changed)
        self.refreshed = sorted([*gone, *changed])
        return self.refreshed

    def create(self, assets: Mapping[str, bytes], attributes: dict[str, Any]) -> None:
        """Write a new store without tensors into an empty place; its attributes come last."""
        self.write_assets(assets)
        for name in ("tensors", "plain", "log"):
            self.files.write(f"{name}/zarr.json", [group_node({})])
        self.put_attributes(sealed("", attributes))

    def put_attributes(self, attributes: dict[str, Any]) -> None:
        """Write the root's attributes, under a hash unless an earlier version wrote this store without one."""
        own = sealed("", attributes) if SEAL in attributes else attributes
        self.files.write("zarr.json", [group_node(own)])
        self.attributes = own

    def finish(self, failures: Mapping[str, str]) -> bool:
        """Write the manifest: the store is complete if every planned tensor is."""
        found = self.all_attributes()
        missing = [name for name, attributes in found.items() if attributes.get("status") != "complete"]
        attributes = {key: value for key, value in self.attributes.items() if key != "run_id"}
        complete = not missing and not failures
        if complete and not is_local(self.url):
            self.files.write(f"{NODES}/zarr.json", [group_node({"tensors": found})])
        self.put_attributes(
            {**attributes, "failures": dict(failures), "status": "complete" if complete else "incomplete"}
        )
        return complete
