"""What do a model's linear layers read? The checkpoint is run over a text one decoder layer at a time.

Memory holds one layer, the residual stream of the samples and the sums of one layer. Samples are split into parts of
fixed size, each an independent piece of work; the sums of parts are added in their order, so that threads, processes
and nodes give the same bytes.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import threadpoolctl
import xxhash
from numpy.typing import NDArray

from bincompress.checkpoint import Checkpoint
from bincompress.errors import BincompressError, TensorError
from bincompress.hub import source_record
from bincompress.model.config import ModelConfig, parse
from bincompress.model.decoder import Decoder
from bincompress.model.linear import DenseLinear, Floats
from bincompress.model.load import CheckpointSource
from bincompress.model.tokenizer import load_tokenizer
from bincompress.statistics import Statistics, begin_statistics

Progress = Callable[[int, int], None]  # pieces done, pieces in all
_PART_TOKENS = 4096  # whose products are summed in float32, by BLAS; the sums of parts are added in float64


@dataclass(frozen=True)
class Sum:
    """What a part's tokens add to one input's statistics."""

    gram: Floats  # (cols, cols): the sum of x x^T
    absmax: Floats  # (cols,)


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
        return table.rows_of(self.samples.reshape(-1)).reshape(*self.samples.shape, self.config.hidden)

    def inputs_of_layer(self, layer: int) -> dict[str, list[str]]:
        """Return the distinct inputs of a layer's matrices, by the first matrix that reads each: its matrices."""
        names = self.config.declaration.names
        members = (names.qkv, (names.out,), names.gate_up, (names.down,))
        groups = [[names.of_layer(layer, f"{part}.weight") for part in group] for group in members]
        return {group[0]: group for group in groups}


# Given the residual stream before a layer, yields each part's stream after it and sums, in the order of the parts.
LayerRunner = Callable[[Calibration, int, Floats], Iterator[tuple[Floats, dict[str, Sum]]]]


def choose_samples(checkpoint: Checkpoint, text: str, samples: int, context: int) -> NDArray[np.int64]:
    """Return windows of tokens (samples, context) spread evenly over a text; raises BincompressError where it is short.

    The text is tokenized at once by the model's own tokenizer.
    """
    limit = parse(checkpoint.config).context
    if samples < 1 or not 2 <= context <= limit:
        raise BincompressError(
            f"{samples} samples of {context} tokens: expected at least 1 sample of 2 to {limit} tokens"
        )
    tokens = np.array(load_tokenizer(checkpoint.assets()).encode(text), np.int64)
    if len(tokens) < samples * context:
        raise BincompressError(
            f"the text has {len(tokens):,} tokens; {samples} samples of {context} need {samples * context:,}: give a "
            f"longer text, or --samples {len(tokens) // context}"
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
    work = Calibration(checkpoint, parse(checkpoint.config), samples, _PART_TOKENS)
    groups = [work.inputs_of_layer(layer) for layer in range(work.config.layers)]
    record = {
        "source": source_record(checkpoint),
        "text": xxhash.xxh3_128_hexdigest(samples.tobytes()),
        "samples": samples.shape[0],
        "context": samples.shape[1],
        "inputs": {tensor: key for layer in groups for key, tensors in layer.items() for tensor in tensors},
    }
    found = begin_statistics(url, record, overwrite)
    if found.complete:
        return found
    first, stream = _resumed(work, found, groups)
    pieces = len(work.parts)
    total = pieces * work.config.layers
    progress(pieces * first, total)
    for layer in range(first, work.config.layers):
        sums: dict[str, list[NDArray[Any]]] = {}
        after = np.empty_like(stream)
        for number, (part, (streamed, partial)) in enumerate(
            zip(work.parts, runner(work, layer, stream), strict=True), 1
        ):
            after[part] = streamed
            _add(sums, partial)
            progress(pieces * layer + number, total)
        _write(found, groups[layer], sums, samples.size)
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


def _add(sums: dict[str, list[NDArray[Any]]], partial: dict[str, Sum]) -> None:
    for key, part in partial.items():
        if key in sums:
            sums[key][0] += part.gram
            np.maximum(sums[key][1], part.absmax, out=sums[key][1])
        else:
            sums[key] = [part.gram.astype(np.float64), part.absmax.copy()]


def _write(found: Statistics, groups: dict[str, list[str]], sums: dict[str, list[NDArray[Any]]], tokens: int) -> None:
    for key, tensors in groups.items():
        gram, absmax = sums.pop(key)
        gram /= tokens
        hessian = gram.astype(np.float32)
        if not np.isfinite(hessian).all() or not np.isfinite(absmax).all():
            raise TensorError(f"{key}: its inputs are not finite on this text; is the checkpoint damaged?")
        found.write(key, tensors, tokens, {"hessian": hessian, "absmax": absmax})


def run_in_threads(threads: int) -> LayerRunner:
    """Return a runner that does so many parts at once in this process, a thread each."""

    def run(work: Calibration, layer: int, stream: Floats) -> Iterator[tuple[Floats, dict[str, Sum]]]:
        runner = PartRunner(work, layer)
        # Each part is one thread's work, BLAS included: its sums have the same bits however many run at once.
        with threadpoolctl.threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
            yield from pool.map(lambda part: runner(stream[part]), work.parts)

    return run


class PartRunner:
    """One decoder layer, ready to run parts of the stream; threads share its weights."""

    def __init__(self, work: Calibration, layer: int) -> None:
        config = replace(work.config, layers=1, windows=(work.config.windows[layer],))
        self._config = config
        self._weights = _LayerWeights(CheckpointSource(work.checkpoint, work.config), work.config, layer)
        self._keys = list(work.inputs_of_layer(layer))
        self._local = threading.local()

    def __call__(self, stream: Floats) -> tuple[Floats, dict[str, Sum]]:
        """Return the stream (samples, context, hidden) after the layer, and the sums over its tokens."""
        # Work buffers belong to one thread; the weights do not.
        if not hasattr(self._local, "decoder"):
            self._local.seen = _Seen(self._weights)
            self._local.decoder = Decoder(self._config, self._local.seen)
        decoder, seen = self._local.decoder, self._local.seen
        after = np.empty_like(stream)
        cache = decoder.new_cache(stream.shape[1])
        for number, sample in enumerate(stream):
            cache.rewind()
            after[number] = decoder.stream(sample, cache)
        inputs = seen.take()
        return after, {key: _sum(inputs.pop(key)) for key in self._keys}


def _sum(parts: list[Floats]) -> Sum:
    x = np.concatenate(parts)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused by name when all are summed
        return Sum(x.T @ x, np.maximum(x.max(axis=0), -x.min(axis=0)))


class _LayerWeights:
    """One layer's weights under the names of the first layer, read once."""

    def __init__(self, source: CheckpointSource, config: ModelConfig, layer: int) -> None:
        names = config.declaration.names
        first, own = names.of_layer(0, ""), names.of_layer(layer, "")
        self._hidden = config.hidden
        self._found: dict[str, DenseLinear] = {}
        self._source = source
        self._first, self._own = first, own
        self._lock = threading.Lock()

    def _renamed(self, names: Sequence[str]) -> list[str]:
        """Return the layer's names for the first layer's; none where they belong to no layer."""
        if not names[0].startswith(self._first):
            return []
        return [self._own + name[len(self._first) :] for name in names]

    def vector(self, names: Sequence[str]) -> Floats:
        own = self._renamed(names)
        # The final norm is asked for too, and no layer needs it.
        return self._source.vector(own) if own else np.ones(self._hidden, np.float32)

    def linear(self, names: Sequence[str]) -> tuple[str, DenseLinear]:
        """Return matrices with one input, and the first one's name."""
        own = self._renamed(names)
        if not own:  # head and embedding, which no layer needs
            return "", DenseLinear(np.zeros((1, self._hidden), np.float32))
        with self._lock:
            if own[0] not in self._found:
                self._found[own[0]] = self._source.linear(own)
        return own[0], self._found[own[0]]


class _Seen:
    """A decoder's weights that keep what its matrices are multiplied with."""

    def __init__(self, weights: _LayerWeights) -> None:
        self._weights = weights
        self._inputs: dict[str, list[Floats]] = {}

    def vector(self, names: Sequence[str]) -> Floats:
        """Return one-dimensional tensors, one after the other."""
        return self._weights.vector(names)

    def linear(self, names: Sequence[str]) -> "_Watched":
        """Return matrices with the same input as one, watched."""
        key, matrix = self._weights.linear(names)
        return _Watched(matrix, self._inputs.setdefault(key, []))

    def embedding(self, name: str) -> DenseLinear:
        """Return a table that is never asked: the stream comes from outside."""
        return self._weights.linear([name])[1]

    def take(self) -> dict[str, list[Floats]]:
        """Return the inputs seen since the last call, by matrix."""
        taken = {key: list(seen) for key, seen in self._inputs.items()}
        for seen in self._inputs.values():
            seen.clear()
        return taken


class _Watched:
    def __init__(self, matrix: DenseLinear, seen: list[Floats]) -> None:
        self.rows, self.cols = matrix.rows, matrix.cols
        self._matrix, self._seen = matrix, seen

    def __call__(self, x: Floats) -> Floats:
        self._seen.append(x.copy())  # the decoder works in place
        return self._matrix(x)
