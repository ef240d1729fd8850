"""What lies where a store is to be written, and what of it may be removed? Nothing that the format does not own.

Every command that writes a store begins here, whatever kind of store and place: a place is empty, or holds an
unfinished beginning of ours, or a store of ours, or something else, which is never touched.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bincompress.errors import StoreError
from bincompress.store.files import Files, nobodys
from bincompress.store.layout import BEGINNING, NEW, Format, group_node, parse_node
from bincompress.store.location import files_at

_LOG = logging.getLogger(__name__)
_NAMED = 5  # foreign names in a message


@dataclass(frozen=True)
class Place:
    """What lies where a store is to be written."""

    files: Files
    format: Format
    state: Literal["empty", "beginning", "store", "other"]
    attributes: dict[str, Any] = field(default_factory=dict)  # the root's
    owned: tuple[str, ...] = ()  # keys that the format writes
    foreign: tuple[str, ...] = ()  # first names of the others

    @property
    def others(self) -> str:
        """The foreign names as a text."""
        more = f" and {len(self.foreign) - _NAMED} more" if len(self.foreign) > _NAMED else ""
        return ", ".join(self.foreign[:_NAMED]) + more


def look(url: str, format: Format) -> Place:
    """Return what lies at a path or fsspec URL; raises StoreError where that is a whole bucket, or unreadable."""
    files = files_at(url)
    if files.is_whole_bucket:
        raise StoreError(
            f"{url}: is a whole bucket, which may hold other things; give a place in it, such as "
            f"{url.rstrip('/') if url.rpartition('://')[2].strip('/') else url.partition('://')[0] + '://bucket'}/store"
        )
    keys = [key for key in files.sizes() if not nobodys(key)]
    owned = tuple(format.owned(keys))
    foreign = tuple(sorted({_shown(key, format) for key in set(keys) - set(owned)}))
    if "zarr.json" not in keys:
        # Files half written, of a run that was killed before it wrote anything else.
        empty = not foreign and all(key.endswith(".partial") or key.startswith(f"{NEW}/") for key in owned)
        return Place(files, format, "empty" if empty else "other", {}, owned, foreign or owned)
    attributes = _root_attributes(files)
    if attributes is None or attributes.get("format") != format.name:
        bare = attributes == {} and not foreign and all(key.endswith(("zarr.json", ".partial")) for key in owned)
        state: Literal["beginning", "other"] = "beginning" if bare and _no_arrays(files, owned) else "other"
        return Place(files, format, state, attributes or {}, owned, foreign or owned)
    # Of an earlier version, whose root said nothing else until all was there.
    begun = attributes.get("status") == BEGINNING or set(attributes) == {"format"}
    return Place(files, format, "beginning" if begun else "store", attributes, owned, foreign)


def _shown(key: str, format: Format) -> str:
    """Return how a foreign key is named: by its first name, and within the format's groups as a whole."""
    top = key.split("/")[0]
    return key if top in format.groups else top + ("/" if "/" in key else "")


def _root_attributes(files: Files) -> dict[str, Any] | None:
    content = files.read("zarr.json")
    try:
        node = parse_node(content or b"")
    except (ValueError, RecursionError):
        return None
    return dict(node.get("attributes", {})) if node.get("node_type") == "group" else None


def _no_arrays(files: Files, keys: tuple[str, ...]) -> bool:
    """Return whether metadata is of groups without attributes alone, as a run leaves that died in its first moment."""
    for content in files.read_many([key for key in keys if key.endswith("zarr.json")]):
        try:
            node = parse_node(content or b"")
        except (ValueError, RecursionError):
            return False
        if node.get("node_type") != "group" or node.get("attributes"):
            return False
    return True


def check_place(url: str, format: Format, overwrite: bool) -> Place:
    """Return a place where a store can be written, or one that can be gone on with; raises StoreError for any other.

    Nothing is changed. overwrite: whether a store of ours is to be replaced.
    """
    place = look(url, format)
    if place.state == "other":
        known = place.attributes.get("format")
        what = f"{format.another} (its format is {known!r:.40})" if known else f"{format.lacking} ({place.others})"
        option = "--overwrite replaces nothing else; " if overwrite else ""
        raise StoreError(f"{url}: {what}; nothing was changed: {option}choose another place")
    return place


def clear(place: Place, version: int) -> None:
    """Make a place empty for a new store: what the format owns is removed, and what stays there is named.

    The root says first that a store begins here: the same command goes on if this is interrupted.
    """
    if place.state == "other":
        raise StoreError(f"{place.files.url}: {place.format.lacking}; nothing was changed")
    mark_beginning(place.files, place.format, version)
    place.files.delete(key for key in place.owned if key != "zarr.json")
    if place.foreign:
        _LOG.warning("%s: left as it is, as it is no part of a store: %s", place.files.url, place.others)


def mark_beginning(files: Files, format: Format, version: int) -> None:
    """Write a root that says that a store is being created."""
    attributes: Mapping[str, Any] = {"format": format.name, "version": version, "status": BEGINNING}
    files.write("zarr.json", [group_node(attributes)])


def remove(url: str, format: Format) -> None:
    """Remove a store, and nothing else that may lie in its place; the root last, so that the rest is known as ours."""
    place = look(url, format)
    if place.state in ("store", "beginning"):
        mark_beginning(place.files, format, int(place.attributes.get("version") or 1))
        place.files.delete(key for key in place.owned if key != "zarr.json")
        place.files.delete(["zarr.json"])


def put_in_place(place: Place, version: int) -> None:
    """Move what was written in a local place's folder of new things into it, the root last; what is there is removed.

    Where this is interrupted, the root says that a store begins there.
    """
    folder = Path(place.files.url)
    old, foreign = (
        tuple(key for key in keys if not key.startswith(f"{NEW}/")) for keys in (place.owned, place.foreign)
    )
    clear(replace(place, owned=old, foreign=foreign), version)
    for path in sorted((folder / NEW).iterdir(), key=lambda path: path.name == "zarr.json"):
        _move(path, folder / path.name)


def _move(path: Path, target: Path) -> None:
    if path.is_dir() and target.is_dir():  # something foreign stayed in it
        for entry in path.iterdir():
            _move(entry, target / entry.name)
        path.rmdir()
    else:
        os.replace(path, target)
