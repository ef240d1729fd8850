"""What do a model's linear layers read? The checkpoint is run over a text one decoder layer at a time.

Memory holds one layer, the residual stream of the samples and the sums of one layer. Samples are split into parts of
fixed size, each an independent piece of work; the sums of parts are added in their order, so that threads, processes
and nodes give the same bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import threadpoolctl
import xxhash
from numpy.typing import NDArray

from bincompress.calibration.layer_forward import INPUTS, Walk
from bincompress.calibration.statistics import Statistics, begin_statistics
from bincompress.errors import BincompressError, TensorError
from bincompress.model.checkpoint_source import CheckpointSource, checkpoint_config
from bincompress.model.config import ModelConfig, parse
from bincompress.model.decoder import embedded, read_layer
from bincompress.model.linear import Floats
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import Checkpoint
from bincompress.sources.hub import source_record
from bincompress.store.lock import exclusive

T = TypeVar("T")
Part = TypeVar("Part")
Progress = Callable[[int, int], None]  # pieces done, pieces in all
SAMPLES, CONTEXT = 64, 512  # of a calibration: windows and their tokens
_PART_TOKENS = 4096  # whose products are summed in float32, by BLAS; the sums of parts are added in float64


@dataclass(frozen=True)
class Sum:
    """What a part's tokens add to one input's statistics."""

    gram: Floats  # (cols, cols): the sum of x x^T
    absmax: Floats  # (cols,)
    tokens: int  # that reached it: of an expert's input those that chose the expert


@dataclass(frozen=True)
class Calibration:
    """What is run over what: enough to do any part of it, anywhere."""

    checkpoint: Checkpoint
    config: ModelConfig
    samples: NDArray[np.int64]  # (samples, context) tokens
    part_tokens: int

    @property
    def parts(self) -> list[slice]:
        """The samples of each part."""
        step = max(1, self.part_tokens // self.samples.shape[1])
        return [slice(start, start + step) for start in range(0, len(self.samples), step)]

    def embed(self) -> Floats:
        """Return the residual stream before the first layer, (samples, context, hidden)."""
        source = CheckpointSource(self.checkpoint, self.config)
        table = source.embedding(self.config.declaration.names.embedding)
        vectors = embedded(self.config, table, self.samples.reshape(-1))
        return vectors.reshape(*self.samples.shape, self.config.hidden)

    def record(self) -> dict[str, Any]:
        """Return what has to be equal for statistics to be the same, and which input every matrix reads, as JSON."""
        groups = [self.config.inputs_of_layer(layer) for layer in range(self.config.layers)]
        return {
            "source": source_record(self.checkpoint),
            **text_record(self.samples),
            "inputs": {tensor: key for layer in groups for key, tensors in layer.items() for tensor in tensors},
        }


def text_record(samples: NDArray[np.int64]) -> dict[str, Any]:
    """Return what a text is known by, as JSON."""
    text = xxhash.xxh3_128_hexdigest(samples.tobytes())
    return {"text": text, "samples": samples.shape[0], "context": samples.shape[1]}


def begin_calibration(checkpoint: Checkpoint, samples: NDArray[np.int64]) -> Calibration:
    """Return what is to be run; raises UnsupportedModelError where the decoder cannot."""
    return Calibration(checkpoint, checkpoint_config(checkpoint), samples, _PART_TOKENS)


# Given the residual stream before a layer, yields each part's stream after it and sums, in the order of the parts.
LayerRunner = Callable[[Calibration, int, Floats], Iterator[tuple[Floats, dict[str, Sum]]]]


def choose_samples(checkpoint: Checkpoint, text: str, samples: int, context: int | None = None) -> NDArray[np.int64]:
    """Return windows of tokens (samples, context) spread evenly over a text; raises BincompressError where it is short.

    context: None is 512, or the model's limit. The text is tokenized at once by the model's own tokenizer.
    """
    limit = parse(checkpoint.config).context
    context = min(CONTEXT, limit) if context is None else context
    if samples < 1 or not 2 <= context <= limit:
        raise BincompressError(
            f"{samples} samples of {context} tokens: expected at least 1 sample of 2 to {limit} tokens"
        )
    tokens = np.array(load_tokenizer(checkpoint.assets()).encode(text), np.int64)
    if len(tokens) < samples * context:
        fewer = f"--samples {len(tokens) // context}" if len(tokens) >= context else "a smaller --context"
        raise BincompressError(
            f"the text has {len(tokens):,} tokens; {samples} samples of {context} need {samples * context:,}: give a "
            f"longer text, or {fewer}"
        )
    starts = np.linspace(0, len(tokens) - context, samples).astype(np.int64)
    return np.stack([tokens[start : start + context] for start in starts])


def calibrate(
    checkpoint: Checkpoint,
    samples: NDArray[np.int64],
    url: str,
    *,
    runner: LayerRunner,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Statistics:
    """Collect the statistics of every linear layer's inputs into a store (a path or fsspec URL) of their own.

    samples: tokens (samples, context), as `choose_samples` gives them. An equal run that was interrupted is gone on
    with after its last whole layer. Raises StoreError, CheckpointError, UnsupportedModelError, or TensorError where an
    input is not finite.
    """
    with exclusive(url):
        return _calibrate(begin_calibration(checkpoint, samples), url, runner, overwrite, progress)


def _calibrate(work: Calibration, url: str, runner: LayerRunner, overwrite: bool, progress: Progress) -> Statistics:
    groups = [work.config.inputs_of_layer(layer) for layer in range(work.config.layers)]
    found = begin_statistics(url, work.record(), overwrite)
    if found.complete:
        return found
    first, stream = _resumed(work, found, groups)
    pieces = len(work.parts)
    total = pieces * work.config.layers
    progress(pieces * first, total)
    for layer in range(first, work.config.layers):
        sums: dict[str, _Total] = {}
        after = np.empty_like(stream)
        for number, (part, (streamed, partial)) in enumerate(
            zip(work.parts, runner(work, layer, stream), strict=True), 1
        ):
            after[part] = streamed
            _add(sums, partial)
            progress(pieces * layer + number, total)
        _write(found, groups[layer], sums)
        stream = after
        found.write_work(f"stream-{layer + 1}", stream)
        found.remove_work(f"stream-{layer}")
    found.finish()
    return found


def _resumed(work: Calibration, found: Statistics, groups: Sequence[dict[str, list[str]]]) -> tuple[int, Floats]:
    """Return the first layer that is not complete, and the stream before it."""
    layer = next((i for i, group in enumerate(groups) if not all(map(found.has, group))), len(groups))
    stream = found.read_work(f"stream-{layer}") if layer else None
    return (0, work.embed()) if stream is None else (layer, stream)


@dataclass
class _Total:
    """The sums of all parts, in float64."""

    gram: NDArray[np.float64]
    absmax: Floats
    tokens: int


def _add(sums: dict[str, _Total], partial: dict[str, Sum]) -> None:
    for key, part in partial.items():
        if key in sums:
            total = sums[key]
            total.gram += part.gram
            np.maximum(total.absmax, part.absmax, out=total.absmax)
            total.tokens += part.tokens
        else:
            sums[key] = _Total(part.gram.astype(np.float64), part.absmax.copy(), part.tokens)


def _write(found: Statistics, groups: dict[str, list[str]], sums: dict[str, _Total]) -> None:
    for key, tensors in groups.items():
        total = sums.pop(key)
        total.gram /= max(1, total.tokens)  # an expert that no token chose has a Hessian of zeros
        hessian = total.gram.astype(np.float32)
        if not np.isfinite(hessian).all() or not np.isfinite(total.absmax).all():
            raise TensorError(f"{key}: its inputs are not finite on this text; is the checkpoint damaged?")
        found.write(key, tensors, total.tokens, {"hessian": hessian, "absmax": total.absmax})


def run_in_threads(threads: int) -> LayerRunner:
    """Return a runner that does so many parts at once in this process, a thread each."""

    def run(work: Calibration, layer: int, stream: Floats) -> Iterator[tuple[Floats, dict[str, Sum]]]:
        runner = PartRunner(work, layer)
        yield from over_parts(work.parts, threads, lambda part: runner(stream[part]))

    return run


def over_parts(parts: Sequence[Part], threads: int, run: Callable[[Part], T]) -> Iterator[T]:
    """Run parts of the samples, so many at once, and yield what each gives, in their order."""
    # Each part is one thread's work, BLAS included: its sums have the same bits however many run at once.
    with threadpoolctl.threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        yield from pool.map(run, parts)


class PartRunner:
    """One decoder layer, ready to run parts of the stream; threads share its weights."""

    def __init__(self, work: Calibration, layer: int) -> None:
        self._work, self._layer = work, layer
        self._weights = read_layer(work.config, CheckpointSource(work.checkpoint, work.config), layer)

    def __call__(self, stream: Floats) -> tuple[Floats, dict[str, Sum]]:
        """Return the stream (samples, context, hidden) after the layer, and the sums over its tokens."""
        walk = Walk(self._work.config, self._layer, stream)
        sums: dict[str, Sum] = {}
        for number, keys in enumerate(self._work.config.stages_of_layer(self._layer)):
            walk.go_on(number, self._weights)
            sums |= {key: _sum(x) for key, x in zip(keys, walk.inputs(), strict=True)}
        walk.go_on(INPUTS, self._weights)
        return walk.stream, sums


def _sum(x: Floats) -> Sum:
    if not len(x):
        return Sum(np.zeros((x.shape[1], x.shape[1]), np.float32), np.zeros(x.shape[1], np.float32), 0)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused by name when all are summed
        return Sum(x.T @ x, np.maximum(x.max(axis=0), -x.min(axis=0)), len(x))
