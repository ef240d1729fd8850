"""How does a model lie in a Zarr v3 store, and who opens or begins one? The README's "Store format" says the first.

A tensor is complete once its attributes say so; they are written last, after its arrays. Nothing else marks completion.
A store that is being created says so in its root, until all but its tensors is there.
"""

import logging
from collections.abc import Mapping
from typing import Any

from bincompress.errors import DamagedError, StoreError
from bincompress.store.arrays import let_go
from bincompress.store.files import is_local
from bincompress.store.hub import located
from bincompress.store.layout import FORMAT, MODEL, NODES, VERSION, array_hash, check_format
from bincompress.store.location import files_at
from bincompress.store.reading import checked_root, read_root
from bincompress.store.replace import Place, check_place, clear
from bincompress.store.writing import Store

__all__ = [
    "FORMAT", "VERSION", "Store", "array_hash", "begin_store", "is_local", "let_go", "open_store", "open_to_write",
]  # fmt: skip

_LOG = logging.getLogger(__name__)


def open_store(url: str) -> Store:
    """Open a store for reading, a folder, a URL, one packed file or a Hub id; raises StoreError where there is none."""
    url = located(url)
    attributes, files = read_root(url)
    return Store(url, attributes, files=files)


def open_to_write(url: str, run_id: str) -> Store:
    """Open a store that `begin_store` has made, a folder or a URL; raises StoreError where there is none.

    run_id: of the run that writes it: a store that is no local folder refuses what another run writes.
    """
    files = files_at(url)
    return Store(url, checked_root(url, files), run_id, files)


def begin_store(url: str, plan: Mapping[str, Any], assets: Mapping[str, bytes], run_id: str, overwrite: bool) -> Store:
    """Create a store, or open one that the same plan began; raises StoreError where another plan began it.

    plan: what has to be equal, as JSON; of its source the fingerprint, and not the name. run_id: kept in the root of a
    store that is no local folder, where a later run that takes the store over is noticed at commit. overwrite: a store
    in that place is removed first; what is no part of it stays (`replace`).
    """
    record = {"format": FORMAT, "version": VERSION, **plan}
    extra = {} if is_local(url) else {"run_id": run_id}
    place = check_place(url, MODEL, overwrite)
    if place.state == "store" and not overwrite:
        return _continue(place, url, record, extra, assets)
    clear(place, VERSION)
    store = Store(url, {"format": FORMAT})
    store.create(assets, {**record, **extra, "status": "incomplete", "failures": {}})
    return store


def check_begin(url: str, plan: Mapping[str, Any], overwrite: bool) -> None:
    """Raise StoreError where `begin_store` would, changing nothing."""
    place = check_place(url, MODEL, overwrite)
    if place.state == "store" and not overwrite:
        _check_equal(place, url, {"format": FORMAT, "version": VERSION, **plan})


def _continue(
    place: Place, url: str, record: Mapping[str, Any], extra: dict[str, str], assets: Mapping[str, bytes]
) -> Store:
    found = _check_equal(place, url, record)
    source = record.get("source", {})
    if isinstance(source, dict) and found.get("source", {}).get("id") != source.get("id"):
        _LOG.warning(
            "%s: was begun from a source named %r; this one is named %r and has the same headers and config, so the "
            "run goes on", url, found["source"].get("id"), source.get("id"),
        )  # fmt: skip
    store = Store(url, found)
    # What a finished store says of all its tensors in one object does not hold while they are written.
    stale = [key for key in place.owned if key.endswith(".partial") or key.startswith(f"{NODES}/")]
    if stale:
        place.files.delete(stale)
    if store.refresh_assets(assets):
        _LOG.warning("%s: took over what has changed: %s", url, ", ".join(store.refreshed))
    if extra:
        store.put_attributes({**found, **extra})
    return store


def _check_equal(place: Place, url: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the root's attributes where a plan is the one that began the store; raises StoreError where not."""
    try:
        check_format(url, place.attributes)
    except StoreError as error:
        kind = DamagedError if isinstance(error, DamagedError) else StoreError
        raise kind(f"{error}; nothing was changed (--overwrite replaces a bincompress store)") from None
    difference = difference_of(place.attributes, record)
    if difference:
        raise StoreError(
            f"{url}: was started with other settings: {difference}; use another store, the same settings or --overwrite"
        )
    return place.attributes


def difference_of(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the first setting that differs, with both values; empty if none does.

    Of a source, its fingerprint counts, and its revision where both have one: a folder may be renamed.
    """
    theirs, own = found.get("source"), wanted.get("source")
    if isinstance(theirs, dict) and isinstance(own, dict):
        own = {**own, "id": theirs.get("id")}
        if not own.get("revision") or not theirs.get("revision"):
            own["revision"] = theirs.get("revision")
        wanted = {**wanted, "source": own}
    return _difference(found, wanted)


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> str:
    for key, value in wanted.items():
        name, other = f"{where}{key}", found.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            inner = _difference(other, value, f"{name}.") or _difference(value, other, f"{name}.")
            if inner:
                return inner
        elif value != other:
            return f"{name} is {other!r:.60} there and {value!r:.60} now"
    return ""
