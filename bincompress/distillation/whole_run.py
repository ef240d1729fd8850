"""From a student to a trained one: text, the teacher's own text, checkpoints, and the record of the run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bincompress.compression.tensor_report import six_digits
from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.model import Predictions, Student, teacher_weights
from bincompress.distillation.places import Places
from bincompress.distillation.result import choose_planes
from bincompress.distillation.rounded_inputs import rounded_inputs
from bincompress.distillation.settings import DistillError, DistillSettings
from bincompress.distillation.teacher import Teacher, write_text
from bincompress.distillation.train import Checkpoints, OnStep, Progress, Training, perplexity, writable
from bincompress.distillation.windows import Windows
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.sources.checkpoint import Checkpoint
from bincompress.sources.hub import source_record
from bincompress.store.store import Store

_CURVE_POINTS = 200  # of the losses that a store keeps
_LEAD = 16  # tokens of the text that the teacher goes on from

MakeStudent = Callable[[torch.device, torch.dtype], Student]
OnWritten = Callable[[int, int], None]  # tokens that the teacher has written, of how many


@dataclass(frozen=True)
class Whole:
    """A whole model's training that has come to its end."""

    student: Student
    progress: Progress
    reference: float  # the teacher's held-out perplexity
    record: dict[str, Any]  # for the root's attributes
    resumed_at: int  # step

    def summary(self) -> dict[str, Any]:
        """Return held-out perplexities and steps, as JSON."""
        return {
            "teacher": self.reference, "start": self.progress.judged[0][1], "best": self.progress.best_perplexity,
            "best_step": self.progress.best_step, "steps": self.progress.step, "stopped": self.progress.stopped,
        }  # fmt: skip


def train_whole(
    make_student: MakeStudent,
    teacher: Checkpoint,
    tokens: NDArray[np.int64] | None,
    settings: DistillSettings,
    places: Places,
    work: Path,
    begun_with: dict[str, Any],
    store: Store,
    keep_start: bool = False,
    *,
    on_step: OnStep = lambda progress: None,
    on_written: OnWritten = lambda done, total: None,
) -> Whole:
    """Train all layers of a student at once toward the unquantized model's predictions.

    store: the one that the student begins with. tokens: the text to train on (n,), None where the teacher writes all of
    it. begun_with: what a checkpoint is of, beside the settings and the text. keep_start: whether a start that nothing
    betters is a result. An interrupted run resumes from its last checkpoint in `work`. Raises DistillError.
    """
    config, device = checkpoint_config(teacher), places.chosen()
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    decoder = TorchDecoder(config, device, settings.context, dtype)
    predictions = Predictions(decoder, settings, device)
    weights = teacher_weights(teacher, config, device, dtype)
    windows = _windows(tokens, teacher, predictions, weights, settings, work, on_written)
    fingerprint = str(source_record(teacher)["fingerprint"])
    key = xxhash.xxh3_64_hexdigest(f"{fingerprint} {settings.dtype} {device.type}".encode())
    taught = Teacher(predictions, weights, windows, places.cached_logits, key)
    student = make_student(device, dtype)
    rechoose = (lambda s: choose_planes(s, teacher, device)) if settings.rechoose_planes else None
    inputs = rounded_inputs(store, list(config.tensors()), settings.activation_bits, device)
    of_student = Predictions(decoder.rounding(inputs), settings, device)
    training = Training(student, taught, of_student, windows, settings, rechoose, keep_start)
    record = {"settings": settings.record(), "text": windows.fingerprint, **begun_with}
    checkpoints = Checkpoints(work / "checkpoint.pt", places.checkpoint_every, record)
    state = checkpoints.read(device)
    if state is not None:
        training.load(state)
    resumed_at = training.progress.step
    training.run(checkpoints, on_step)
    reference = perplexity(taught.text_loss, predictions, windows)
    distillation = _record(settings, fingerprint, windows, training.progress, reference)
    return Whole(student, training.progress, reference, distillation, resumed_at)


def _windows(
    tokens: NDArray[np.int64] | None, teacher: Checkpoint, predictions: Predictions, weights: dict[str, torch.Tensor],
    settings: DistillSettings, work: Path, on_written: OnWritten,
) -> Windows:  # fmt: skip
    """Return the windows of the text and of what the teacher writes; the text's, where there is one, judge."""

    def written(leads: NDArray[np.int64] | None) -> NDArray[np.int64]:
        return _written(teacher, predictions, weights, leads, settings, work, on_written)

    if tokens is None:
        return Windows.of(written(None), settings)
    windows = Windows.of(tokens, settings)
    if not settings.written_tokens:
        return windows
    # The beginnings of training windows, so that the teacher writes of what the text is about.
    return windows.with_more(written(windows.training[:, : min(_LEAD, settings.context)]))


def _written(
    teacher: Checkpoint, predictions: Predictions, weights: dict[str, torch.Tensor],
    leads: NDArray[np.int64] | None, settings: DistillSettings, work: Path, on_written: OnWritten,
) -> NDArray[np.int64]:  # fmt: skip
    """Return tokens that the teacher writes; an interrupted run finds them as they were."""
    source = xxhash.xxh3_64(f"{source_record(teacher)['fingerprint']} {settings.dtype}".encode())
    if leads is not None:
        source.update(np.ascontiguousarray(leads).data)
    path = work / f"written-{settings.seed}-{settings.written_tokens}-{settings.context}-{source.hexdigest()}.npy"
    if path.exists():
        return _read_written(path, settings, predictions.decoder.config.vocab)
    first = teacher.config.get("bos_token_id")
    tokens = write_text(
        predictions, weights, settings.written_tokens, settings.context, first if type(first) is int else None,
        leads, settings.seed, lambda done: on_written(done, settings.written_tokens),
    )  # fmt: skip
    partial = path.with_suffix(".partial")
    with writable(path):
        work.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.save(file, tokens)
        partial.replace(path)
    return tokens


def _read_written(path: Path, settings: DistillSettings, vocab: int) -> NDArray[np.int64]:
    """Read what the teacher wrote in an interrupted run; raises DistillError where it is not that."""
    count = -(-settings.written_tokens // settings.context) * settings.context
    try:
        tokens = np.load(path, allow_pickle=False)
        whole = tokens.shape == (count,) and tokens.dtype == np.int64 and 0 <= tokens.min() <= tokens.max() < vocab
    except (OSError, ValueError, EOFError):
        whole = False
    if not whole:
        raise DistillError(
            f"{path}: not the {count:,} tokens of an interrupted run; delete it to have them written anew"
        )
    return np.asarray(tokens)


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
