"""What calibration found, in a Zarr v3 store of its own: a Hessian and greatest magnitudes per distinct linear input.

    /                      attrs: format "bincompress-statistics", version, source, text, samples, context, inputs
    /inputs/<name>         attrs: tensors, tokens, hashes, status; named after the first tensor that reads the input
        hessian            float32 (cols, cols): the mean of x x^T over the tokens
        absmax             float32 (cols): the greatest |x|
        drift, lack        float32, only of a run layer after layer: see `records.Inputs`
    /work                  what a run that was interrupted needs to go on; removed at the end

`inputs` in the root says for every tensor which input it reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import DamagedError, StoreError
from bincompress.methods import Inputs
from bincompress.process.faults import hinders
from bincompress.store.arrays import read_array
from bincompress.store.files import is_local
from bincompress.store.layout import BEGINNING, STATISTICS, array_hash, group_node, parse_array, parse_node
from bincompress.store.location import files_at
from bincompress.store.replace import check_place, clear, look, remove
from bincompress.store.store import difference_of

if TYPE_CHECKING:  # zarr takes longer to import than most that a run without statistics needs
    import zarr

FORMAT = STATISTICS.name
VERSION = 1
_ARRAYS = ("hessian", "absmax", "drift", "lack")
_CHUNK_LIMIT = 256 << 20


class Statistics:
    """A statistics store, open for reading or writing."""

    def __init__(self, url: str, root: zarr.Group) -> None:
        self.url = url
        self.root = root

    @property
    def attributes(self) -> dict[str, Any]:
        """The root's attributes."""
        return dict(self.root.attrs)

    @property
    def complete(self) -> bool:
        """Whether every input was found."""
        return self.attributes.get("status") == "complete"

    def has(self, key: str) -> bool:
        """Return whether an input's statistics are complete."""
        path = f"inputs/{key}"
        return path in self.root and self.root[path].attrs.get("status") == "complete"

    def knows(self, tensor: str) -> bool:
        """Return whether a tensor's inputs were calibrated."""
        return tensor in self.attributes["inputs"]

    def tokens(self, tensor: str) -> int:
        """Return how many tokens reached a tensor's input; raises StoreError where it was not calibrated."""
        found = self._group(tensor).attrs.get("tokens")
        return found if isinstance(found, int) else 0

    def hash_of(self, tensor: str) -> str:
        """Return a hash of all that is known of a tensor's input; raises StoreError where it was not calibrated."""
        return "".join(self._hashes(self._group(tensor)).values())

    def read(self, tensor: str) -> Inputs:
        """Return what is known of a tensor's input, checked against its hashes; raises StoreError, DamagedError."""
        group = self._group(tensor)
        files = files_at(self.url)
        found: dict[str, NDArray[Any]] = {}
        for key, expected in self._hashes(group).items():
            path = f"inputs/{self.attributes['inputs'][tensor]}/{key}"
            try:
                # Not through zarr, which would take whatever memory the metadata asks for.
                found[key] = read_array(files, path, parse_array(parse_node(files.read(f"{path}/zarr.json") or b"")))
            except (AttributeError, KeyError, OSError, TypeError, ValueError, RuntimeError, MemoryError) as error:
                if hinders(error):
                    raise
                raise DamagedError(f"{self.url}: {group.path}: {key} cannot be read: {error}") from None
            if array_hash(found[key]) != expected:
                raise DamagedError(f"{self.url}: {group.path}: {key}: its bytes are not those that were written")
        tokens = group.attrs.get("tokens")
        return Inputs(
            tensor,
            found["hessian"],
            found["absmax"],
            drift=found.get("drift"),
            lack=found.get("lack"),
            tokens=tokens if isinstance(tokens, int) else None,
        )

    def _hashes(self, group: zarr.Group) -> dict[str, str]:
        hashes = group.attrs["hashes"]
        if not isinstance(hashes, dict) or not {"hessian", "absmax"} <= hashes.keys():
            raise DamagedError(f"{self.url}: {group.path}: lists no hashes of its arrays")
        return {key: str(hashes[key]) for key in _ARRAYS if key in hashes}

    def _group(self, tensor: str) -> zarr.Group:
        names = self.attributes["inputs"]
        if tensor not in names:
            raise StoreError(f"{self.url}: has no statistics of {tensor}'s inputs; calibrate with this model")
        if not self.has(names[tensor]):
            raise StoreError(f"{self.url}: the statistics of {tensor}'s inputs are not complete; calibrate again")
        return cast("zarr.Group", self.root[f"inputs/{names[tensor]}"])

    def write(self, key: str, tensors: list[str], tokens: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write one input's statistics and mark them complete."""
        group = self.root.create_group(f"inputs/{key}", overwrite=True)
        for name, values in arrays.items():
            write_array(group, name, values)
        hashes = {name: array_hash(values) for name, values in arrays.items()}
        group.attrs.put({"tensors": tensors, "tokens": tokens, "hashes": hashes, "status": "complete"})

    def read_trials(self, tensor: str, key: str) -> list[dict[str, Any]] | None:
        """Return what settings were tried on a tensor and what each cost; None where that was not done."""
        path = f"trials/{tensor}"
        found = self.root[path].attrs.get(key) if path in self.root else None
        return list(found) if isinstance(found, list) else None  # type: ignore[arg-type]

    def write_trials(self, tensor: str, key: str, trials: list[dict[str, Any]]) -> None:
        """Keep what settings were tried on a tensor."""
        self.root.require_group(f"trials/{tensor}").attrs.update({key: trials})

    def write_work(self, name: str, values: NDArray[Any]) -> None:
        """Write an array that only an interrupted run needs."""
        write_array(self.root.require_group("work"), name, values)
        # Last: chunks that a killed process did not come to write would be read as zeros.
        self.root[f"work/{name}"].attrs["hash"] = array_hash(values)

    def read_work(self, name: str, rows: slice = slice(None)) -> NDArray[Any] | None:
        """Return rows of an array of `write_work`, None where it is not there whole."""
        with contextlib.suppress(KeyError, OSError, ValueError, RuntimeError):
            found = self.root[f"work/{name}"]
            values = np.asarray(found[rows]) if "hash" in found.attrs else None  # type: ignore[index]
            if values is not None and (rows != slice(None) or array_hash(values) == found.attrs["hash"]):
                return values
        return None

    def remove_work(self, name: str = "") -> None:
        """Remove such an array, or all of them."""
        from zarr.core.sync import sync

        sync(self.root.store.delete_dir(f"{self.root.path}/work/{name}".strip("/")))

    def remove(self) -> None:
        """Remove the store, and nothing else that may lie in its folder."""
        _remove(self.url)

    def finish(self) -> None:
        """Mark the store complete."""
        self.remove_work()
        self.root.attrs.update({"status": "complete"})


def write_array(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    """Write an array in chunks of rows, uncompressed, with checksums."""
    from zarr.codecs import Crc32cCodec

    step = max(1, min(len(values), _CHUNK_LIMIT // max(1, values[:1].nbytes)))
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=(step, *values.shape[1:]), filters=None,
        compressors=[Crc32cCodec()], config={"write_empty_chunks": True}, overwrite=True,
    )  # fmt: skip
    array[...] = values


def open_statistics(url: str) -> Statistics:
    """Open complete statistics for reading; raises StoreError where there are none, or unfinished ones."""
    found = statistics_at(url)
    if found is None:
        raise StoreError(f"{url}: no statistics there; `bincompress calibrate SOURCE {url} --text FILE` makes them")
    if not found.complete:
        raise StoreError(f"{url}: not complete; run the same `bincompress calibrate` again to finish it")
    return found


def open_unfinished(url: str) -> Statistics:
    """Open statistics that a run is still collecting; raises StoreError where there are none."""
    found = statistics_at(url)
    if found is None:
        raise StoreError(f"{url}: no statistics there; does every node reach this place?")
    return found


def begin_statistics(url: str, record: Mapping[str, Any], overwrite: bool) -> Statistics:
    """Create a statistics store, or open one that an equal run began; raises StoreError where another one did.

    overwrite: statistics in that place are removed first; what is no part of them stays (`replace`).
    """
    wanted = {"format": FORMAT, "version": VERSION, **record}
    place = check_place(url, STATISTICS, overwrite)
    if place.state == "store" and not overwrite:
        _check_version(url, place.attributes)
        for key, value in wanted.items():
            if difference_of(place.attributes, {key: value}):
                raise StoreError(
                    f"{url}: was begun with another {key}: {place.attributes.get(key)!r:.80} there, {value!r:.80} now; "
                    "use another place, the same settings, or --overwrite"
                )
        place.files.delete(key for key in place.owned if key.endswith(".partial"))  # of a killed run
        return open_unfinished(url)
    try:
        clear(place, VERSION)
        place.files.write("inputs/zarr.json", [group_node({})])
        place.files.write("zarr.json", [group_node({**wanted, "status": "incomplete"})])
    except OSError as error:
        raise StoreError(f"{url}: cannot be written: {error.strerror or error}") from None
    return open_unfinished(url)


def statistics_at(url: str) -> Statistics | None:
    """Open what lies there, None where nothing does; raises StoreError where it is no statistics."""
    if is_local(url) and not Path(url).exists():
        return None  # zarr would make the folder
    import zarr

    from bincompress.store.zarr_access import zarr_store

    try:
        root = zarr.open_group(zarr_store(url), mode="r+", zarr_format=3)
    except FileNotFoundError:
        return None
    except (KeyError, ValueError) as error:
        raise StoreError(f"{url}: not a Zarr v3 store: {error}") from None
    if root.attrs.get("format") != FORMAT:
        raise StoreError(f"{url}: holds no statistics (format {root.attrs.get('format')!r}); is it a model's store?")
    if root.attrs.get("status") == BEGINNING:
        return None
    _check_version(url, dict(root.attrs))
    return Statistics(url, root)


def remove_left(url: str, kind: str) -> None:
    """Remove statistics of this kind that a finished run left, those too whose removal was interrupted."""
    left = statistics_at(url)
    if left is not None and left.attributes.get("kind") == kind:
        left.remove()
        return
    place = look(url, STATISTICS)
    if place.state == "beginning" and place.attributes.get("format") == FORMAT:  # nothing in it counts
        _remove(url)


def _remove(url: str) -> None:
    remove(url, STATISTICS)
    if is_local(url):
        with contextlib.suppress(OSError):
            Path(url).rmdir()


def _check_version(url: str, attributes: Mapping[str, Any]) -> None:
    if attributes.get("version") != VERSION:
        raise StoreError(
            f"{url}: statistics of version {attributes.get('version')!r}; this program reads {VERSION}: calibrate "
            "again with --overwrite"
        )
