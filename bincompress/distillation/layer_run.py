"""From a store to trained layers, one after the other; what is complete is found again when the run is resumed."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.layer_files import read_layer, write_layer
from bincompress.distillation.layers import LayerReport, Objective, embed, forward, steps_of, train_layer
from bincompress.distillation.model import Student, teacher_weights
from bincompress.distillation.rounded_inputs import rounded_inputs
from bincompress.distillation.settings import HELD_OUT, DistillError, LayerSettings
from bincompress.distillation.streams import Streams
from bincompress.distillation.tensors import Tensors
from bincompress.sources.checkpoint import Checkpoint

OnLayers = Callable[[int, int, str], None]  # steps done, of how many, and what is said of them


def train_layers(
    tensors: Tensors,
    teacher: Checkpoint,
    decoder: TorchDecoder,
    windows: NDArray[np.int64],
    settings: LayerSettings,
    work: Path,
    record: dict[str, Any],
    device: torch.device,
    on_step: OnLayers = lambda done, total, line: None,
) -> list[LayerReport]:
    """Train every layer of a model on windows (windows, n) of tokens, of which the first HELD_OUT only judge.

    work: a folder that keeps a file for each completed layer; record: what must be equal for them to be used again.
    `tensors` then has what was trained.
    """
    layers, dtype = decoder.config.layers, decoder.dtype
    steps = steps_of(settings, len(windows) - HELD_OUT)
    ids = torch.from_numpy(windows).to(device)
    embedding = decoder.config.declaration.names.embedding
    reports = []
    with Streams((*windows.shape, decoder.config.hidden), device, work) as streams:
        stream, exact, after = (streams.room() for _ in range(3))
        embed(decoder, teacher_weights(teacher, decoder.config, device, dtype, [embedding]), ids, exact)
        embed(decoder, {embedding: tensors.fixed(embedding, device, dtype)}, ids, stream)
        for layer in range(layers):
            names = tensors.names_of(layer)
            unquantized = teacher_weights(teacher, decoder.config, device, dtype, names)
            forward(decoder, unquantized, exact, layer, into=after)
            del unquantized
            reading = decoder.rounding(rounded_inputs(tensors.store, names, settings.activation_bits, device))

            def tell(step: int, loss: float, layer: int = layer) -> None:
                on_step(layer * steps + step, layers * steps, f"layer {layer + 1} of {layers}, loss {loss:.3f}")

            report = _kept_or_complete(tensors, reading, layer, (stream, exact, after), settings, work, record, tell)
            # What the next layer reads comes from the tensors as they are stored, also in a run without interruption.
            forward(reading, {name: tensors.fixed(name, device, dtype) for name in names}, stream, layer, into=stream)
            exact, after = after, exact
            reports.append(report)
            line = f"layer {layer + 1} of {layers}, held out {report.held_out:.3f}"
            on_step((layer + 1) * steps, layers * steps, line)
    return reports


def _kept_or_complete(
    tensors: Tensors, decoder: TorchDecoder, layer: int, streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    settings: LayerSettings, work: Path, record: dict[str, Any], tell: Callable[[int, float], None],
) -> LayerReport:  # fmt: skip
    """Return the report of a layer that an interrupted run completed, or complete it; `tensors` then has it."""
    path = work / f"layer-{layer:04d}.safetensors"
    report = read_layer(path, record, tensors)
    if report is None:
        report = complete_layer(tensors, decoder, layer, streams, settings, path, record, tell)
        if read_layer(path, record, tensors) is None:
            raise DistillError(f"{path}: cannot be read back; is another program changing it?")
    return report


def complete_layer(
    tensors: Tensors, decoder: TorchDecoder, layer: int, streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    settings: LayerSettings, path: Path, record: dict[str, Any], tell: Callable[[int, float], None],
) -> LayerReport:  # fmt: skip
    """Train one layer and write it to a file; one that gains nothing on held-out windows stays as it began.

    streams: what the layer reads, and the unquantized stream before and after it, (windows, n, hidden); the first
    HELD_OUT windows only judge.
    """
    begin = time.perf_counter()
    names, device = tensors.names_of(layer), streams[0].device
    student = tensors.student(names, device, decoder.dtype)
    found = _trained(decoder, layer, student, *streams, settings, tell)
    report = LayerReport(layer, *found, seconds=time.perf_counter() - begin)
    if not report.held_out < report.held_out_start:  # it learned these windows alone
        del student
        student = tensors.student(names, device, decoder.dtype)
        report = replace(report, held_out=report.held_out_start, flips=0.0)
    write_layer(path, record, student, report)
    return report


def _trained(
    decoder: TorchDecoder, layer: int, student: Student, stream: torch.Tensor, exact: torch.Tensor,
    after: torch.Tensor, settings: LayerSettings, tell: Callable[[int, float], None],
) -> tuple[float, float, float, float, float]:  # fmt: skip
    """Train one layer; returns its losses (start, end, held out at both) and the share of changed levels."""
    objective = Objective(exact, after)

    def judged() -> float:
        weights = {name: values.detach() for name, values in student.weights().items()}
        found = forward(decoder, weights, stream[:HELD_OUT], layer)
        return float(objective(found, after[:HELD_OUT]))

    before = [group.codes() for group in student.planes]
    held_out_start = judged()
    start, end = train_layer(decoder, layer, student, stream[HELD_OUT:], after[HELD_OUT:], objective, settings, tell)
    changed = sum(int((old != group.codes()).sum()) for old, group in zip(before, student.planes, strict=True))
    weights = sum(old.numel() for old in before)
    return start, end, held_out_start, judged(), changed / max(1, weights)
