"""A part of a text on its way through one decoder layer, from one input of its matrices to the next.

Between them others may look at what the matrices read, and change those that come later.
"""

import numpy as np

from bincompress.model.cache import KvCache
from bincompress.model.config import ModelConfig
from bincompress.model.decoder import PREFILL_BLOCK
from bincompress.model.linear import Floats
from bincompress.model.steps import NO_NORM, Buffers, Layer, Part, Steps
from cpu_kernels.parallel.workers import Workers

INPUTS = 4  # of a layer, in their order: qkv, out, gate_up, down
_NONE = np.empty((0, 0), np.float32)


class Walk:
    """The residual stream (samples, context, hidden) before a layer, and then what `inputs_of_layer` names in turn.

    stream: at last, that after the layer. x: (tokens, cols), what the next matrices read.
    """

    def __init__(self, config: ModelConfig, layer: int, stream: Floats) -> None:
        self._config = config.of_layer(layer)
        self._steps = Steps(self._config, Workers(1))
        self.stream = stream.copy()
        self.x = _NONE

    def go_on(self, number: int, weights: Layer) -> None:
        """Go from one input to the next; number: of the one to arrive at, or INPUTS for the end of the layer."""
        stream = self.stream.reshape(-1, self.stream.shape[2])
        if number == 0:
            self.x = self._normed(stream, weights.input_norm)
        elif number == 1:
            # Once more: a transformation of the matrices that read it may have been folded into the norm meanwhile.
            self.x = self._mixed(self._normed(stream, weights.input_norm), weights)
        elif number == 2:
            self._add(stream, weights.out(self.x), weights.out_bias, weights.out_norm)
            self.x = self._normed(stream, weights.post_norm)
        elif number == 3:
            gate_up = weights.gate_up(self._normed(stream, weights.post_norm))
            self.x = np.empty((len(stream), weights.down.cols), np.float32)
            self._steps.gate(_work(inner=self.x), gate_up, weights.gate_up_bias)
        else:
            self._add(stream, weights.down(self.x), weights.down_bias, weights.down_norm)
            self.x = _NONE

    def _add(self, stream: Floats, delta: Floats, bias: Floats, delta_norm: Floats) -> None:
        """Add to the stream what a matrix gave."""
        if delta_norm.size or self._config.residual_multiplier != 1:
            self._steps.add(_work(stream=stream, normed=np.empty_like(stream)), delta, bias, delta_norm, NO_NORM)
        else:
            stream += delta + bias

    def _normed(self, stream: Floats, weight: Floats) -> Floats:
        """Return what the matrices after a norm read; the stream itself where there is no norm."""
        if not weight.size:
            return stream.copy()
        normed, nothing = np.empty_like(stream), np.zeros_like(stream)
        self._steps.add(_work(stream=stream, normed=normed), nothing, nothing[0], NO_NORM, weight)
        return normed

    def _mixed(self, x: Floats, weights: Layer) -> Floats:
        samples, context, _ = self.stream.shape
        mixed = np.empty((len(x), weights.out.cols), np.float32)
        cache = KvCache(self._config, context)
        for sample in range(samples):
            cache.rewind()
            for start in range(0, context, PREFILL_BLOCK):
                block = slice(sample * context + start, sample * context + min(context, start + PREFILL_BLOCK))
                part = Part(cache, 0, block.stop - block.start)
                self._steps.attend(_work(normed=x[block], mixed=mixed[block]), weights, 0, [part])
                cache.length += block.stop - block.start
        return mixed


def _work(stream: Floats = _NONE, normed: Floats = _NONE, mixed: Floats = _NONE, inner: Floats = _NONE) -> Buffers:
    return Buffers(stream, normed, mixed, inner)
