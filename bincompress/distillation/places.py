"""Where does a training run: device, threads, the folder that it resumes from, and the place of its result?"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash

from bincompress.distillation.decoder import refuse_unknown
from bincompress.distillation.settings import DistillError
from bincompress.errors import StoreError
from bincompress.model.checkpoint_source import CheckpointSource, checkpoint_config
from bincompress.sources.checkpoint import Checkpoint
from bincompress.sources.hub import source_record
from bincompress.store.files import LOCK
from bincompress.store.layout import MODEL, NEW
from bincompress.store.replace import Place, check_place, look, remove
from bincompress.store.store import Store, is_local


@dataclass(frozen=True)
class Places:
    """Where a run works beside its result; none of it changes the result."""

    device: str = "auto"
    threads: int | None = None
    checkpoint_every: int | None = None  # steps; None is by time
    work: Path | None = None  # checkpoints; beside the result if not given
    cached_logits: Path | None = None

    def work_of(self, out: str) -> Path:
        """Return the folder of what a run into a store keeps; raises DistillError where there is none."""
        if self.work is not None:
            return self.work
        if not is_local(out):
            raise DistillError(f"{out}: checkpoints need a local folder; give one as --work")
        place = Path(out).resolve()
        return place.parent / f".{place.name}.distill"

    def chosen(self) -> torch.device:
        """Return the device to train on, and set how many threads a CPU works with."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return chosen_device(self.device)


DEFAULT_PLACES = Places()
TRAINING = "bincompress-training"  # the folder that a training of planes makes in its work folder
START = "start"  # the store in it that the training begins with, where it makes one
_KEPT = re.compile(
    r"(checkpoint|windows|stream-\d|(layer|independent)-\d{4}|written-\d+-\d+-\d+(-[0-9a-f]{16})?)"
    r"\.(pt|npy|safetensors|bin|partial)"
)


def check_start(store: Store, teacher: Checkpoint, option: str) -> None:
    """Refuse, before any weight is read, a store to begin with that is not whole or not of this model."""
    attributes = store.attributes
    if attributes["status"] != "complete":
        failed = next(iter(attributes["failures"].items()), None)
        if failed is not None:
            raise StoreError(f"{store.url}: not complete: {failed[0]}: {failed[1].removeprefix(f'{failed[0]}: ')}")
        raise StoreError(f"{store.url}: not complete; run the same `bincompress compress` again before training it")
    for name in store.tensors():
        if problem := store.report(name).get("not_finite"):
            raise StoreError(f"{store.url}: {name}: {problem}; compress a sound checkpoint")
    if attributes["source"]["fingerprint"] != source_record(teacher)["fingerprint"]:
        raise DistillError(
            f"{store.url}: was made from {attributes['source']['id']}, but its headers or config differ from those of "
            f"{teacher.name}; give the checkpoint that it was made from as {option}"
        )
    config = checkpoint_config(teacher)
    refuse_unknown(config)
    CheckpointSource(teacher, config)


def check_out(out: str, start: str | None, option: str, overwrite: bool) -> None:
    """Refuse a place for the result that holds something else."""
    if start is not None and is_local(out) and Path(out).resolve() == Path(start).resolve():
        raise DistillError(f"{out}: is the store to begin with; choose another {option}")
    place = check_place(out, MODEL, overwrite)
    if not overwrite and _is_taken(out, place):
        raise DistillError(f"{out}: exists; choose another {option}, or --overwrite")


def _is_taken(out: str, place: Place) -> bool:
    """Return whether something lies where the result is to be: anything but what an interrupted run leaves."""
    if place.state == "store":
        return place.attributes.get("status") == "complete" or not {"distillation", "training"} & set(place.attributes)
    if place.state == "empty" and is_local(out) and Path(out).exists():
        return not any((Path(out) / name).exists() for name in (NEW, LOCK))
    return False


def remove_work(work: Path) -> None:
    """Remove what a run keeps to be resumed from, and nothing else that may lie in its folder."""
    with contextlib.suppress(OSError):
        for path in work.iterdir():
            if _KEPT.fullmatch(path.name):
                path.unlink()
        work.rmdir()


def remove_training(work: Path) -> None:
    """Remove the folder that a training of planes has made for itself, with the store that it began with."""
    start = str(work / START)
    with contextlib.suppress(OSError):
        if look(start, MODEL).state in ("store", "beginning"):
            remove(start, MODEL)
            (work / START / LOCK).unlink(missing_ok=True)
            (work / START).rmdir()
    remove_work(work)
    with contextlib.suppress(OSError):
        work.parent.rmdir()


def chosen_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DistillError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def fastest_products(device: str) -> Literal["float32", "bf16"]:
    """Return the type of matrix products to train with: bf16 only where the hardware multiplies it."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "float32"


def content_of(store: Store) -> str:
    """Return a hash of everything in a store that its hashes cover."""
    digest = xxhash.xxh3_64()
    for name in sorted(store.tensors()):
        digest.update(f"{name} {sorted(store.complete_attributes(name)['hashes'].items())}".encode())
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """Return what a run was made on, for its log."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def memory_named(advice: str) -> Iterator[None]:
    """Name the settings to change where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU, PyTorch raises a plain RuntimeError from its allocator.
        known = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
        if not known:
            raise
        raise DistillError(
            f"out of memory: {advice}; if a single window does not fit, --dtype bf16 halves the activations"
        ) from None
