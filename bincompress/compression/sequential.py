"""Compress layer after layer: each is calibrated on what the layers before it, binarized already, make of a text.

Two residual streams go through the model, that of the unquantized one and that of what the store has so far. A
layer's matrices are jobs as ever, but those that read one input wait for those that it comes from.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bincompress.calibration.collect import Calibration, begin_calibration, over_parts
from bincompress.calibration.layer_forward import INPUTS, Walk
from bincompress.calibration.statistics import Statistics, begin_statistics, remove_left, statistics_at
from bincompress.compression.records import Job, JobReport, failed_report
from bincompress.compression.run import Runner
from bincompress.errors import StoreError, TensorError
from bincompress.model.checkpoint_source import CheckpointSource
from bincompress.model.config import ModelConfig
from bincompress.model.decoder import embedded, read_layer
from bincompress.model.linear import DenseLinear, Embedding, Floats
from bincompress.model.low_rank_linear import LowRankEmbedding
from bincompress.model.packed_linear import PackedEmbedding
from bincompress.model.steps import Layer
from bincompress.sources.checkpoint import Checkpoint
from bincompress.store.store import Store, open_store
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.low_rank import LowRankTensor

Tell = Callable[[str], None]
# Residual streams (samples, context, hidden): of the unquantized model, and of what the store has so far.
Streams = tuple[Floats, Floats]
_KIND = "sequence"  # of the statistics of an unfinished run
_WRITERS = (1, 3)  # inputs whose matrix adds to the residual stream


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


def memory(config: ModelConfig, tokens: int) -> int:
    """Return about how many bytes collecting the statistics of so many tokens takes, beside what jobs take."""
    # The streams before and after a layer, and those on their way through it; what the widest matrices read.
    walked = 4 * tokens * (6 * config.hidden + 2 * config.inner)
    weights = sum(math.prod(shape) for name, shape in config.tensors().items() if ".0." in name)
    return walked + 2 * 4 * weights + 2 * 8 * config.inner**2


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
        reports = self._if_unchanged(jobs)
        if reports:
            yield from reports
            return
        config = self.work.config
        found = self._begin(jobs)
        keys: dict[str, str] = found.attributes["inputs"]
        by_input: dict[str, list[Job]] = {}
        for job in jobs:
            by_input.setdefault(keys.get(_reader(job), ""), []).append(job)
        lost = yield from self._do(by_input.get("", []))
        failed = config.declaration.names.embedding if config.declaration.names.embedding in lost else ""
        first, streams = self._resumed(found)
        for layer in range(config.layers):
            to_do = layer >= first and not failed
            both = _Both(self.work, self.store, layer, streams) if to_do else None
            for number, (key, tensors) in enumerate(config.inputs_of_layer(layer).items()):
                ready = by_input.get(key, [])
                if failed:
                    yield from (_not_begun(job, failed) for job in ready)
                    continue
                if both is not None:
                    self.tell(f"layer {layer + 1} of {config.layers}, input {number + 1} of {INPUTS}")
                    arrays = self._collect(both, number, key)
                    found.write(key, tensors, self.work.samples.size, arrays)
                    self.tell("")
                ready = [self._with_statistics(job, found) if _calibrated(job) else job for job in ready]
                lost += yield from self._do(ready)
                failed = lost[-1] if set(lost) & {job.name for job in ready} else ""
            if both is not None and not failed:
                streams = both.finish(self.threads)
                found.write_work(_work_name(layer + 1), np.concatenate(streams))
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

    def _if_unchanged(self, jobs: Sequence[Job]) -> list[JobReport]:
        """Return the reports of all jobs if all are done already; their statistics are gone then, and not needed."""
        nodes = {job.name: self.store.node_attributes(job.name) for job in jobs}
        if any(node.get("status") != "complete" for node in nodes.values()):
            return []
        again = [replace(job, inputs_hash=nodes[job.name]["fingerprint"].get("inputs", "")) for job in jobs]
        with contextlib.closing(self.runner(again)) as running:
            reports = list(running)
        if any(report.status != "unchanged" for report in reports):
            return []
        remove_left(statistics_url(self.store.url), _KIND)
        return reports

    def _begin(self, jobs: Sequence[Job]) -> Statistics:
        """Return the statistics of an interrupted run, or new ones; raises StoreError where others lie there."""
        url = statistics_url(self.store.url)
        left = statistics_at(url)
        if left is not None and left.attributes.get("kind") != _KIND:
            raise StoreError(
                f"{url}: --sequential keeps its statistics there, but the folder holds others; move or remove them"
            )
        begun = any(self.store.node_attributes(job.name) for job in jobs)
        return begin_statistics(url, {"kind": _KIND, **self.work.record()}, overwrite=left is not None and not begun)

    def _with_statistics(self, job: Job, found: Statistics) -> Job:
        return replace(job, statistics=found.url, inputs_hash=found.hash_of(_reader(job)))

    def _resumed(self, found: Statistics) -> tuple[int, Streams]:
        """Return the first layer that is not done, and the streams before it."""
        config, known = self.work.config, 0
        while known < config.layers and all(found.has(key) for key in config.inputs_of_layer(known)):
            known += 1
        for layer in range(known, 0, -1):
            both = found.read_work(_work_name(layer))
            if both is not None:
                exact, packed = np.split(both, 2)
                return layer, (exact, packed)
        exact = self.work.embed()
        table = _SoFar(self.store, self.work).embedding(self.work.config.declaration.names.embedding)
        return 0, (exact, embedded(config, table, self.work.samples.reshape(-1)).reshape(exact.shape))

    def _collect(self, both: "_Both", number: int, key: str) -> dict[str, Floats]:
        """Return what the store is to know of an input: means over the tokens."""
        sums: dict[str, NDArray[np.float64]] = {}
        absmax = np.zeros(0, np.float32)
        for part in both.go_on(number, self.threads):
            for name, values in part.arrays.items():
                sums[name] = sums[name] + values if name in sums else values.astype(np.float64)
            absmax = np.maximum(absmax, part.absmax) if absmax.size else part.absmax
        arrays = {name: (values / self.work.samples.size).astype(np.float32) for name, values in sums.items()}
        arrays["absmax"] = absmax
        if not all(np.isfinite(values).all() for values in arrays.values()):
            raise TensorError(f"{key}: its inputs are not finite on this text; is the checkpoint damaged?")
        return arrays


class _Both:
    """Both models on their way through one layer, part by part."""

    def __init__(self, work: Calibration, store: Store, layer: int, streams: Streams) -> None:
        self._layer = layer
        self._exact = read_layer(work.config, CheckpointSource(work.checkpoint, work.config), layer)
        self._work, self._url = work, store.url
        self._walks = [tuple(Walk(work.config, layer, stream[part]) for stream in streams) for part in work.parts]

    def go_on(self, number: int, threads: int) -> Iterator[_Sum]:
        """Go to the next input, and yield the parts' sums in their order."""
        yield from over_parts(
            self._walks, threads, functools.partial(_sum, number, self._work.config, *self._weights())
        )

    def finish(self, threads: int) -> Streams:
        """Go to the end of the layer and return the streams there."""
        weights = self._weights()

        def run(pair: tuple[Walk, ...]) -> list[Floats]:
            for walk, own in zip(pair, weights, strict=True):
                walk.go_on(INPUTS, own)
            return [walk.stream for walk in pair]

        exact, packed = zip(*over_parts(self._walks, threads, run), strict=True)
        return np.concatenate(exact), np.concatenate(packed)

    def _weights(self) -> tuple[Layer, Layer]:
        """Return the layer of the unquantized model, and as the store has it by now."""
        # Opened anew: a store remembers attributes, and tensors are redone within a run.
        so_far = _SoFar(open_store(self._url), self._work)
        return self._exact, read_layer(self._work.config, so_far, self._layer)


def _sum(number: int, config: ModelConfig, exact: Layer, packed: Layer, pair: tuple[Walk, Walk]) -> _Sum:
    """Take a part to an input in both models and return its sums."""
    was, now = pair
    was.go_on(number, exact)
    if number not in _WRITERS:  # before anything is folded into the norm, as an interrupted run may have done already
        packed = replace(packed, input_norm=exact.input_norm, post_norm=exact.post_norm)
    now.go_on(number, packed)
    x, drift = now.x, was.x - now.x
    arrays = {"hessian": x.T @ x}
    if number in _WRITERS:
        matrix, norm = (exact.out, exact.out_norm) if number == 1 else (exact.down, exact.down_norm)
        lack = matrix(drift)
        if not norm.size:  # through a norm, a matrix cannot make up for what the stream lacks by adding it
            behind = (was.stream - now.stream).reshape(len(x), -1)
            lack += behind if config.residual_multiplier == 1 else behind / np.float32(config.residual_multiplier)
        arrays["lack"] = lack.T @ x
    else:
        arrays["drift"] = drift.T @ x
    return _Sum(arrays, np.maximum(x.max(axis=0), -x.min(axis=0)))


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


def _not_begun(job: Job, cause: str) -> JobReport:
    return failed_report(job, f"{job.name}: not started: it is calibrated on the output of {cause}, which failed")


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
                yield dequantize(self._store.read_stored(name, check_hashes=True))
            else:
                yield self._store.read_plain(name)[0].float32()

    def embedding(self, name: str) -> Embedding:
        """Return the table of token vectors."""
        if self._has(name) and self._store.tensors()[name] == "packed":
            packed = self._store.read_stored(name, check_hashes=True)
            return LowRankEmbedding(packed) if isinstance(packed, LowRankTensor) else PackedEmbedding(packed)
        return self._exact.embedding(name)
