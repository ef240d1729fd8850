"""How does a store become one file to carry, and a folder again? Checked before and after, whole or not at all."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from bincompress.errors import DamagedError, StoreError
from bincompress.process.out_file import refuse_unwritable
from bincompress.store.files import is_local
from bincompress.store.laid_out import VERSION as VERSION_LAID_OUT
from bincompress.store.laid_out import LaidOut, forms_in
from bincompress.store.layout import MODEL, NODES, VERSION, group_node
from bincompress.store.lock import exclusive
from bincompress.store.new_file import Pieces, explained, new_file
from bincompress.store.pack_files import PackFiles, RemoteRanges, names_a_pack
from bincompress.store.replace import check_place, clear, look
from bincompress.store.store import Store, open_store
from bincompress.store.verify import parts, verify
from bincompress.store.zip_format import LARGEST_ENTRY, Entry, directory, in_order, is_laid_out, is_metadata

EXTENSION = ".bincompress.zip"  # of the name that `compress --pack` gives
OnStage = Callable[[str, int, int], None]  # what is being done; bytes, or tensors of a check, done and in all


class Beside(Protocol):
    """What a packed file is to hold beside a store, under keys that sort among its own."""

    forms: list[str]

    def keys(self) -> list[str]:
        """Return all keys."""

    def content(self, key: str) -> bytes:
        """Return the bytes of a key; keys are asked for in their order."""


def untold(stage: str, done: int, total: int) -> None:
    """Take no notice."""


@dataclass(frozen=True)
class Packed:
    """What came of packing a store, or of unpacking a file."""

    store: str
    file: str
    nbytes: int  # of all entries
    entries: int
    unchanged: bool = False  # whether the file held this store already
    left_out: tuple[str, ...] = ()  # what lies in the store's folder and is no part of it
    laid_out: tuple[str, ...] = ()  # the forms in which the file holds matrices too


def beside(store: str) -> str:
    """Return the file that `compress --pack` writes: beside the store, by its name."""
    place = str(Path(store).resolve()) if is_local(store) and not Path(store).name else store.rstrip("/")
    return f"{place}{EXTENSION}"


def pack(
    store: str,
    file: str,
    *,
    overwrite: bool = False,
    on_stage: OnStage = untold,
    lay_out: Callable[[Store], Beside] | None = None,
) -> Packed:
    """Write a finished store as one file: a zip file whose arrays can be memory-mapped.

    store: a folder or an fsspec URL; file: a path or an fsspec URL that ends in ".zip". Everything is held against its
    hash before, and read back after. The file appears whole under its name, or not at all; equal stores give equal
    bytes. A file that holds this store already is left as it is. overwrite: another packed store there is replaced,
    and nothing else ever is. lay_out: gives the matrices that the file is to hold as kernels read them; the store may
    then be a packed one. Raises StoreError, or DamagedError naming what is damaged.
    """
    there = check_target(file, store, overwrite=True)
    opened = open_store(store)
    keys, left_out = _parts(opened, again=lay_out is not None)
    beside = None if lay_out is None else lay_out(opened)
    forms = () if beside is None else tuple(beside.forms)
    total = sum(size for key, size in opened.files.sizes().items() if key in set(keys))
    if there == "pack" and _holds(file, opened, keys, forms):
        _check(open_store(file), on_stage, f"{file}: holds this store, but is damaged; remove it, and pack again")
        return Packed(store, file, total, len(keys), True, left_out, forms)
    check_target(file, store, overwrite)
    if is_local(file):
        refuse_unwritable(Path(file), "FILE", makes_folders=True)
    _check(opened, on_stage, f"{store}: not packed")
    with explained(file), new_file(file) as path:
        with open(path, "r+b", buffering=0) as out:
            pieces = Pieces(out)
            _write(opened, keys, beside, total, pieces, on_stage)
            pieces.flush()
        _check(open_store(str(path)), on_stage, f"{file}: not written: what was read back differs")
    if not is_local(file):
        _check(open_store(file), on_stage, f"{file}: was written, but what was read back differs")
    return Packed(store, file, total, len(keys), False, left_out, forms)


def unpack(file: str, store: str, *, overwrite: bool = False, on_stage: OnStage = untold) -> Packed:
    """Write a packed file as a store again, a folder or what lies below an fsspec URL; its files have the same bytes.

    The same call finishes what an interrupted one began. overwrite: a store there is replaced. Raises StoreError, or
    DamagedError where the file is damaged; then nothing is written. Matrices that are laid out are left out.
    """
    opened = open_store(file)
    files = opened.files
    if not isinstance(files, PackFiles):
        raise StoreError(f"{file}: is no packed file; it is a store already")
    with explained(store), exclusive(store):
        place = check_place(store, MODEL, overwrite)
        if place.state == "store" and not overwrite:
            raise StoreError(f"{store}: holds a store; nothing was changed: --overwrite replaces it")
        _check(opened, on_stage, f"{file}: not unpacked")
        clear(place, VERSION)
        chosen = {key: entry for key, entry in files.entries.items() if not is_laid_out(key)}
        total, done = sum(entry.size for entry in chosen.values()), 0
        for key, entry in chosen.items():  # the root is the last
            if key == "zarr.json" and not is_local(store):
                place.files.write(f"{NODES}/zarr.json", [group_node({"tensors": opened.all_attributes()})])
            place.files.write(key, [files.read(key) or b""])
            done += entry.size
            on_stage("unpack", done, total)
    _check(open_store(store), on_stage, f"{store}: was written, but what was read back differs")
    return Packed(store, file, total, len(chosen), laid_out=tuple(forms_in(opened)))


def check_target(file: str, store: str, overwrite: bool) -> Literal["free", "pack"]:
    """Return whether a packed store lies where one is to be written; raises StoreError where none may be.

    overwrite: whether one that is there may be replaced. Nothing is changed.
    """
    if not names_a_pack(file):
        raise StoreError(f"{file}: expected a file name that ends in .zip, such as model{EXTENSION}")
    if is_local(file):
        path = Path(file)
        if path.is_dir():
            raise StoreError(f"{file}: is a folder; give the name of a file in it, such as {path / 'model'}{EXTENSION}")
        if is_local(store) and Path(store).is_dir() and path.resolve().is_relative_to(Path(store).resolve()):
            raise StoreError(f"{file}: lies in the store itself; choose a place outside of {store}")
        if not path.exists():
            return "free"
    elif RemoteRanges.there(file) is None:
        return "free"
    try:
        ours = isinstance(open_store(file).files, PackFiles)
    except StoreError:
        ours = False
    if not ours:
        raise StoreError(
            f"{file}: is there, and is not a sound packed store; nothing was changed: choose another name, or remove it"
        )
    if not overwrite:
        raise StoreError(f"{file}: holds another packed store; nothing was changed: --overwrite replaces it")
    return "pack"


def _parts(store: Store, again: bool) -> tuple[list[str], tuple[str, ...]]:
    """Return a finished store's keys in their order, and what else lies there; raises StoreError where none can be.

    again: whether it may be a packed one.
    """
    if isinstance(store.files, PackFiles) and not again:
        raise StoreError(f"{store.url}: is packed already; copy the file")
    if store.attributes["status"] != "complete":
        raise StoreError(f"{store.url}: not complete; run the same `bincompress compress` again before packing it")
    if isinstance(store.files, PackFiles):
        return [key for key in store.files.entries if not is_laid_out(key)], ()
    place = look(store.url, MODEL)
    kinds = store.tensors()
    arrays = {name: set(store.hashes(name)) for name, kind in kinds.items() if kind == "packed"}
    chosen, others = [], list(place.foreign)
    for key in place.owned:
        top, _, rest = key.partition("/")
        if key.endswith("/"):
            if is_local(store.url) and (Path(store.url) / key).is_symlink():
                raise StoreError(
                    f"{store.url}: {key} is a link, which is not followed; put what it leads to in its place"
                )
        elif key.endswith(".partial") or top in (NODES, ".bincompress-new"):
            continue  # a killed writer's, or what follows from the rest
        elif key.isascii() and _belongs(top, rest.split("/"), kinds, arrays):
            chosen.append(key)
        else:
            others.append(key)
    return in_order(chosen), tuple(sorted(others))


def _belongs(top: str, parts: list[str], kinds: dict[str, str], arrays: dict[str, set[str]]) -> bool:
    """Return whether a key that the format owns is one of this store's."""
    name = parts[0]
    if top in ("assets", "log") or len(parts) < 2:
        return True
    if kinds.get(name) != ("packed" if top == "tensors" else "plain"):
        return True  # of no tensor: `verify` says what that is
    return top == "plain" or len(parts) == 2 or parts[1] in arrays[name]


def _holds(file: str, store: Store, keys: list[str], forms: tuple[str, ...]) -> bool:
    """Return whether a packed file is one of this store: sizes and metadata are equal, and hashes are among it.

    forms: in which it is to hold matrices, too.
    """
    there = open_store(file)
    found = there.files
    assert isinstance(found, PackFiles)
    if tuple(forms_in(there)) != forms or any(LaidOut(there, form).version != VERSION_LAID_OUT for form in forms):
        return False
    sizes = store.files.sizes()
    own = {key: entry.size for key, entry in found.entries.items() if not is_laid_out(key)}
    if own != {key: sizes[key] for key in keys}:
        return False
    metadata = [key for key in keys if is_metadata(key)]
    contents = zip(metadata, store.files.read_many(metadata), strict=True)
    return all(content is not None and zlib.crc32(content) == found.entries[key].crc for key, content in contents)


def _check(store: Store, on_stage: OnStage, what: str) -> None:
    """Raise DamagedError where a store is not what was written."""
    total = parts(store)
    for done, (name, problem) in enumerate(verify(store), 1):
        if problem:
            raise DamagedError(f"{what}: {name}: {problem.removeprefix(f'{store.url}: ').removeprefix(f'{name}: ')}")
        on_stage("verify", done, total)


def _write(store: Store, keys: list[str], beside: Beside | None, total: int, out: Pieces, on_stage: OnStage) -> None:
    entries: list[Entry] = []
    done = 0
    for key in keys if beside is None else in_order([*keys, *beside.keys()]):
        content = beside.content(key) if beside is not None and is_laid_out(key) else store.files.read(key)
        if content is None:
            raise StoreError(f"{store.url}: {key} was removed while the store was packed; pack it again")
        if len(content) > LARGEST_ENTRY:
            raise StoreError(
                f"{store.url}: {key}: {len(content):,} bytes; a packed store has at most {LARGEST_ENTRY:,}"
            )
        entry = Entry(key, entries[-1].end if entries else 0, len(content), zlib.crc32(content))
        out.write(entry.header)
        out.write(content)
        entries.append(entry)
        done += 0 if is_laid_out(key) else len(content)
        on_stage("pack", done, total)
    out.write(directory(entries))
