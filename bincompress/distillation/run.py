"""From a store and its teacher to a better store, in one call."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bincompress.distillation.model import Student, trained_vectors
from bincompress.distillation.places import (
    DEFAULT_PLACES,
    Places,
    check_out,
    check_start,
    content_of,
    device_name,
    memory_named,
    remove_work,
)
from bincompress.distillation.result import write_store
from bincompress.distillation.settings import DistillError, DistillSettings
from bincompress.distillation.train import OnStep
from bincompress.distillation.whole_run import OnWritten, train_whole
from bincompress.distillation.windows import tokens_of
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.sources.checkpoint import Checkpoint
from bincompress.store.lock import exclusive
from bincompress.store.store import open_store


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
    places: Places = DEFAULT_PLACES,
    *,
    overwrite: bool = False,
    on_step: OnStep = lambda progress: None,
    on_written: OnWritten = lambda done, total: None,
) -> Distilled:
    """Train a store's coefficients against the unquantized model and write the result as a new store.

    text: what to train on, None where all of it is written by the teacher (settings.written_tokens). An interrupted
    run resumes from its last checkpoint. Raises DistillError, StoreError, CheckpointError, DamagedError or
    UnsupportedModelError.
    """
    begin = time.perf_counter()
    opened = open_store(store)
    check_start(opened, teacher, "--teacher")
    if text is None and not settings.written_tokens:
        raise DistillError("nothing to train on: expected --text FILE, or --data-free")
    check_out(out, store, "--out", overwrite)
    config = checkpoint_config(teacher)
    settings.check_context(config.context)
    work = places.work_of(out)

    def student(device: torch.device, dtype: torch.dtype) -> Student:
        found = Student.of_store(opened, config, device, dtype, settings.norms)
        if not any(found.parameters().values()):
            raise DistillError(f"{store}: it has no packed tensor, so there is nothing to train")
        return found

    with exclusive(out), memory_named(settings.advice):
        if overwrite:
            remove_work(work)
        begun_with = {"store": content_of(opened)}
        tokens = tokens_of(teacher, text) if text is not None else None
        found = train_whole(
            student, teacher, tokens, settings, places, work, begun_with, opened, on_step=on_step, on_written=on_written
        )
        seconds = time.perf_counter() - begin
        log = {"seconds": seconds, "device": device_name(places.chosen()), "torch": torch.__version__}
        trained, vectors = found.student.packed(), trained_vectors(found.student)
        write_store(opened, out, trained, vectors, teacher, {"distillation": found.record}, log)
        remove_work(work)
    return Distilled(**found.summary(), seconds=seconds, resumed_at=found.resumed_at)
