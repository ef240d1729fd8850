"""Which single weights does a model depend on? "Super weights" (arXiv 2411.07191), found by what it does without them.

A few weights of down_proj make the massive activations that later layers rely on. The paper finds them in one run over
any prompt, where the matrix's input and output have a spike. Here every such weight is then set to zero, alone, and the
rest of the model is run again: it counts only if the predictions change. One pass over the layers does all of it: the
streams of the changed models go along with that of the unchanged one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bincompress.calibration.layer_forward import INPUTS, Walk
from bincompress.errors import TensorError
from bincompress.model.checkpoint_source import CheckpointSource, checkpoint_config
from bincompress.model.config import ModelConfig
from bincompress.model.decoder import embedded, finished_logits, read_layer, read_norm
from bincompress.model.linear import Floats, Linear
from bincompress.model.steps import Layer
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import Checkpoint, read_weight
from bincompress.tensors.weight import Weight
from cpu_kernels.parallel.workers import Workers

LEAST_EFFECT = 0.01  # nats a token, of a list that costs 12 bytes a weight
_SPIKE = 10.0  # what a weight adds to an output, in units of the root mean square of all outputs
_OF_A_LAYER = 4  # weights that are tried
_MOST_TOKENS = 128
_STREAMS_AT_ONCE = 16  # on their way through a layer
_WEIGHTS_AT_ONCE = 1 << 22
_PROMPT = (  # any text will do, as the paper says
    "The capital of France is Paris, and the river Seine runs through it. A function that is called twice with the "
    "same arguments should return the same result. In 1969 people first walked on the Moon. My favourite food is bread "
    "with butter, because it is simple."
)


@dataclass(frozen=True)
class TriedWeight:
    """A weight without which the model was run; effect: mean divergence of its predictions then, nats a token."""

    name: str
    row: int
    col: int
    value: float
    effect: float

    def line(self) -> str:
        """Return the weight and its effect as text."""
        return f"{self.name} {self.row} {self.col} ({self.value:.4g}): {self.effect:.2g} nats a token"


def try_super_weights(
    checkpoint: Checkpoint,
    packed: Callable[[str], bool],
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TriedWeight]:
    """Return the weights of down_proj that make a spike in its output, those of greatest effect first.

    packed: whether a tensor is to be packed; others are not looked at. progress: is told layers done, layers in all.
    Raises TensorError where the model computes numbers that are not finite, UnsupportedModelError, TokenizerError.
    """
    config = checkpoint_config(checkpoint)
    tokens = np.array(load_tokenizer(checkpoint.assets()).encode(_PROMPT), np.int64)
    tokens = tokens[: min(_MOST_TOKENS, config.context)]
    source = CheckpointSource(checkpoint, config, Workers(threads))
    names = config.declaration.names
    embedding = source.embedding(names.embedding)
    streams = embedded(config, embedding, tokens)[None]  # (models, tokens, hidden), the unchanged one first
    tried: list[tuple[str, int, int, float]] = []
    for layer in range(config.layers):
        weights = read_layer(config, source, layer)
        walk = _to_down(config, layer, weights, streams[:1])
        x, before = walk.x, walk.stream.copy()
        made = weights.down(x)
        after = walk.end(made.copy(), weights)
        rest = [
            walk.end(weights.down(walk.x), weights)
            for start in range(1, len(streams), _STREAMS_AT_ONCE)
            for walk in [_to_down(config, layer, weights, streams[start : start + _STREAMS_AT_ONCE])]
        ]
        name = names.of_layer(layer, f"{names.down}.weight")
        if not np.isfinite(after).all():
            raise TensorError(f"{name}: what comes out of its layer is not finite; is the checkpoint damaged?")
        new = []
        for row, col, value in _spikes(read_weight(checkpoint.tensors[name]), x, weights.down) if packed(name) else ():
            without = made.copy()
            without[:, row] -= value * x[:, col]
            walk.stream = before.copy()
            new.append(walk.end(without, weights))
            tried.append((name, row, col, value))
        streams = np.concatenate([after, *rest, *new])
        progress(layer + 1, config.layers)
    head = embedding if config.tied else source.linear([names.head])
    norm = read_norm(config, source, names.norm)
    predictions = (_log_probabilities(config, stream, norm, head) for stream in streams)
    usual = next(predictions)
    effects = [float(np.mean(np.sum(np.exp(usual) * (usual - other), axis=1))) for other in predictions]
    found = [TriedWeight(*weight, effect) for weight, effect in zip(tried, effects, strict=True)]
    return sorted(found, key=lambda weight: (-weight.effect, weight.name, weight.row, weight.col))


def _to_down(config: ModelConfig, layer: int, weights: Layer, streams: Floats) -> Walk:
    """Return some streams on their way through a layer, where down_proj reads them."""
    walk = Walk(config, layer, streams)
    for number in range(INPUTS):
        walk.go_on(number, weights)
    return walk


def _spikes(weight: Weight, x: Floats, down: Linear) -> list[tuple[int, int, float]]:
    """Return the row, column and value of the weights whose product with their input alone is a spike of the output."""
    rows, cols = weight.shape
    typical = float(np.sqrt(np.mean(np.square(down(x), dtype=np.float64))))
    reach = np.abs(x).max(axis=0)
    found: list[tuple[float, int, int, float]] = []
    step = max(1, _WEIGHTS_AT_ONCE // cols)
    for first in range(0, rows, step):
        values = weight.float32(slice(first, first + step))
        added = (np.abs(values) * reach).reshape(-1)
        for place in np.argpartition(added, -min(_OF_A_LAYER, added.size))[-_OF_A_LAYER:]:
            row, col = divmod(int(place), cols)
            found.append((float(added[place]), first + row, col, float(values[row, col])))
    found.sort(reverse=True)
    return [(row, col, value) for added, row, col, value in found[:_OF_A_LAYER] if added > _SPIKE * typical]


def _log_probabilities(config: ModelConfig, stream: Floats, norm: Floats, head: Linear) -> NDArray[np.float64]:
    """Return log probabilities (tokens, vocab) of the stream (tokens, hidden) after the last layer."""
    scale = 1.0 / np.sqrt(np.mean(np.square(stream), axis=1, keepdims=True) + np.float32(config.norm_epsilon))
    states = np.ascontiguousarray(stream * scale * norm, np.float32)
    logits = finished_logits(config, head(states)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
