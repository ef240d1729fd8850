"""From a store to a model on the Hugging Face Hub: pack it, write its card, upload both with config and tokenizer."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bincompress.errors import DamagedError, StoreError
from bincompress.reporting.card import Facts, model_card, read_evaluation
from bincompress.sources.hub import parts_of
from bincompress.store.files import is_local
from bincompress.store.hub import CARD, FILE, card_fields, upload
from bincompress.store.pack import OnStage, pack, untold
from bincompress.store.pack_files import PackFiles
from bincompress.store.store import Store, open_store
from bincompress.store.verify import parts, verify


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be."""

    repo: str
    files: tuple[str, ...]
    card: str
    url: str = ""  # of the commit; empty for a dry run
    notes: tuple[str, ...] = ()  # what the card lacks


def push(
    store: str,
    repo: str,
    *,
    private: bool,
    revision: str | None,
    base_model: str | None,
    licence: str | None,
    evaluations: Sequence[Path],
    overwrite: bool,
    dry_run: bool,
    on_stage: OnStage = untold,
) -> Pushed:
    """Upload a store; the parameters are those of `bincompress.push`."""
    for name, what in ((repo, "OWNER/NAME"), (base_model, "--base-model")):
        if name is not None and (parts_of(name)[0] is None or "@" in name):
            raise StoreError(f"{name}: {what}: expected the name of a model on the Hub, such as me/Llama-3.2-1B-2bit")
    found = [read_evaluation(path) for path in evaluations]
    opened = open_store(store)
    base, commit = _base(opened, base_model)
    known = {"license": licence} if licence else card_fields(base) if base else {}
    notes = []
    if not base:
        notes.append("the card names no base model, as the store was made from a folder; --base-model OWNER/NAME does")
    if not known:
        notes.append("the licence is not known; --license says it")
    if not found:
        notes.append("the card has no figures of quality; --evaluation FILE gives them")
    with _packed(opened, on_stage) as file:
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        facts = Facts(repo, base, commit, known, found, digest, file.stat().st_size)
        try:
            card = model_card(opened, facts)
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # of a root that another program wrote
            raise DamagedError(
                f"{store}: zarr.json: what it says of its recipe or source is not sound ({error!r})"
            ) from None
        assets = opened.read_assets()
        files = tuple(sorted([*assets, CARD, FILE]))
        if dry_run:
            return Pushed(repo, files, card, notes=tuple(notes))
        url = upload(repo, file, card, assets, revision=revision, private=private, overwrite=overwrite)
    return Pushed(repo, files, card, url, tuple(notes))


def _base(store: Store, given: str | None) -> tuple[str | None, str | None]:
    """Return the Hub id of the model that a store was made from, and its commit, as far as they are known."""
    source = store.attributes["source"]
    name, commit = source.get("id"), source.get("revision") or None
    if given is not None:
        return given, commit if given == name else None
    known = isinstance(name, str) and commit and parts_of(name)[0] == name
    return (str(name), str(commit)) if known else (None, None)


@contextmanager
def _packed(store: Store, on_stage: OnStage) -> Iterator[Path]:
    """Yield a store as one sound file of this machine: its own, or one that is there as long as the block."""
    if isinstance(store.files, PackFiles) and is_local(store.url):
        total = parts(store)
        for done, (name, problem) in enumerate(verify(store), 1):
            if problem:
                raise DamagedError(f"{store.url}: not uploaded: {name}: {problem}")
            on_stage("verify", done, total)
        yield Path(store.url)
        return
    if isinstance(store.files, PackFiles):
        raise StoreError(f"{store.url}: a packed store behind a URL; download it, and push the file")
    with tempfile.TemporaryDirectory() as folder:
        pack(store.url, str(Path(folder) / FILE), on_stage=on_stage)
        yield Path(folder) / FILE
