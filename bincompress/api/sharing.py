"""Stores in other forms and places: `pack`, `unpack`, `push` and `export`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bincompress.errors import BincompressError
from bincompress.store.export import export as export_store
from bincompress.store.pack import OnStage, Packed, untold
from bincompress.store.pack import pack as pack_store
from bincompress.store.pack import unpack as unpack_store
from bincompress.store.store import open_store

if TYPE_CHECKING:
    from bincompress.reporting.publish import Pushed


def pack(
    store: str | Path,
    file: str | Path,
    *,
    layout: str | Sequence[str] = (),
    overwrite: bool = False,
    progress: OnStage = untold,
) -> Packed:
    """Write a finished store as one file, which every function that reads a store reads as well.

    file: a path or an fsspec URL that ends in ".zip". layout: one CPU or several ("avx512", "avx2", "ssse3", "neon",
    "portable", or "auto" for this one) for which the file is to hold matrices laid out, too: they are then mapped where
    the file lies, which takes about as many bytes again; the store may be a packed file. overwrite: another packed
    store there is replaced; nothing else ever is. progress is called with what is being done and how much of it. Raises
    StoreError or DamagedError.
    """
    lay_out = None
    if layout:
        from bincompress.model.laying_out import LayingOut, forms_of  # and the decoder, only where it is asked for

        families = (layout,) if isinstance(layout, str) else tuple(layout)
        forms_of(families)  # an unknown one is refused before anything is read
        lay_out = partial(LayingOut, families=families)
    return pack_store(str(store), str(file), overwrite=overwrite, on_stage=progress, lay_out=lay_out)


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
    store: str | Path,
    target: str | Path,
    *,
    gguf_type: Literal["f16", "q8_0"] = "f16",
    ternary: Literal["tq2_0", "tq1_0"] = "tq2_0",
    overwrite: bool = False,
    progress: Callable[[str, int], None] = lambda name, n: None,
) -> Path:
    """Write a store for other programs, and return where: a Hugging Face folder, or a GGUF file by the name's ending.

    The folder holds bfloat16, dequantized. gguf_type, ternary, overwrite: as the command's options, for GGUF alone.
    progress is called with each tensor's name and bytes. Raises StoreError where the store is not complete, the target
    holds something, or GGUF cannot hold the model.
    """
    from bincompress.exporting.gguf import export_gguf, names_gguf

    opened = open_store(str(store))
    if not names_gguf(target):
        if (gguf_type, ternary, overwrite) != ("f16", "tq2_0", False):
            raise BincompressError(
                f"gguf_type, ternary and overwrite are for GGUF files; {target} does not end in .gguf"
            )
        return export_store(opened, Path(target), progress)
    export_gguf(opened, target, gguf_type=gguf_type, ternary=ternary, overwrite=overwrite, on_tensor=progress)
    return Path(target)
