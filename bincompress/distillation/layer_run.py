"""From a store to trained layers, one after the other; what is complete is found again when the run is resumed."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.layers import LayerReport, Objective, forward, steps_of, train_layer
from bincompress.distillation.model import Student, teacher_weights, trained_vectors
from bincompress.distillation.settings import HELD_OUT, DistillError, LayerSettings
from bincompress.distillation.tensors import Tensors
from bincompress.distillation.train import writable
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
    exact = decoder.embed(teacher_weights(teacher, decoder.config, device, dtype, [embedding]), ids)
    stream = decoder.embed({embedding: tensors.fixed(embedding, device, dtype)}, ids)
    reports = []
    for layer in range(layers):
        begin = time.perf_counter()
        names = tensors.names_of(layer)
        after = forward(decoder, teacher_weights(teacher, decoder.config, device, dtype, names), exact, layer)
        path = work / f"layer-{layer:04d}.safetensors"
        report = _read(path, record, tensors)
        if report is None:
            student = tensors.student(names, device, dtype)

            def tell(step: int, loss: float, layer: int = layer) -> None:
                on_step(layer * steps + step, layers * steps, f"layer {layer + 1} of {layers}, loss {loss:.3f}")

            found = _trained(decoder, layer, student, stream, exact, after, settings, tell)
            report = LayerReport(layer, *found, seconds=time.perf_counter() - begin)
            if not report.held_out < report.held_out_start:  # it learned these windows alone: it stays as it began
                student = tensors.student(names, device, dtype)
                report = replace(report, held_out=report.held_out_start, flips=0.0)
            _write(path, record, student, report)
            if _read(path, record, tensors) is None:
                raise DistillError(f"{path}: cannot be read back; is another program changing it?")
            del student
        # What the next layer reads comes from the tensors as they are stored, also in a run without interruption.
        now = {name: tensors.fixed(name, device, dtype) for name in names}
        stream = forward(decoder, now, stream, layer, into=stream)
        exact = after
        reports.append(report)
        on_step((layer + 1) * steps, layers * steps, f"layer {layer + 1} of {layers}, held out {report.held_out:.3f}")
    return reports


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


def _write(path: Path, record: dict[str, Any], student: Student, report: LayerReport) -> None:
    arrays: dict[str, Any] = {f"vector {name}": values for name, values in trained_vectors(student).items()}
    exponents = {}
    for name, packed in student.packed().items():
        arrays |= {f"planes {name}": packed.planes, f"numbers {name}": packed.numbers}
        exponents[name] = packed.exponent
    for group in student.planes:
        arrays |= {f"latents {name}": latents for name, latents in group.latents().items()}
    about = {"record": record, "report": vars(report), "exponents": exponents}
    partial = path.with_suffix(".partial")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: np.ascontiguousarray(a) for key, a in arrays.items()}, partial, {"about": json.dumps(about)})
        partial.replace(path)


def _read(path: Path, record: dict[str, Any], tensors: Tensors) -> LayerReport | None:
    """Give `tensors` what a file has of a layer and return its report; None where there is no such file.

    Raises DistillError where another run wrote it, or it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["about"])
            wanted = _KINDS if tensors.keeps_latents else _STORED
            arrays = {key: file.get_tensor(key) for key in file.keys() if key.startswith(wanted)}  # noqa: SIM118
        if about["record"] != json.loads(json.dumps(record)):
            raise DistillError(
                f"{path}: a run with other settings, text or store was interrupted here; use the same to resume, or "
                "--overwrite to start again"
            )
        of = {kind.strip(): {k[len(kind) :]: a for k, a in arrays.items() if k.startswith(kind)} for kind in _KINDS}
        tensors.check_vectors(of["vector"])
        packed = {
            name: tensors.with_trained(name, planes, of["numbers"][name], about["exponents"][name])
            for name, planes in of["planes"].items()
        }
        tensors.put(packed, of["vector"], of["latents"])
        return LayerReport(**about["report"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise DistillError(
            f"{path}: not a readable file of a trained layer ({type(error).__name__}); delete it to train this layer "
            "again"
        ) from None


_STORED = ("planes ", "numbers ", "vector ")
_KINDS = (*_STORED, "latents ")
