"""From a store to one whose planes are trained: layer after layer, the whole model, or the one and then the other."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bincompress.distillation.decoder import TorchDecoder, refuse_unknown
from bincompress.distillation.independent import LayerRunner, train_beside
from bincompress.distillation.layer_files import check_layer_files
from bincompress.distillation.layer_run import OnLayers, train_layers
from bincompress.distillation.layers import LayerReport
from bincompress.distillation.model import trained_vectors
from bincompress.distillation.places import (
    DEFAULT_PLACES,
    TRAINING,
    Places,
    check_out,
    check_start,
    content_of,
    device_name,
    memory_named,
    remove_training,
)
from bincompress.distillation.result import write_store
from bincompress.distillation.settings import HELD_OUT, DistillError, DistillSettings, LayerSettings
from bincompress.distillation.tensors import Tensors
from bincompress.distillation.train import OnStep
from bincompress.distillation.whole_run import OnWritten, Whole, train_whole
from bincompress.distillation.windows import Windows, tokens_of
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.sources.checkpoint import Checkpoint
from bincompress.store.lock import exclusive
from bincompress.store.store import Store, is_local, open_store


@dataclass(frozen=True)
class Trained:
    """What came of a training."""

    store: str
    layers: tuple[LayerReport, ...]  # layer after layer
    independent: tuple[LayerReport, ...]  # before that, beside each other
    model: dict[str, Any]  # held-out perplexities and steps of the whole model's training; empty without one
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reports:
    """What came of the layers: trained layer after layer, and beside each other before that."""

    layers: list[LayerReport] = field(default_factory=list)
    independent: list[LayerReport] = field(default_factory=list)

    @property
    def any(self) -> bool:
        """Whether layers were trained at all."""
        return bool(self.layers or self.independent)


def train(
    start: str | None,
    make_start: Callable[[Path], str],
    teacher: Checkpoint,
    text: str,
    out: str,
    layers: LayerSettings | None,
    model: DistillSettings | None,
    scale_bits: int | None = None,
    places: Places = DEFAULT_PLACES,
    *,
    overwrite: bool = False,
    run_layers: LayerRunner | None = None,
    on_layers: OnLayers = lambda done, total, line: None,
    on_step: OnStep = lambda progress: None,
    on_written: OnWritten = lambda done, total: None,
) -> Trained:
    """Train the planes, scales, norms and biases of a store's layers, and write the result as a new store.

    start: the store to begin with; None: the one that make_start makes in the folder that it is given. layers: how
    layers are trained one after the other, toward what the unquantized model's layers give; model: how all are trained
    together, after that, toward its predictions; None leaves one of them out. run_layers: who trains layers that do not
    read each other's output; None is this process. An interrupted run resumes after the last
    completed layer, or from the last checkpoint. Raises DistillError, StoreError, CheckpointError, DamagedError or
    UnsupportedModelError.
    """
    begin = time.perf_counter()
    places.chosen()  # refused before the work, where there is none
    work = places.work_of(out) / TRAINING
    tokens = tokens_of(teacher, text)
    windows = _checked(start, teacher, tokens, out, layers, model, scale_bits, work, overwrite)
    with exclusive(out):
        if overwrite:
            remove_training(work)
        _refuse_other_phases(work, layers, model)
        store = open_store(start if start is not None else make_start(work))
        check_start(store, teacher, "SOURCE")
        tensors = Tensors(store, checkpoint_config(teacher), teacher, scale_bits, keep_latents=_goes_on(layers, model))
        record: dict[str, Any] = {"scale_bits": scale_bits, "start": content_of(store)}
        reports = Reports()
        if layers is not None and windows is not None:
            record["layers"] = {"settings": layers.record(), "text": xxhash.xxh3_128_hexdigest(windows.tobytes())}
            with memory_named("the text's stream or a layer does not fit: lower --windows, or --layer-batch"):
                reports = _layers(tensors, teacher, windows, layers, places, work, record, run_layers, on_layers)
        whole = None
        if model is not None:
            with memory_named(model.advice):
                whole = _whole(tensors, teacher, tokens, model, places, work, record, reports.any, on_step, on_written)
        seconds = time.perf_counter() - begin
        _write(store, out, tensors, teacher, _records(record, reports, whole), places, seconds)
        remove_training(work)
    return Trained(out, tuple(reports.layers), tuple(reports.independent), whole.summary() if whole else {}, seconds)


def _goes_on(layers: LayerSettings | None, model: DistillSettings | None) -> bool:
    """Return whether training goes on from the latents of layers that it has trained."""
    return model is not None or (layers is not None and layers.inputs == "unquantized" and layers.finish_passes > 0)


def _checked(
    start: str | None, teacher: Checkpoint, tokens: NDArray[np.int64], out: str, layers: LayerSettings | None,
    model: DistillSettings | None, scale_bits: int | None, work: Path, overwrite: bool,
) -> NDArray[np.int64] | None:  # fmt: skip
    """Refuse what can be refused before anything is made or removed; returns the windows to train layers on."""
    config = checkpoint_config(teacher)
    refuse_unknown(config)
    for settings in (layers, model):
        if settings is not None:
            settings.check_context(config.context)
    check_out(out, start, "STORE", overwrite)
    if is_local(out) and work.resolve().is_relative_to(Path(out).resolve()):
        raise DistillError(f"--work {work.parent}: lies in STORE, where the result is to be; choose another folder")
    if start is not None:
        opened = open_store(start)
        check_start(opened, teacher, "SOURCE")
        Tensors(opened, config, teacher, scale_bits)
    if model is not None:
        Windows.of(tokens, model)
    return choose_windows(tokens, layers) if layers is not None else None


def _refuse_other_phases(work: Path, layers: LayerSettings | None, model: DistillSettings | None) -> None:
    """Refuse to leave unused, and to remove, what an interrupted run of another kind has trained."""
    for phase, kept, by in ((layers, "*-[0-9]*.safetensors", "layer"), (model, "checkpoint.pt", "model")):
        if phase is None and any(work.glob(kept)):
            raise DistillError(
                f"{work}: a run with --by {by} was interrupted here; use the same options to resume it, or --overwrite "
                "to start again"
            )


def choose_windows(tokens: NDArray[np.int64], settings: LayerSettings) -> NDArray[np.int64]:
    """Return windows of a text's tokens (n,), in an order of the seed's; the first HELD_OUT are to judge only.

    Raises DistillError where the text has too few.
    """
    count, needed = len(tokens) // settings.context, settings.windows + HELD_OUT
    if count < needed:
        raise DistillError(
            f"the text has {len(tokens):,} tokens, {count} windows of {settings.context}; expected at least {needed}, "
            f"{HELD_OUT} of them to judge: give a longer text, or a smaller --windows or --layer-context"
        )
    order = np.random.default_rng(settings.seed).permutation(count)[:needed]
    return tokens[: count * settings.context].reshape(count, settings.context)[order]


def _layers(
    tensors: Tensors, teacher: Checkpoint, windows: NDArray[np.int64], settings: LayerSettings, places: Places,
    work: Path, record: dict[str, Any], run_layers: LayerRunner | None, on_layers: OnLayers,
) -> Reports:  # fmt: skip
    check_layer_files(work, record)
    independent: list[LayerReport] = []
    if settings.inputs == "unquantized":
        independent = train_beside(tensors, teacher, windows, settings, work, record, places, run_layers, on_layers)
        if not settings.finish_passes:
            return Reports(independent=independent)
        settings = replace(settings, passes=settings.finish_passes)
    device = places.chosen()
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    decoder = TorchDecoder(checkpoint_config(teacher), device, settings.context, dtype)
    layers = train_layers(tensors, teacher, decoder, windows, settings, work, record, device, on_layers)
    return Reports(layers, independent)


def _whole(
    tensors: Tensors, teacher: Checkpoint, tokens: NDArray[np.int64], settings: DistillSettings, places: Places,
    work: Path, record: dict[str, Any], keep_start: bool, on_step: OnStep, on_written: OnWritten,
) -> Whole:  # fmt: skip
    names = list(checkpoint_config(teacher).tensors())
    found = train_whole(
        lambda device, dtype: tensors.student(names, device, dtype), teacher, tokens, settings, places, work, record,
        tensors.store, keep_start, on_step=on_step, on_written=on_written,
    )  # fmt: skip
    tensors.put(found.student.packed(), trained_vectors(found.student), {})
    return found


def _records(record: dict[str, Any], reports: Reports, whole: Whole | None) -> dict[str, Any]:
    """Return what the root's attributes say of a training."""
    training = {**record, "reports": [report.record() for report in reports.layers]}
    if reports.independent:
        training["independent"] = [report.record() for report in reports.independent]
    return {"training": training} | ({"distillation": whole.record} if whole else {})


def _write(
    store: Store, out: str, tensors: Tensors, teacher: Checkpoint, records: dict[str, Any], places: Places,
    seconds: float,
) -> None:  # fmt: skip
    log = {"seconds": seconds, "device": device_name(places.chosen()), "torch": torch.__version__}
    write_store(store, out, tensors.packed, tensors.vectors, teacher, records, log)
