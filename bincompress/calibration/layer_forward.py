"""A part of a text on its way through one decoder layer, from one input of its matrices to the next.

Between them others may look at what the matrices read, and change those that come later.
"""

from collections.abc import Iterator

import numpy as np

from bincompress.model.cache import KvCache
from bincompress.model.config import ModelConfig
from bincompress.model.decoder import PREFILL_BLOCK
from bincompress.model.experts import ExpertLayer, by_expert
from bincompress.model.linear import Floats
from bincompress.model.steps import NO_NORM, Buffers, Layer, Part, Steps
from cpu_kernels.parallel.workers import Workers

INPUTS = 4  # of a layer, in their order: qkv, out, gate_up, down
_NONE = np.empty((0, 0), np.float32)


class Walk:
    """The residual stream (samples, context, hidden) before a layer, and then what `inputs_of_layer` names in turn.

    stream: at last, that after the layer. x: (tokens, cols), what the next matrices read; of a layer of experts the
    rows belong to its experts in turn, each of them to one of its tokens (see `inputs`).
    """

    def __init__(self, config: ModelConfig, layer: int, stream: Floats) -> None:
        self._config = config.of_layer(layer)
        self._steps = Steps(self._config, Workers(1))
        self.stream = stream.copy()
        self.x = _NONE
        self._routed: _Routed | None = None

    def inputs(self) -> Iterator[Floats]:
        """Yield x in the order of the inputs that a step has: whole, or the rows of each expert, which may be none.

        Those of an expert that is each token's come last.
        """
        if self._routed is None:
            yield self.x
            return
        for rows in self._routed.rows:
            yield self.x[rows]
        if self._routed.shared is not None:
            yield self._routed.shared_x

    def go_on(self, number: int, weights: Layer) -> None:
        """Go from one input to the next; number: of the one to arrive at, or INPUTS for the end of the layer."""
        stream = self.stream.reshape(-1, self.stream.shape[2])
        if number == 0:
            self.x = self._normed(stream, weights.input_norm)
        elif number == 1:
            # Once more: a transformation of the matrices that read it may have been folded into the norm meanwhile.
            self.x = self._mixed(self._normed(stream, weights.input_norm), weights)
            self._steps.norm_in_place(self.x, weights.mixed_norm)
        elif number == 2:
            self._add(stream, weights.out(self.x), weights.out_bias, weights.out_norm)
            self.x = self._normed(stream, weights.post_norm)
            if weights.experts is not None:
                self._routed = _Routed(weights.experts, self.x)
                self.x = self.x[self._routed.tokens]
        elif number == 3 and self._routed is not None:
            self.x = self._routed.gated(self.x)
        elif number == 3:
            gate_up = weights.gate_up(self._normed(stream, weights.post_norm))
            self.x = np.empty((len(stream), weights.down.cols), np.float32)
            self._steps.gate(_work(inner=self.x), gate_up, weights.gate_up_bias)
            self._steps.norm_in_place(self.x, weights.inner_norm)
        else:
            made = weights.down(self.x) if self._routed is None else self._routed.down(self.x, len(stream))
            self.end(made, weights)

    def end(self, made: Floats, weights: Layer) -> Floats:
        """End the layer with what the MLP gave (tokens, hidden; overwritten); return the stream, which is its own."""
        self._add(self.stream.reshape(-1, self.stream.shape[2]), made, weights.down_bias, weights.down_norm)
        self.x, self._routed = _NONE, None
        return self.stream

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
                own = self._steps.mix(_work(normed=x[block], mixed=mixed[block]), weights, 0, [part])
                if weights.recurrent is not None:
                    mixed[block] = own
                cache.advance(block.stop - block.start)
        return mixed


class _Routed:
    """The tokens of a layer's experts, those of the first expert first.

    rows: of each expert, which may be none; tokens: which token each row belongs to. shared_x: what the next matrices
    of an expert that is each token's read.
    """

    def __init__(self, experts: ExpertLayer, x: Floats) -> None:
        self._experts, self._x = experts, x
        self.shared, self.shared_x = experts.shared, x
        chosen, weights = experts.choose(x)
        groups = by_expert(chosen)
        counts = np.bincount(chosen.reshape(-1), minlength=experts.count)
        ends = np.cumsum(counts)
        self.rows = [slice(int(end - count), int(end)) for end, count in zip(ends, counts, strict=True)]
        order = np.concatenate([group for _, group in groups])
        self.tokens = order // chosen.shape[1]
        self._weights = weights.reshape(-1)[order]

    def gated(self, x: Floats) -> Floats:
        """Return what the experts' down matrices read."""
        inner = np.empty((len(x), self._experts.inner), np.float32)
        for expert, rows in self._used():
            inner[rows] = self._experts.gated(expert, x[rows])
        if self.shared is not None:
            self.shared_x = self.shared.gated(self._x)
        return inner

    def down(self, inner: Floats, tokens: int) -> Floats:
        """Return what the layer's experts give for each token, (tokens, hidden)."""
        result = np.zeros((tokens, self._experts.hidden), np.float32)
        for expert, rows in self._used():
            result[self.tokens[rows]] += self._experts.down(expert, inner[rows]) * self._weights[rows, None]
        if self.shared is not None:
            result += self.shared.down(self.shared_x, self._x)
        return result

    def _used(self) -> Iterator[tuple[int, slice]]:
        return ((expert, rows) for expert, rows in enumerate(self.rows) if rows.stop > rows.start)


def _work(stream: Floats = _NONE, normed: Floats = _NONE, mixed: Floats = _NONE, inner: Floats = _NONE) -> Buffers:
    return Buffers(stream, normed, mixed, inner)
