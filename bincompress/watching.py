"""What do the matrices of one decoder layer read and write, when the layer is run over a text's residual stream?"""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bincompress.model.config import ModelConfig
from bincompress.model.decoder import Decoder
from bincompress.model.linear import DenseLinear, Floats, Linear, WeightSource


@dataclass(frozen=True)
class Seen:
    """What a run showed; matrices go by the name of the first that reads their input."""

    after: Floats  # (samples, context, hidden): the stream after the layer
    inputs: dict[str, Floats]  # (tokens, cols)
    outputs: dict[str, Floats]  # (tokens, rows)


@dataclass
class _Notebook:
    """What one thread's run is to keep and has kept; from `last` on, matrices are not multiplied with any more."""

    inputs: dict[str, list[Floats]] = field(default_factory=dict)
    outputs: dict[str, list[Floats]] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()


class WatchedLayer:
    """One decoder layer, ready to run parts of the stream; threads share its weights."""

    def __init__(self, config: ModelConfig, source: WeightSource, layer: int) -> None:
        self._config = replace(config, layers=1, windows=(config.windows[layer],))
        self._weights = _LayerWeights(source, config, layer)
        self._local = threading.local()

    def __call__(
        self, stream: Floats, inputs: Collection[str] = (), outputs: Collection[str] = (), last: str = ""
    ) -> Seen:
        """Run the stream (samples, context, hidden) through the layer and keep what is asked for.

        inputs, outputs: of which matrices. last: the run is over at this matrix; it and those after it give zeros.
        """
        # Work buffers belong to one thread; the weights do not.
        if not hasattr(self._local, "decoder"):
            self._local.notes = _Notebook()
            self._local.decoder = Decoder(self._config, _Watching(self._weights, self._local.notes))
        decoder, notes = self._local.decoder, self._local.notes
        notes.inputs, notes.outputs = {key: [] for key in inputs}, {key: [] for key in outputs}
        order = self._weights.keys
        notes.idle = frozenset(order[order.index(last) :] if last else ())
        after = np.empty_like(stream)
        cache = decoder.new_cache(stream.shape[1])
        for number, sample in enumerate(stream):
            cache.rewind()
            after[number] = decoder.stream(sample, cache)
        return Seen(
            after, *({key: np.concatenate(kept) for key, kept in of.items()} for of in (notes.inputs, notes.outputs))
        )

    def multiply(self, key: str, x: Floats) -> Floats:
        """Return x (n, cols) times a matrix of the layer, once it has been run."""
        return self._weights.found[key](x)


class _LayerWeights:
    """One layer's weights under the names of the first layer, read once."""

    def __init__(self, source: WeightSource, config: ModelConfig, layer: int) -> None:
        names = config.declaration.names
        first, own = names.of_layer(0, ""), names.of_layer(layer, "")
        self._hidden = config.hidden
        self.found: dict[str, Linear] = {}
        self._source = source
        self._first, self._own = first, own
        self._lock = threading.Lock()
        self.keys = list(config.inputs_of_layer(layer))

    def _renamed(self, names: Sequence[str]) -> list[str]:
        """Return the layer's names for the first layer's; none where they belong to no layer."""
        if not names[0].startswith(self._first):
            return []
        return [self._own + name[len(self._first) :] for name in names]

    def vector(self, names: Sequence[str]) -> Floats:
        own = self._renamed(names)
        # The final norm is asked for too, and no layer needs it.
        return self._source.vector(own) if own else np.ones(self._hidden, np.float32)

    def linear(self, names: Sequence[str]) -> tuple[str, Linear]:
        """Return matrices with one input, and the first one's name."""
        own = self._renamed(names)
        if not own:  # head and embedding, which no layer needs
            return "", DenseLinear(np.zeros((1, self._hidden), np.float32))
        with self._lock:
            if own[0] not in self.found:
                self.found[own[0]] = self._source.linear(own)
        return own[0], self.found[own[0]]


class _Watching:
    """A decoder's weights whose matrices write down what they are asked to."""

    def __init__(self, weights: _LayerWeights, notes: _Notebook) -> None:
        self._weights, self._notes = weights, notes

    def vector(self, names: Sequence[str]) -> Floats:
        """Return one-dimensional tensors, one after the other."""
        return self._weights.vector(names)

    def linear(self, names: Sequence[str]) -> "_Watched":
        """Return matrices with the same input as one, watched."""
        return _Watched(*self._weights.linear(names), self._notes)

    def embedding(self, name: str) -> DenseLinear:
        """Return a table that is never asked: the stream comes from outside."""
        return DenseLinear(np.zeros((1, 1), np.float32))


class _Watched:
    def __init__(self, key: str, matrix: Linear, notes: _Notebook) -> None:
        self.rows, self.cols = matrix.rows, matrix.cols
        self._key, self._matrix, self._notes = key, matrix, notes

    def __call__(self, x: Floats) -> Floats:
        if self._key in self._notes.inputs:
            self._notes.inputs[self._key].append(x.copy())  # the decoder works in place
        if self._key in self._notes.idle:
            return np.zeros((len(x), self.rows), np.float32)
        result = self._matrix(x)
        if self._key in self._notes.outputs:
            self._notes.outputs[self._key].append(result.copy())
        return result
