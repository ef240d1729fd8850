"""Which model with which numbers? What tells a store and the options that change its numbers from all others."""

import hashlib
import json

from bincompress.store.store import open_store

# Of what attributes say, what does not change with the weights: how they were made, and where their bytes lie.
_ASIDE = ("report", "sealed")


def engine_of(url: str, activation_bits: int, activation_scale: str, kv_bits: int = 16) -> str:
    """Return a hash of a store's content and of these options; a folder and its packed file have the same one.

    The kernel and the number of threads are not in it, as they change no number. Raises StoreError or DamagedError.
    """
    store = open_store(url)
    tensors = {
        name: {key: value for key, value in attributes.items() if key not in _ASIDE}
        for name, attributes in store.all_attributes().items()
    }
    assets = {name: hashlib.sha256(content).hexdigest() for name, content in store.read_assets().items()}
    told = [tensors, store.attributes.get("config"), assets, activation_bits, activation_scale]
    told += [] if kv_bits == 16 else [kv_bits]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
