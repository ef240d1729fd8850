"""How are the layers of a model trained beside each other, each a job of its own?

With inputs of the unquantized model no layer waits for another. What that loses, as a layer then does not learn to make
up for the layers before it, a pass layer after layer over the result wins back in part.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bincompress.distillation.decoder import TorchDecoder
from bincompress.distillation.layer_files import read_layer
from bincompress.distillation.layer_run import OnLayers, complete_layer
from bincompress.distillation.layers import LayerReport, forward, steps_of
from bincompress.distillation.model import teacher_weights
from bincompress.distillation.places import Places
from bincompress.distillation.rounded_inputs import rounded_inputs
from bincompress.distillation.settings import HELD_OUT, DistillError, LayerSettings
from bincompress.distillation.tensors import Tensors
from bincompress.distillation.train import writable
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.sources.checkpoint import Checkpoint
from bincompress.store.store import open_store

_WINDOWS = "windows.npy"


@dataclass(frozen=True)
class LayerJob:
    """One layer to be trained on the unquantized stream: paths in, and a file of the trained layer out."""

    layer: int
    checkpoint: Checkpoint
    start: str  # the store that it begins with
    work: Path  # a folder with the windows, in which the file is written
    settings: LayerSettings
    scale_bits: int | None
    record: dict[str, Any]  # what must be equal for the file to be used
    places: Places


LayerRunner = Callable[[Sequence[LayerJob]], Iterator[int]]  # yields the number of every layer that is complete


def train_beside(
    tensors: Tensors, teacher: Checkpoint, windows: NDArray[np.int64], settings: LayerSettings, work: Path,
    record: dict[str, Any], places: Places, run: LayerRunner | None = None,
    on_step: OnLayers = lambda done, total, line: None,
) -> list[LayerReport]:  # fmt: skip
    """Train every layer on windows (windows, n) of tokens, of which the first HELD_OUT only judge.

    run: who does the jobs; None is this process, one after the other, with the same result. `tensors` then has what
    was trained. Layers that an interrupted run has completed are not trained again. Raises DistillError.
    """
    steps, layers = steps_of(settings, len(windows) - HELD_OUT), checkpoint_config(teacher).layers
    with writable(work / _WINDOWS):
        work.mkdir(parents=True, exist_ok=True)
        np.save(work / _WINDOWS, windows)
    scale_bits = record["scale_bits"]
    jobs = [
        LayerJob(layer, teacher, tensors.store.url, work, settings, scale_bits, record, places)
        for layer in range(layers)
        if read_layer(_file(work, layer), record, tensors) is None
    ]
    done = layers - len(jobs)

    def tell(step: int, loss: float) -> None:
        on_step(done * steps + step, layers * steps, f"{done} of {layers} layers complete, loss {loss:.3f}")

    for layer in run(jobs) if run is not None else run_here(jobs, tell):
        report = read_layer(_file(work, layer), record, tensors)
        if report is None:
            raise DistillError(
                f"{_file(work, layer)}: is missing, although layer {layer} is complete; can every worker write to the "
                "folder given as --work?"
            )
        done += 1
        on_step(done * steps, layers * steps, f"layer {layer + 1} of {layers}, held out {report.held_out:.3f}")
    reports = [read_layer(_file(work, layer), record, tensors) for layer in range(layers)]
    return [report for report in reports if report is not None]


def run_here(jobs: Sequence[LayerJob], tell: Callable[[int, float], None] = lambda step, loss: None) -> Iterator[int]:
    """Do jobs in this process, one after the other."""
    try:
        for job in jobs:
            train_job(job, tell)
            yield job.layer
    finally:
        _WALKS.clear()


def train_job(job: LayerJob, tell: Callable[[int, float], None] = lambda step, loss: None) -> None:
    """Train one layer and write its file; raises DistillError, and whatever a checkpoint or a store raises."""
    key = f"{job.work} {job.settings} {job.places} {job.record}"
    if key not in _WALKS:
        _WALKS.clear()
        _WALKS[key] = _Walk(job)
    before, after = _WALKS[key].around(job.layer)
    decoder = _WALKS[key].decoder
    tensors = Tensors(open_store(job.start), decoder.config, job.checkpoint, job.scale_bits)
    path, names = _file(job.work, job.layer), tensors.names_of(job.layer)
    decoder = decoder.rounding(rounded_inputs(tensors.store, names, job.settings.activation_bits, before.device))
    complete_layer(tensors, decoder, job.layer, (before, before, after), job.settings, path, job.record, tell)


class _Walk:
    """The unquantized stream at one layer after the other."""

    def __init__(self, job: LayerJob) -> None:
        self._device = job.places.chosen()
        dtype = torch.bfloat16 if job.settings.dtype == "bf16" else torch.float32
        self._checkpoint = job.checkpoint
        self._windows = np.load(job.work / _WINDOWS, allow_pickle=False)
        self.decoder = TorchDecoder(checkpoint_config(job.checkpoint), self._device, job.settings.context, dtype)
        self._layer = 0  # of which `_before` is the input
        self._before = self._embedded()

    def around(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stream before and after a layer, (windows, n, hidden)."""
        if layer < self._layer:
            self._layer, self._before = 0, self._embedded()
        while self._layer < layer:
            self._before = self._after(self._layer)
            self._layer += 1
        return self._before, self._after(layer)

    def _embedded(self) -> torch.Tensor:
        embedding = self.decoder.config.declaration.names.embedding
        weights = self._weights([embedding])
        return self.decoder.embed(weights, torch.from_numpy(self._windows).to(self._device))

    def _after(self, layer: int) -> torch.Tensor:
        prefix = self.decoder.config.declaration.names.layer.format(layer=layer)
        names = [name for name in self.decoder.config.tensors() if name.startswith(prefix)]
        return forward(self.decoder, self._weights(names), self._before, layer)

    def _weights(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return teacher_weights(self._checkpoint, self.decoder.config, self._device, self.decoder.dtype, names)


# The stream that this process has: the layers that it trains mostly follow each other.
_WALKS: dict[str, _Walk] = {}


def _file(work: Path, layer: int) -> Path:
    return work / f"independent-{layer:04d}.safetensors"
