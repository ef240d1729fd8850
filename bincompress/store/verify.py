"""Is every byte of a store what was written, and does it fit the formula?"""

from collections.abc import Iterator

import numpy as np

from bincompress.errors import StoreError
from bincompress.store.store import Store, array_hash
from bincompress.tensors.packed import PackedTensor


def verify(store: Store) -> Iterator[tuple[str, str]]:
    """Yield (name, problem) for every tensor and for the assets; the problem is empty where all is well."""
    for name in sorted(store.tensors()):
        try:
            yield name, _tensor_problem(store, name)
        except StoreError as error:
            yield name, str(error)
    try:
        store.read_assets()
        yield "assets", ""
    except (StoreError, KeyError) as error:
        yield "assets", str(error)


def _tensor_problem(store: Store, name: str) -> str:
    hashes = store.hashes(name)
    for key, values in store.stored_arrays(name):
        if array_hash(values) != hashes.get(key):
            return f"{store.url}: {name}: {key}: its bytes are not those that were written; compress this store again"
    if store.tensors()[name] == "packed":
        return _packed_problem(store.read_packed(name), f"{store.url}: {name}")
    return ""


def _packed_problem(packed: PackedTensor, where: str) -> str:
    cols = packed.shape[1]
    last = [packed.planes[:, :, -1:], packed.column_planes[:, None, -1:]]
    if cols % 64 and any(np.any(words >> np.uint64(cols % 64)) for words in last if words.size):
        return f"{where}: padding bits of a plane are not zero"
    if not np.all(np.isfinite(packed.coef)) or not np.all(np.isfinite(packed.listed_value)):
        return f"{where}: a coefficient is not finite"
    if packed.in_scale is not None and not (np.isfinite(packed.in_scale).all() and np.all(packed.in_scale > 0)):
        return f"{where}: an input scale is not a positive number"
    return ""
