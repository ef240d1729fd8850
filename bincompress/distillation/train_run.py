"""From a store to one whose planes are trained: layer after layer, the whole model, or the one and then the other."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bincompress.distillation.decoder import TorchDecoder, refuse_unknown
from bincompress.distillation.layer_run import HELD_OUT, OnLayers, train_layers
from bincompress.distillation.layers import LayerReport
from bincompress.distillation.model import trained_vectors
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
from bincompress.distillation.run import advice, check_context
from bincompress.distillation.settings import DistillError, DistillSettings, LayerSettings
from bincompress.distillation.tensors import Tensors
from bincompress.distillation.train import OnStep
from bincompress.distillation.whole_run import OnWritten, Whole, train_whole
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import Checkpoint
from bincompress.store.lock import exclusive
from bincompress.store.store import Store, open_store


@dataclass(frozen=True)
class Trained:
    """What came of a training."""

    store: str
    layers: tuple[LayerReport, ...]
    model: dict[str, Any]  # held-out perplexities and steps of the whole model's training; empty without one
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def train(
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
    on_layers: OnLayers = lambda done, total, line: None,
    on_step: OnStep = lambda progress: None,
    on_written: OnWritten = lambda done, total: None,
) -> Trained:
    """Train the planes, scales, norms and biases of a store's layers, and write the result as a new store.

    make_start: returns the store to begin with; it may make one in the folder that it is given. layers: how layers
    are trained one after the other, toward what the unquantized model's layers give; model: how all are trained
    together, after that, toward its predictions; None leaves one of them out. An interrupted run resumes after the last
    completed layer, or from the last checkpoint. Raises DistillError, StoreError, CheckpointError, DamagedError or
    UnsupportedModelError.
    """
    begin = time.perf_counter()
    config = checkpoint_config(teacher)
    refuse_unknown(config)
    for settings in (layers, model):
        if settings is not None:
            check_context(settings.context, config.context)
    check_out(out, None, "STORE", overwrite)
    work = places.work_of(out)
    windows = choose_windows(teacher, text, layers) if layers is not None else None
    with exclusive(out):
        if overwrite:
            remove_work(work)
        store = open_store(make_start(work))
        check_start(store, teacher, "SOURCE")
        tensors = Tensors(store, config, teacher, scale_bits, keep_latents=model is not None)
        record: dict[str, Any] = {"scale_bits": scale_bits, "start": content_of(store)}
        reports: list[LayerReport] = []
        if layers is not None and windows is not None:
            record["layers"] = {"settings": layers.record(), "text": xxhash.xxh3_128_hexdigest(windows.tobytes())}
            with memory_named(f"{layers.batch} windows of {layers.context} tokens were trained at once: lower --batch"):
                reports = _layers(tensors, teacher, windows, layers, places, work, record, on_layers)
        whole = None
        if model is not None:
            with memory_named(advice(model)):
                whole = _whole(tensors, teacher, text, model, places, work, record, on_step, on_written)
        seconds = time.perf_counter() - begin
        _write(store, out, tensors, teacher, _records(record, reports, whole), places, seconds)
        remove_work(work)
    return Trained(out, tuple(reports), whole.summary() if whole else {}, seconds)


def choose_windows(teacher: Checkpoint, text: str, settings: LayerSettings) -> NDArray[np.int64]:
    """Return windows of a text, from all over it, in an order of the seed's; the first HELD_OUT are to judge only.

    Raises DistillError where the text has too few.
    """
    tokens = np.array(load_tokenizer(teacher.assets()).encode(text), np.int64)
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
    work: Path, record: dict[str, Any], on_layers: OnLayers,
) -> list[LayerReport]:  # fmt: skip
    device = places.chosen()
    dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
    decoder = TorchDecoder(checkpoint_config(teacher), device, settings.context, dtype)
    return train_layers(tensors, teacher, decoder, windows, settings, work, record, device, on_layers)


def _whole(
    tensors: Tensors, teacher: Checkpoint, text: str, settings: DistillSettings, places: Places, work: Path,
    record: dict[str, Any], on_step: OnStep, on_written: OnWritten,
) -> Whole:  # fmt: skip
    names = list(checkpoint_config(teacher).tensors())
    found = train_whole(
        lambda device, dtype: tensors.student(names, device, dtype), teacher, text, settings, places, work, record,
        on_step=on_step, on_written=on_written,
    )  # fmt: skip
    tensors.put(found.student.packed(), trained_vectors(found.student), {})
    return found


def _records(record: dict[str, Any], reports: list[LayerReport], whole: Whole | None) -> dict[str, Any]:
    """Return what the root's attributes say of a training."""
    training = {**record, "reports": [report.record() for report in reports]}
    return {"training": training} | ({"distillation": whole.record} if whole else {})


def _write(
    store: Store, out: str, tensors: Tensors, teacher: Checkpoint, records: dict[str, Any], places: Places,
    seconds: float,
) -> None:  # fmt: skip
    log = {"seconds": seconds, "device": device_name(places.chosen()), "torch": torch.__version__}
    write_store(store, out, tensors.packed, tensors.vectors, teacher, records, log)
