"""How does a model lie in a Zarr v3 store, and who opens or begins one? The README's "Store format" says the first.

A tensor is complete once its attributes say so; they are written last, after its arrays. Nothing else marks completion.
A store that is being created says so in its root, until all but its tensors is there.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bincompress.errors import DamagedError, StoreError
from bincompress.store.arrays import let_go
from bincompress.store.files import files_at, is_local
from bincompress.store.layout import FORMAT, MODEL, NODES, VERSION, array_hash, parse_node, seal_problem
from bincompress.store.replace import BEGINNING, Place, check_place, clear
from bincompress.store.writing import Store

__all__ = ["FORMAT", "VERSION", "Store", "array_hash", "begin_store", "is_local", "let_go", "open_store"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")  # of a tensor: it becomes a folder's
_LOG = logging.getLogger(__name__)


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
    """Return the attributes of a store's root; raises FileNotFoundError or ValueError where there is no such group."""
    content = files_at(url).read("zarr.json")
    if content is None:
        raise FileNotFoundError("it has no zarr.json")
    node = parse_node(content)
    if node.get("zarr_format") != 3 or node.get("node_type") != "group":
        raise ValueError("zarr.json is not a group's")
    return dict(node.get("attributes", {}))


def _check_format(url: str, attributes: dict[str, Any]) -> None:
    if attributes.get("format") != FORMAT:
        raise StoreError(f"{url}: a Zarr store, but not of bincompress (format {attributes.get('format')!r})")
    if attributes.get("version") != VERSION:
        raise StoreError(
            f"{url}: store version {attributes.get('version')!r}; this program reads version {VERSION}: "
            "install the one that wrote it, or compress again"
        )
    if attributes.get("status") == BEGINNING:
        raise StoreError(f"{url}: a run ended while it was creating this store; run the same command again")
    for key, kind in (("tensors", dict), ("status", str), ("failures", dict)):
        if not isinstance(attributes.get(key), kind):
            raise StoreError(f"{url}: its manifest lacks {key}; compress again with --overwrite")
    for name, kind in attributes["tensors"].items():
        if kind not in ("packed", "plain") or not _NAME.fullmatch(name) or ".." in name:
            raise StoreError(f"{url}: its manifest lists {name!r:.80} as {kind!r:.40}, which names no tensor")
    problem = seal_problem("", attributes)
    if problem:
        raise DamagedError(f"{url}: zarr.json: {problem}; compress this store again")


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
        return _continue(place, url, record, extra)
    clear(place, VERSION)
    store = Store(url, {"format": FORMAT})
    store.create(assets, {**record, **extra, "status": "incomplete", "failures": {}})
    return store


def check_begin(url: str, plan: Mapping[str, Any], overwrite: bool) -> None:
    """Raise StoreError where `begin_store` would, changing nothing."""
    place = check_place(url, MODEL, overwrite)
    if place.state == "store" and not overwrite:
        _check_equal(place, url, {"format": FORMAT, "version": VERSION, **plan})


def _continue(place: Place, url: str, record: Mapping[str, Any], extra: dict[str, str]) -> Store:
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
    if extra:
        store.put_attributes({**found, **extra})
    return store


def _check_equal(place: Place, url: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the root's attributes where a plan is the one that began the store; raises StoreError where not."""
    try:
        _check_format(url, place.attributes)
    except StoreError as error:
        kind = DamagedError if isinstance(error, DamagedError) else StoreError
        raise kind(f"{error}; nothing was changed (--overwrite replaces a bincompress store)") from None
    difference = difference_of(place.attributes, record)
    if difference:
        raise StoreError(
            f"{url}: was begun with other settings: {difference}; use another store, the same settings, or --overwrite"
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
