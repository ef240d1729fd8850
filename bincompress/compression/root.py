"""Does a store's root say what follows from its source and its tensors? The engine runs the config that is in it."""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from bincompress.sources.checkpoint import Checkpoint
from bincompress.sources.hub import source_record
from bincompress.store.layout import SEAL
from bincompress.store.store import Store

_SHOWN = 3  # differences in a message
_KNOWN = {
    "format", "version", "status", "failures", "run_id", SEAL, "source", "config", "recipe", "keep_weights", "archive",
    "tensors", "fused", "statistics",
}  # fmt: skip


def well_formed(kept: Any) -> bool:
    """Return whether a root's keep_weights are [row, column] pairs by tensor."""
    return isinstance(kept, dict) and all(
        isinstance(places, list)
        and all(isinstance(p, list) and len(p) == 2 and all(type(n) is int and n >= 0 for n in p) for p in places)
        for places in kept.values()
    )


def root_differences(store: Store, checkpoint: Checkpoint) -> dict[str, str]:
    """Return what of a root is not as the checkpoint and the tensors' own fingerprints have it, by attribute.

    The source's name may be another (folders are renamed), and its revision where one of both has none.
    """
    root, own = store.attributes, source_record(checkpoint)
    found, name = root.get("source"), checkpoint.name
    found = found if isinstance(found, dict) else {}
    pairs: dict[str, tuple[Any, Any]] = {
        "source.fingerprint": (found.get("fingerprint"), own["fingerprint"]),
        "fused": (root.get("fused", []), list(checkpoint.fused)),
        "failures": (root.get("failures"), {}),
    }
    if found.get("revision") and own["revision"]:
        pairs["source.revision"] = found["revision"], own["revision"]
    if "config" in root:  # else the engine reads config.json
        theirs, ours = json.loads(json.dumps(checkpoint.config)), root["config"]
        ours = ours if isinstance(ours, dict) else {}
        pairs |= {f"config.{k}": (ours.get(k), theirs.get(k)) for k in sorted(ours.keys() | theirs.keys())}
    problems = _named(pairs, name) | _of_tensors(store)
    unknown = sorted(root.keys() - _KNOWN)
    return problems | {f"zarr.json: {key[:80]}": "is nothing that `bincompress compress` writes" for key in unknown}


def _named(pairs: Mapping[str, tuple[Any, Any]], name: str) -> dict[str, str]:
    return {
        f"zarr.json: {key[:80]}": f"is {ours!r:.60}; {name} has {theirs!r:.60}"
        for key, (ours, theirs) in pairs.items()
        if ours != theirs
    }


def _of_tensors(store: Store) -> dict[str, str]:
    """Return where the root says something else than its tensors' fingerprints."""
    root, kept = store.attributes, store.attributes["keep_weights"]
    wrong: dict[str, list[str]] = {"archive": [], "keep_weights": sorted(kept.keys() - store.tensors().keys())}
    for name in sorted(store.tensors()):
        mark = store.complete_attributes(name).get("fingerprint")
        mark = mark if isinstance(mark, dict) else {}
        places = xxhash.xxh3_128_hexdigest(json.dumps(kept[name]).encode()) if kept.get(name) else ""
        if mark.get("kept", "") != places:
            wrong["keep_weights"].append(name)
        if mark.get("archive", root.get("archive")) != root.get("archive"):
            wrong["archive"].append(name)
    return {
        f"zarr.json: {key}": f"is not what these tensors were made with: {', '.join(names[:_SHOWN])}"
        for key, names in wrong.items()
        if names
    }
