"""Compress layer after layer: each is calibrated on what the layers before it, binarized already, make of a text.

Two residual streams go through the model, that of the unquantized one and that of what the store has so far. A
layer's matrices are jobs as ever, but those that read one input wait for those that it comes from.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bincompress.calibrate import Calibration, begin_calibration, over_parts
from bincompress.checkpoint import Checkpoint
from bincompress.compress import Runner
from bincompress.dequantize import dequantize
from bincompress.errors import TensorError
from bincompress.model.linear import DenseLinear, Embedding, Floats
from bincompress.model.load import CheckpointSource
from bincompress.model.packed import PackedEmbedding
from bincompress.records import Job, JobReport
from bincompress.statistics import Statistics, begin_statistics
from bincompress.store import Store, open_store
from bincompress.watching import WatchedLayer

Tell = Callable[[str], None]


def in_sequence(
    checkpoint: Checkpoint,
    samples: NDArray[np.int64],
    store: str,
    runner: Runner,
    *,
    threads: int = 1,
    tell: Tell = lambda what: None,
) -> Runner:
    """Return a runner that collects each input's statistics before it has `runner` do the jobs that need them.

    samples: tokens (samples, context). store: where the jobs write; statistics lie beside it, at `store`.sequence,
    until all is done, so that an interrupted run goes on after its last whole layer. threads: of the collecting, whose
    bytes do not depend on it. tell: is told what is being collected.
    """
    work = begin_calibration(checkpoint, samples)

    def run(jobs: Sequence[Job]) -> Generator[JobReport, None, None]:
        yield from _Sequence(work, open_store(store), runner, threads, tell).run(jobs)

    return run


@dataclass(frozen=True)
class _Stream:
    """The residual stream before a layer, (samples, context, hidden)."""

    exact: Floats  # of the unquantized model
    packed: Floats  # of the store

    def __getitem__(self, part: slice) -> "_Stream":
        return _Stream(self.exact[part], self.packed[part])


@dataclass(frozen=True)
class _Sum:
    """What a part's tokens add to one input's statistics; see `records.Inputs`."""

    arrays: dict[str, Floats]  # hessian and drift or lack
    absmax: Floats


@dataclass(frozen=True)
class _Sequence:
    work: Calibration
    store: Store
    runner: Runner
    threads: int
    tell: Tell

    def run(self, jobs: Sequence[Job]) -> Generator[JobReport, None, None]:
        """Do the jobs of no layer, then layer by layer; after a failure, nothing that depends on what has failed."""
        if self.store.attributes["status"] == "complete":
            yield from self._do([self._as_written(job) for job in jobs])
            return
        config = self.work.config
        begun = any(self.store.node_attributes(job.name) for job in jobs)
        found = begin_statistics(statistics_url(self.store.url), self.work.record(), overwrite=not begun)
        keys: dict[str, str] = found.attributes["inputs"]
        by_input: dict[str, list[Job]] = {}
        for job in jobs:
            by_input.setdefault(keys.get(_reader(job), ""), []).append(job)
        lost = yield from self._do(by_input.get("", []))
        failed = config.declaration.names.embedding if config.declaration.names.embedding in lost else ""
        first, stream = self._resumed(found)
        for layer in range(config.layers):
            for number, (key, tensors) in enumerate(config.inputs_of_layer(layer).items()):
                ready = by_input.get(key, [])
                if failed:
                    yield from (_not_begun(job, failed) for job in ready)
                    continue
                if any(_calibrated(job) for job in ready):
                    if layer >= first:
                        self.tell(f"layer {layer + 1} of {config.layers}, input {number + 1} of 4")
                        arrays = self._collect(layer, key, stream)
                        found.write(key, tensors, self.work.samples.size, arrays)
                    ready = [self._with_statistics(job, found) if _calibrated(job) else job for job in ready]
                self.tell("")
                lost += yield from self._do(ready)
                failed = lost[-1] if set(lost) & {job.name for job in ready} else ""
            if layer >= first and not failed:
                stream = self._after(layer, stream)
                found.write_work(_work_name(layer + 1), np.concatenate([stream.exact, stream.packed]))
                found.remove_work(_work_name(layer))
        if not lost:
            found.remove()

    def _do(self, jobs: list[Job]) -> Generator[JobReport, None, list[str]]:
        """Run jobs and yield their reports; returns the names of those that failed."""
        failed: list[str] = []
        if jobs:
            with contextlib.closing(self.runner(jobs)) as reports:
                for report in reports:
                    yield report
                    if report.status == "failed":
                        failed.append(report.name)
        return failed

    def _as_written(self, job: Job) -> Job:
        """Return the job with the statistics that the complete tensor was made with, though they are gone."""
        fingerprint = self.store.node_attributes(job.name).get("fingerprint", {})
        return replace(job, inputs_hash=fingerprint.get("inputs", ""))

    def _with_statistics(self, job: Job, found: Statistics) -> Job:
        return replace(job, statistics=found.url, inputs_hash=found.hash_of(_reader(job)))

    def _resumed(self, found: Statistics) -> tuple[int, _Stream]:
        """Return the first layer that is not done, and the stream before it."""
        for layer in range(self.work.config.layers, 0, -1):
            both = found.read_work(_work_name(layer))
            if both is not None:
                return layer, _Stream(*np.split(both, 2))
        exact = self.work.embed()
        table = _SoFar(self.store, self.work).embedding(self.work.config.declaration.names.embedding)
        return 0, _Stream(exact, table.rows_of(self.work.samples.reshape(-1)).reshape(exact.shape))

    def _layers(self, layer: int) -> tuple[WatchedLayer, WatchedLayer]:
        """Return a layer of the unquantized model, and as the store has it so far."""
        config = self.work.config
        exact = CheckpointSource(self.work.checkpoint, config)
        return WatchedLayer(config, exact, layer), WatchedLayer(config, _SoFar(self.store, self.work), layer)

    def _collect(self, layer: int, key: str, stream: _Stream) -> dict[str, Floats]:
        """Return what the store is to know of an input: means over the tokens."""
        keys = list(self.work.config.inputs_of_layer(layer))
        watched = self._layers(layer)
        sums: dict[str, NDArray[np.float64]] = {}
        absmax = np.zeros(0, np.float32)
        run = functools.partial(_part, *watched, keys, key)
        for part in over_parts(self.work, self.threads, lambda samples: run(stream[samples])):
            for name, values in part.arrays.items():
                sums[name] = sums[name] + values if name in sums else values.astype(np.float64)
            absmax = np.maximum(absmax, part.absmax) if absmax.size else part.absmax
        arrays = {name: (values / self.work.samples.size).astype(np.float32) for name, values in sums.items()}
        arrays["absmax"] = absmax
        if not all(np.isfinite(values).all() for values in arrays.values()):
            raise TensorError(f"{key}: its inputs are not finite on this text; is the checkpoint damaged?")
        return arrays

    def _after(self, layer: int, stream: _Stream) -> _Stream:
        exact, packed = self._layers(layer)
        after = _Stream(np.empty_like(stream.exact), np.empty_like(stream.packed))

        def run(samples: slice) -> None:
            after.exact[samples] = exact(stream.exact[samples]).after
            after.packed[samples] = packed(stream.packed[samples]).after

        for _ in over_parts(self.work, self.threads, run):
            pass
        return after


def statistics_url(store: str) -> str:
    """Return where the statistics of an unfinished store lie."""
    return f"{store.rstrip('/')}.sequence"


def _work_name(layer: int) -> str:
    return f"stream-{layer}"


def _calibrated(job: Job) -> bool:
    return job.shared is not None or job.settings.calibrated


def _reader(job: Job) -> str:
    """Return the matrix whose input the job hangs on: its own, or of a norm that a transformation is folded into."""
    return job.shared.members[0].name if job.shared is not None else job.name


def _not_begun(job: Job, failed: str) -> JobReport:
    error = f"{job.name}: not begun, as it is calibrated on what {failed} gives, which failed"
    return JobReport(job.name, "failed", 0.0, 0, error=error, store=job.store)


def _part(exact: WatchedLayer, packed: WatchedLayer, keys: list[str], key: str, stream: _Stream) -> _Sum:
    """Run a part of both streams up to one input and return its sums."""
    number = keys.index(key)
    own = [keys[1]] if number == 3 else []  # what attention has added before the second half of the layer
    was = exact(stream.exact, inputs=[key], outputs=own, last=key)
    now = packed(stream.packed, inputs=[key], outputs=own, last=key)
    x = now.inputs[key]
    arrays = {"hessian": x.T @ x}
    drift = was.inputs[key] - x
    if number in (1, 3):
        lack = exact.multiply(key, drift) + (stream.exact - stream.packed).reshape(len(x), -1)
        for name in own:
            lack += was.outputs[name] - now.outputs[name]
        arrays["lack"] = lack.T @ x
    else:
        arrays["drift"] = drift.T @ x
    return _Sum(arrays, np.maximum(x.max(axis=0), -x.min(axis=0)))


class _SoFar:
    """A model's weights, those that the store has already as it has them."""

    def __init__(self, store: Store, work: Calibration) -> None:
        self._store = store
        self._exact = CheckpointSource(work.checkpoint, work.config)

    def _has(self, name: str) -> bool:
        return self._store.node_attributes(name).get("status") == "complete"

    def vector(self, names: Sequence[str]) -> Floats:
        """Return one-dimensional tensors, one after the other."""
        return np.concatenate(
            [
                self._store.read_plain(name)[0].float32().reshape(-1) if self._has(name) else self._exact.vector([name])
                for name in names
            ]
        )

    def linear(self, names: Sequence[str]) -> DenseLinear:
        """Return matrices with the same input as one, rows one below the other."""
        if not all(self._has(name) for name in names):
            return self._exact.linear(names)
        return DenseLinear(np.concatenate(list(self._dense(names))))

    def _dense(self, names: Sequence[str]) -> Iterator[Floats]:
        kinds = self._store.tensors()
        for name in names:
            if kinds[name] == "packed":
                yield dequantize(self._store.read_packed(name, check_hashes=True))
            else:
                yield self._store.read_plain(name)[0].float32()

    def embedding(self, name: str) -> Embedding:
        """Return the table of token vectors."""
        if self._has(name) and self._store.tensors()[name] == "packed":
            return PackedEmbedding(self._store.read_packed(name, check_hashes=True))
        return self._exact.embedding(name)
