"""Is every byte of a store what was written, and does it fit the formula?"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bincompress.errors import StoreError
from bincompress.store.files import is_local
from bincompress.store.laid_out import VERSION, LaidOut, forms_in
from bincompress.store.layout import LAID_OUT, MODEL, NODES, SEAL, array_hash
from bincompress.store.pack_files import PackFiles
from bincompress.store.reading import StoreReader, not_finite
from bincompress.tensors.forms import Stored
from bincompress.tensors.low_rank import LowRankTensor

_SHOWN = 3  # names in a message


def verify(store: StoreReader) -> Iterator[tuple[str, str]]:
    """Yield (name, problem) for every tensor, for assets, laid-out matrices and root; empty where all is well.

    Everything is read anew, from each node's own metadata. What no hash covers is in `unsealed`, and no problem.
    """
    own = StoreReader(store.url, store.attributes, trusting=False, files=store.files)
    if isinstance(own.files, PackFiles):
        own.files.nothing_read()
    for name in sorted(own.tensors()):
        try:
            yield name, _tensor_problem(own, name)
        except StoreError as error:
            yield name, str(error)
    try:
        own.read_assets()
        yield "assets", ""
    except (StoreError, KeyError) as error:
        yield "assets", str(error)
    for form in forms_in(own):
        try:
            yield f"{LAID_OUT}/{form}", _laid_out_problem(own, form)
        except StoreError as error:
            yield f"{LAID_OUT}/{form}", str(error)
    try:
        yield "zarr.json", _root_problem(own) or _rest_problem(own)
    except StoreError as error:
        yield "zarr.json", str(error)


def parts(store: StoreReader) -> int:
    """Return how many names `verify` yields."""
    return len(store.tensors()) + len(forms_in(store)) + 2


def _laid_out_problem(store: StoreReader, form: str) -> str:
    found = LaidOut(store, form)
    if found.version != VERSION:
        return f"{store.url}: {LAID_OUT}/{form}: version {found.version!r:.40}; this program can check {VERSION} alone"
    return next(found.problems(), "")


def unsealed(store: StoreReader) -> list[str]:
    """Return the complete tensors whose attributes are under no hash, as those of an earlier version are."""
    found = store.all_attributes()
    return [name for name, node in found.items() if node.get("status") == "complete" and SEAL not in node]


def _root_problem(store: StoreReader) -> str:
    """Return what is wrong with the list of tensors; empty where it is what lies there."""
    tensors = store.tensors()
    if not tensors:
        return f"{store.url}: its root lists no tensors; compress this store again"
    there = set()
    for key in store.files.sizes():
        parts = key.split("/")
        if MODEL.owns(key) and len(parts) > 2 and parts[0] in ("tensors", "plain"):  # else nobody reads it
            there.add((parts[0], parts[1]))
    listed = {("tensors" if kind == "packed" else "plain", name) for name, kind in tensors.items()}
    extra = sorted(name for kind, name in there - listed)
    if extra:
        return f"{store.url}: its root does not list {', '.join(extra[:_SHOWN])}, which lies there"
    for group in MODEL.groups:  # the logs, say, need not have been copied
        node = store.node_of(group)
        if node and not _is_group(node):
            return f"{store.url}: {group}/zarr.json: not the metadata of a Zarr v3 group; other programs refuse it"
    nodes = store.files.read(f"{NODES}/zarr.json")
    if nodes is not None and store.node_of(NODES).get("attributes", {}).get("tensors") != store.all_attributes():
        return f"{store.url}: {NODES} is not what its tensors say; run the same `bincompress compress` again"
    return ""


def _is_group(node: Mapping[str, Any]) -> bool:
    return (node.get("zarr_format"), node.get("node_type")) == (3, "group")


def _rest_problem(store: StoreReader) -> str:
    """Return what is wrong with what no tensor has: of a packed store every entry is under a checksum."""
    return store.files.unread_problem() if isinstance(store.files, PackFiles) else ""


def _tensor_problem(store: StoreReader, name: str) -> str:
    hashes, arrays = store.hashes(name), {}
    for key, values in store.stored_arrays(name):
        if array_hash(values) != hashes.get(key):
            return f"{store.url}: {name}: {key}: its bytes are not those that were written; compress this store again"
        if not is_local(store.url):  # what is here is mapped, which takes no memory
            arrays[key] = values
    if store.tensors()[name] == "packed":
        problem = _packed_problem(store.read_stored(name, arrays=arrays))
    else:
        problem = not_finite(*store.read_plain(name, arrays=arrays))
    store.check_attributes(name)
    if store.tensors()[name] == "packed" and not _is_group(store.complete_node(name)):
        return f"{store.url}: {name}: zarr.json: not the metadata of a Zarr v3 group; other programs refuse it"
    store.report(name)
    return f"{store.url}: {name}: {problem}" if problem else ""


def _packed_problem(packed: Stored) -> str:
    if isinstance(packed, LowRankTensor):
        return packed.problem()
    cols = packed.shape[1]
    last = [packed.planes[:, :, -1:], packed.column_planes[:, None, -1:]]
    if cols % 64 and any(np.any(words >> np.uint64(cols % 64)) for words in last if words.size):
        return "padding bits of a plane are not zero"
    if not np.all(np.isfinite(packed.coef)) or not np.all(np.isfinite(packed.listed_value)):
        return "a coefficient is not finite"
    if packed.in_scale is not None and not (np.isfinite(packed.in_scale).all() and np.all(packed.in_scale > 0)):
        return "an input scale is not a positive number"
    return ""
