"""Layers whose tokens read a state in place of the tokens before them: the gated delta rule, and short convolutions."""

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bincompress.model.cache import Part
from bincompress.model.config import ModelConfig
from bincompress.model.linear import FEW_TOKENS, Floats, Linear, WeightSource
from bincompress.model.recurrence_fields import Recurrent
from bincompress.model.threads import over_ranges
from cpu_kernels.decoder.recurrence import convolve, delta_rule, norm_and_gate
from cpu_kernels.parallel.workers import Workers

_ITEMS_PER_THREAD = 1 << 16  # of a convolution, by tokens and channels: fewer take less time than handing them over
_STEPS_PER_THREAD = 1 << 18  # multiply-adds of a state
_ROWS_PER_THREAD = 8


class RecurrentLayer(Protocol):
    """What a layer has in place of attention. It keeps nothing between calls: threads may share it (calibration)."""

    def mix(self, read: Floats, x: Floats, number: int, parts: Sequence[Part]) -> Floats:
        """Return what the layer's `out` reads, (n, columns), in a new array, and write each part's next state.

        read: what its matrices gave for x (n, hidden), the normalized stream, which may be overwritten. number: of the
        layer. The state counts once `KvCache.advance` is called.
        """


class _Convolution:
    """A short convolution of each channel: weight (width, channels), bias (channels,)."""

    def __init__(self, weight: Floats, bias: Floats, silu: bool, workers: Workers) -> None:
        self._weight, self._bias, self._silu, self._workers = weight, bias, int(silu), workers

    def __call__(self, inputs: Floats, number: int, parts: Sequence[Part]) -> Floats:
        """Return the convolution (n, channels) of the first columns of inputs, and write each part's last inputs."""
        channels = self._weight.shape[1]
        result = np.empty((len(inputs), channels), np.float32)
        for part in parts:
            rows, state = slice(part.start, part.stop), part.cache.state(number)
            own, to, before, after = inputs[rows], result[rows], state.now[0], state.following[0]

            def work(
                start: int, stop: int, _: int, own: Floats = own, to: Floats = to, before: Floats = before,
                after: Floats = after,
            ) -> None:  # fmt: skip
                convolve(own, 0, before, self._weight, self._bias, self._silu, start, stop, after, to)

            over_ranges(self._workers, work, channels, max(64, _ITEMS_PER_THREAD // len(own)))
        return result


class ConvolutionLayer:
    """A convolution between two gates (LFM2)."""

    def __init__(self, convolution: _Convolution, bias: Floats) -> None:
        """bias: (3 * hidden,), of what the layer reads."""
        self._convolution, self._bias = convolution, bias

    def mix(self, read: Floats, x: Floats, number: int, parts: Sequence[Part]) -> Floats:
        """See `RecurrentLayer`."""
        read += self._bias
        first, second, values = np.split(read, 3, axis=1)
        return self._convolution(first * values, number, parts) * second


class DeltaLayer:
    """The gated delta rule (Qwen3-Next, Qwen3.5): each head learns values at keys, and forgets."""

    def __init__(
        self, sizes: Recurrent, gates: Linear, convolution: _Convolution, rates: Floats, offsets: Floats, norm: Floats,
        epsilon: float, workers: Workers,
    ) -> None:  # fmt: skip
        """gates: (2 * heads, hidden); rates and offsets (heads,); norm: weight (value_dim,)."""
        self._sizes, self._gates, self._convolution, self._workers = sizes, gates, convolution, workers
        self._rates, self._offsets, self._norm, self._epsilon = rates, offsets, norm, epsilon
        self._order = _orders(sizes) if sizes.in_turns else None

    def mix(self, read: Floats, x: Floats, number: int, parts: Sequence[Part]) -> Floats:
        """See `RecurrentLayer`."""
        sizes = self._sizes
        # A few at a time, so that each token gets the numbers that it gets alone.
        gates = np.concatenate([self._gates(x[at : at + FEW_TOKENS]) for at in range(0, len(x), FEW_TOKENS)])
        if self._order is not None:
            read, gates = np.take(read, self._order[0], axis=1), np.take(gates, self._order[1], axis=1)
        mixed = self._convolution(read, number, parts)
        result = np.empty((len(x), sizes.out), np.float32)
        for part in parts:
            rows, state = slice(part.start, part.stop), part.cache.state(number)

            def work(
                start: int, stop: int, _: int, own: Floats = mixed[rows], gate: Floats = gates[rows],
                to: Floats = result[rows], before: Floats = state.now[1], after: Floats = state.following[1],
            ) -> None:  # fmt: skip
                scratch = np.empty(2 * sizes.key_dim + 3 * sizes.value_dim, np.float32)
                delta_rule(
                    own, sizes.key_heads, gate, self._rates, self._offsets, before, start, stop, scratch, after, to
                )

            steps = (part.stop - part.start) * sizes.key_dim * sizes.value_dim
            over_ranges(self._workers, work, sizes.heads, -(-_STEPS_PER_THREAD // steps))
        over_ranges(
            self._workers,
            lambda start, stop, _: norm_and_gate(result, read, sizes.channels, self._norm, self._epsilon, start, stop),
            len(x),
            _ROWS_PER_THREAD,
        )
        return result


def _orders(sizes: Recurrent) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the columns of queries, keys, values and gates are that lie with each head of keys, and of b and a.

    A head of keys has its query, its key, and the values and then the gates of the heads that it is that of.
    """
    each = sizes.heads // sizes.key_heads
    parts = (sizes.key_dim, sizes.key_dim, each * sizes.value_dim, each * sizes.value_dim)
    return _turned(sizes.key_heads, parts), _turned(sizes.key_heads, (each, each))


def _turned(heads: int, parts: Sequence[int]) -> NDArray[np.int64]:
    """Return the order that puts each part of all heads together, where the parts of a head lie together."""
    places = np.arange(heads * sum(parts)).reshape(heads, sum(parts))
    bounds = np.cumsum((0, *parts))
    return np.concatenate([places[:, a:b].reshape(-1) for a, b in itertools.pairwise(bounds)])


def read_recurrent_layer(
    config: ModelConfig, source: WeightSource, layer: int, workers: Workers
) -> RecurrentLayer | None:
    """Read what a layer has in place of attention, beside its large matrices; None where it has attention."""
    sizes, names = config.recurrent, config.names.recurrent
    if sizes is None or names is None or not config.is_recurrent(layer):
        return None

    def vector(*parts: str) -> Floats:
        return source.vector([config.names.of_layer(layer, part) for part in parts])

    weight = vector(f"{names.convolution}.weight").reshape(sizes.channels, sizes.width).T
    bias = vector(f"{names.convolution}.bias") if sizes.biased else np.zeros(sizes.channels, np.float32)
    convolution = _Convolution(np.ascontiguousarray(weight), bias, sizes.kind == "delta", workers)
    if sizes.kind == "convolution":
        of_read = [f"{part}.bias" for part in names.read]
        return ConvolutionLayer(convolution, vector(*of_read) if sizes.biased else np.zeros(sizes.rows, np.float32))
    gates = source.linear([config.names.of_layer(layer, f"{part}.weight") for part in names.gates])
    rates = np.exp(vector(names.rates).astype(np.float64)).astype(np.float32)
    return DeltaLayer(
        sizes, gates, convolution, rates, vector(names.offsets), vector(names.norm), config.norm_epsilon, workers
    )
