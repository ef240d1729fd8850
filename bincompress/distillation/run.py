"""From a store and its teacher to a better store, in one call."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bincompress.compression.tensor_report import six_digits
from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.model import Predictions, Student, teacher_weights
from bincompress.distillation.result import choose_planes, write_store
from bincompress.distillation.settings import DistillError, DistillSettings
from bincompress.distillation.teacher import Teacher, write_text
from bincompress.distillation.train import Checkpoints, OnStep, Progress, Training, perplexity, writable
from bincompress.distillation.windows import Windows
from bincompress.errors import StoreError
from bincompress.model.checkpoint_source import CheckpointSource, checkpoint_config
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import Checkpoint
from bincompress.sources.hub import source_record
from bincompress.store.files import LOCK
from bincompress.store.layout import MODEL, NEW
from bincompress.store.lock import exclusive
from bincompress.store.replace import Place, check_place
from bincompress.store.store import Store, is_local, open_store

_CURVE_POINTS = 200  # of the losses that a store keeps


@dataclass(frozen=True)
class Places:
    """Where a run works beside its result; none of it changes the result."""

    device: str = "auto"
    threads: int | None = None
    checkpoint_every: int = 100
    work: Path | None = None  # checkpoints; beside the result if not given
    cached_logits: Path | None = None


@dataclass(frozen=True)
class Distilled:
    """What came of a distillation: held-out perplexities of the teacher, the start and the result."""

    teacher: float
    start: float
    best: float
    best_step: int
    steps: int
    stopped: str
    seconds: float
    resumed_at: int

    def record(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def distill(
    store: str,
    teacher: Checkpoint,
    text: str | None,
    out: str,
    settings: DistillSettings,
    places: Places = Places(),
    *,
    overwrite: bool = False,
    on_step: OnStep = lambda progress: None,
    on_written: Callable[[int, int], None] = lambda done, total: None,
) -> Distilled:
    """Train a store's coefficients against the unquantized model and write the result as a new store.

    text: what to train on, None where all of it is written by the teacher (settings.written_tokens). An interrupted
    run goes on from its last checkpoint. Raises DistillError, StoreError, CheckpointError, DamagedError or
    UnsupportedModelError.
    """
    begin = time.perf_counter()
    opened = open_store(store)
    _check(opened, teacher, text, out, settings, overwrite)
    config = checkpoint_config(teacher)
    if settings.context > config.context:
        raise DistillError(f"--context {settings.context}: expected at most {config.context}, the model's limit")
    if places.work is None and not is_local(out):
        raise DistillError(f"{out}: checkpoints need a local folder; give one as --work")
    device = chosen_device(places.device)
    if places.threads is not None:
        torch.set_num_threads(places.threads)
    place = Path(out).resolve() if is_local(out) else Path()
    work = places.work or place.parent / f".{place.name}.distill"
    with exclusive(out), _memory_named(settings):
        if overwrite:
            _remove_work(work)
        dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
        decoder = TorchDecoder(config, device, settings.context)
        predictions = Predictions(decoder, settings, device)
        weights = teacher_weights(teacher, config, device, dtype)
        windows = _windows(text, teacher, predictions, weights, settings, work, on_written)
        fingerprint = str(source_record(teacher)["fingerprint"])
        key = xxhash.xxh3_64_hexdigest(f"{fingerprint} {settings.dtype} {device.type}".encode())
        taught = Teacher(predictions, weights, windows, places.cached_logits, key)
        student = Student(opened, config, device, dtype, settings.norms)
        if not student.parameters():
            raise DistillError(f"{store}: it has no packed tensor, so there is nothing to train")
        rechoose = (lambda s: choose_planes(s, teacher, device)) if settings.rechoose_planes else None
        training = Training(student, taught, predictions, windows, settings, rechoose)
        record = {"settings": settings.record(), "store": _content(opened), "text": windows.fingerprint}
        checkpoints = Checkpoints(work / "checkpoint.pt", places.checkpoint_every, record)
        state = checkpoints.read(device)
        if state is not None:
            training.load(state)
        resumed_at = training.progress.step
        training.run(checkpoints, on_step)
        progress = training.progress
        reference = perplexity(taught.text_loss, predictions, windows)
        seconds = time.perf_counter() - begin
        distillation = _record(settings, fingerprint, windows, progress, reference)
        log = {"seconds": seconds, "device": _device_name(device), "torch": torch.__version__}
        write_store(opened, out, student, teacher, distillation, log)
        _remove_work(work)
    start, best = progress.judged[0][1], progress.best_perplexity
    return Distilled(reference, start, best, progress.best_step, progress.step, progress.stopped, seconds, resumed_at)


def _check(
    store: Store, teacher: Checkpoint, text: str | None, out: str, settings: DistillSettings, overwrite: bool
) -> None:
    """Refuse what can be refused before any weight is read."""
    attributes = store.attributes
    if attributes["status"] != "complete":
        raise StoreError(f"{store.url}: not complete; run the same `bincompress compress` again before distilling it")
    if attributes["source"]["fingerprint"] != source_record(teacher)["fingerprint"]:
        raise DistillError(
            f"{store.url}: was made from {attributes['source']['id']}, but its headers or config differ from those of "
            f"{teacher.name}; give the checkpoint that it was made from as --teacher"
        )
    if text is None and not settings.written_tokens:
        raise DistillError("nothing to train on: expected --text FILE, or --data-free")
    CheckpointSource(teacher, checkpoint_config(teacher))
    if is_local(out) and Path(out).resolve() == Path(store.url).resolve():
        raise DistillError(f"{out}: is the store to distill; choose another --out")
    place = check_place(out, MODEL, overwrite)
    if not overwrite and _is_taken(out, place):
        raise DistillError(f"{out}: exists; choose another --out, or --overwrite")


def _is_taken(out: str, place: Place) -> bool:
    """Return whether something lies where the result is to be: anything but what an interrupted run leaves."""
    if place.state == "store":
        return place.attributes.get("status") == "complete" or "distillation" not in place.attributes
    if place.state == "empty" and is_local(out) and Path(out).exists():
        return not any((Path(out) / name).exists() for name in (NEW, LOCK))
    return False


def _remove_work(work: Path) -> None:
    """Remove what a run keeps to go on from, and nothing else that may lie in its folder."""
    with contextlib.suppress(OSError):
        for path in (*work.glob("checkpoint.*"), *work.glob("written-*-*-*.*")):
            if path.suffix in (".pt", ".npy", ".partial"):
                path.unlink()
        work.rmdir()


def chosen_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DistillError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _windows(
    text: str | None, teacher: Checkpoint, predictions: Predictions, weights: dict[str, torch.Tensor],
    settings: DistillSettings, work: Path, on_written: Callable[[int, int], None],
) -> Windows:  # fmt: skip
    """Return the windows of the text and of what the teacher writes; the text's, where there is one, judge."""
    written = np.empty(0, np.int64)
    if settings.written_tokens:
        written = _written(teacher, predictions, weights, settings, work, on_written)
    if text is None:
        return Windows.of(written, settings)
    tokenizer = load_tokenizer(teacher.assets())
    if tokenizer.size > predictions.decoder.config.vocab:
        raise DistillError(f"{teacher.name}: its tokenizer has more tokens than its vocabulary")
    return Windows.of(np.array(tokenizer.encode(text), np.int64), settings).with_more(written)


def _written(
    teacher: Checkpoint, predictions: Predictions, weights: dict[str, torch.Tensor], settings: DistillSettings,
    work: Path, on_written: Callable[[int, int], None],
) -> NDArray[np.int64]:  # fmt: skip
    """Return tokens that the teacher writes; an interrupted run finds them as they were."""
    path = work / f"written-{settings.seed}-{settings.written_tokens}-{settings.context}.npy"
    if path.exists():
        return np.asarray(np.load(path))
    first = teacher.config.get("bos_token_id")
    tokens = write_text(
        predictions, weights, settings.written_tokens, settings.context, first if type(first) is int else None,
        settings.seed, lambda done: on_written(done, settings.written_tokens),
    )  # fmt: skip
    partial = path.with_suffix(".partial")
    with writable(path):
        work.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.save(file, tokens)
        partial.replace(path)
    return tokens


def _record(
    settings: DistillSettings, teacher: str, windows: Windows, progress: Progress, reference: float
) -> dict[str, Any]:
    step = max(1, math.ceil(len(progress.losses) / _CURVE_POINTS))
    losses = [progress.losses[i : i + step] for i in range(0, len(progress.losses), step)]
    return {
        "settings": settings.record(),
        "teacher": teacher,
        "text": windows.fingerprint,
        "training_tokens": int(windows.training.size),
        "held_out_tokens": int(windows.held_out.size),
        "steps": progress.step,
        "best_step": progress.best_step,
        "stopped": progress.stopped,
        "planes_rechosen": progress.rechosen,
        "teacher_perplexity": six_digits(reference),
        "losses": {"every": step, "mean": [six_digits(sum(part) / len(part)) for part in losses]},
        "held_out": [[at, six_digits(found)] for at, found in progress.judged],
    }


def _content(store: Store) -> str:
    """Return a hash of everything in a store that its hashes cover."""
    digest = xxhash.xxh3_64()
    for name in sorted(store.tensors()):
        digest.update(f"{name} {sorted(store.complete_attributes(name)['hashes'].items())}".encode())
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def _memory_named(settings: DistillSettings) -> Iterator[None]:
    """Name the settings to change where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU, PyTorch raises a plain RuntimeError from its allocator.
        known = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
        if not known:
            raise
        raise DistillError(
            f"out of memory with {settings.batch // settings.accumulate} windows of {settings.context} tokens at once: "
            f"raise --accumulate (a divisor of --batch {settings.batch}) or lower --context; "
            "if a single window does not fit, --dtype bf16 halves the activations"
        ) from None
