"""Stores in other forms and places: `pack`, `unpack`, `push` and `export`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bincompress.store.export import export as export_store
from bincompress.store.pack import OnStage, Packed, untold
from bincompress.store.pack import pack as pack_store
from bincompress.store.pack import unpack as unpack_store
from bincompress.store.store import open_store

if TYPE_CHECKING:
    from bincompress.reporting.publish import Pushed


def pack(store: str | Path, file: str | Path, *, overwrite: bool = False, progress: OnStage = untold) -> Packed:
    """Write a finished store as one file, which every function that reads a store reads as well.

    file: a path or an fsspec URL that ends in ".zip". overwrite: another packed store there is replaced; nothing else
    ever is. progress is called with what is being done and how much of it. Raises StoreError or DamagedError.
    """
    return pack_store(str(store), str(file), overwrite=overwrite, on_stage=progress)


def unpack(file: str | Path, store: str | Path, *, overwrite: bool = False, progress: OnStage = untold) -> Packed:
    """Write a packed file as a folder again, with the same bytes; raises StoreError or DamagedError."""
    return unpack_store(str(file), str(store), overwrite=overwrite, on_stage=progress)


def push(
    store: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    evaluations: Sequence[str | Path] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    progress: OnStage = untold,
) -> "Pushed":
    """Upload a store to the Hugging Face Hub: one file, config and tokenizer files, and a model card.

    repo: owner/name; it is made where it is not there. base_model, licence: what the card says; by default what the
    store and the base model's card say. evaluations: files that `bincompress evaluate --json` has printed. overwrite:
    a card that bincompress did not write is replaced. dry_run: nothing is uploaded. Raises StoreError, DamagedError.
    """
    from bincompress.reporting.publish import push as push_store

    return push_store(
        str(store), repo, private=private, revision=revision, base_model=base_model, licence=licence,
        evaluations=[Path(path) for path in evaluations], overwrite=overwrite, dry_run=dry_run, on_stage=progress,
    )  # fmt: skip


def export(
    store: str | Path, folder: str | Path, *, progress: Callable[[str, int], None] = lambda name, n: None
) -> Path:
    """Write a store as a Hugging Face folder, dequantized to bfloat16, and return it.

    progress is called with each tensor's name and bytes. Raises StoreError where the store is not complete or the
    folder holds something.
    """
    return export_store(open_store(str(store)), Path(folder), progress)
