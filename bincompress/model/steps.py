"""The steps of a layer beside its matrices: norms, attention and the gate, on a block of tokens' work buffers."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bincompress.model.cache import Part as Part
from bincompress.model.config import ModelConfig
from bincompress.model.experts import ExpertLayer
from bincompress.model.linear import Floats, Linear
from bincompress.model.next_tokens import NextTokens
from bincompress.model.recurrent import RecurrentLayer
from bincompress.model.rope import growth
from bincompress.model.threads import over_ranges
from cpu_kernels.decoder.attention import ATTEND, ATTEND_WITH_SINKS, NO_WINDOW, scratch_size, work_items
from cpu_kernels.decoder.gates import gate_by_sigmoid
from cpu_kernels.decoder.norms import GATES, PLACE, PLACE_IN_PAIRS, add_norm, add_normed, norm_queries_keys, norm_rows
from cpu_kernels.parallel.workers import Workers


class _NoMatrix:
    """The dense MLP's matrices where a layer has experts."""

    rows = cols = 0

    def __call__(self, x: Floats) -> Floats:
        """Raise: nothing may multiply with it."""
        raise RuntimeError("a layer of experts has no dense MLP")


NO_MATRIX: Linear = _NoMatrix()
NO_MATRIX_VALUES = np.zeros((0, 0), np.float32)
NO_NORM = np.zeros(0, np.float32)  # the weight of a norm that an architecture lacks

# Handing work to another thread costs some 30 microseconds, so small work stays on the calling thread.
_ROWS_PER_THREAD = 8
_STEPS_PER_THREAD = 1 << 20  # multiply-adds of one layer's scores


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; biases that the model lacks are zeros, norms that it lacks are empty."""

    input_norm: Floats  # (hidden,), before attention
    post_norm: Floats  # (hidden,), before the MLP
    out_norm: Floats  # (hidden,), of what attention gives
    down_norm: Floats  # (hidden,), of what the MLP gives
    qkv: Linear  # queries, keys, values: ((heads + 2 kv_heads) * head_dim, hidden); gated, head_dim rows more a head
    qkv_bias: Floats
    q_norm: Floats  # (head_dim,), or (heads * head_dim,) where all are normalized at once
    k_norm: Floats  # (head_dim,), or (kv_heads * head_dim,)
    out: Linear  # (hidden, heads * head_dim)
    out_bias: Floats
    gate_up: Linear  # (2 * inner, hidden)
    gate_up_bias: Floats
    down: Linear  # (hidden, inner)
    down_bias: Floats
    mixed_norm: Floats = field(default_factory=lambda: NO_NORM)  # (heads * head_dim,), of what `out` reads
    inner_norm: Floats = field(default_factory=lambda: NO_NORM)  # (inner,), of what `down` reads
    sinks: Floats = field(default_factory=lambda: NO_NORM)  # (heads,), of attention's softmax
    recurrent: RecurrentLayer | None = None  # in place of attention; `qkv` are the matrices that read its input then
    experts: ExpertLayer | None = None  # in place of gate_up and down, which are NO_MATRIX then


@dataclass(frozen=True)
class Buffers:
    """What a block of n tokens is worked on in."""

    stream: Floats  # (n, hidden): the residual stream
    normed: Floats  # (n, hidden)
    mixed: Floats  # (n, heads * head_dim): what attention gives
    inner: Floats  # (n, inner)

    @classmethod
    def for_tokens(cls, config: ModelConfig, n: int) -> "Buffers":
        """Allocate them."""
        widths = (config.hidden, config.hidden, config.heads * config.head_dim, config.inner)
        return cls(*(np.empty((n, width), np.float32) for width in widths))

    def first(self, n: int) -> "Buffers":
        """Return views of the first n rows."""
        return Buffers(self.stream[:n], self.normed[:n], self.mixed[:n], self.inner[:n])


def _seen(part: Part, window: int) -> int:
    """Return how many positions the tokens of a part see, at most."""
    n = part.stop - part.start
    return n * min(part.cache.length + n, window)


class Steps:
    """Runs them on an exact number of threads; one caller at a time."""

    def __init__(self, config: ModelConfig, workers: Workers) -> None:
        self.config = config
        self.workers = workers
        self._scratch_size = scratch_size(config.head_dim)
        behind = config.heads if config.sinks else 0
        self._scratch = [np.empty(self._scratch_size + behind, np.float32) for _ in range(workers.threads)]
        names = config.names
        norms = (bool(names.input_norm), bool(names.post_norm), bool(names.out_norm), bool(names.down_norm))
        # Llama's norms are one before attention and one before the MLP; the kernel for those does nothing else.
        self._llama_norms = norms == (True, True, False, False) and config.residual_multiplier == 1
        self._no_bias = np.zeros(config.hidden, np.float32)
        self._no_qkv_bias = np.zeros((config.heads + 2 * config.kv_heads) * config.head_dim, np.float32)
        self._gate = GATES[config.activation]
        head_dim = np.float32(config.head_dim)
        self._all_next = False  # the pass is one token of each of several texts
        self._query_scale = np.float32(1 / np.sqrt(head_dim) if config.query_scale is None else config.query_scale)

        self._next = NextTokens(config, workers, self._scratch, self._query_scale)

    def take(self, parts: Sequence[Part]) -> None:
        """Prepare for a pass over these parts."""
        self._all_next = self._next.take(parts)

    def begin(self, work: Buffers, vectors: Floats, weight: Floats) -> None:
        """Let the stream be the tokens' vectors (overwritten), and normalize it."""
        work.stream.fill(0.0)
        self._add(work, vectors, self._no_bias, NO_NORM, 1.0, weight)

    def add(self, work: Buffers, delta: Floats, bias: Floats, delta_norm: Floats, weight: Floats) -> None:
        """Add to the stream what a matrix gave (overwritten), normalized where delta_norm is not empty.

        Then normalize the stream for the matrices that read it, where weight is not empty.
        """
        self._add(work, delta, bias, delta_norm, self.config.residual_multiplier, weight)

    def _add(
        self, work: Buffers, delta: Floats, bias: Floats, delta_norm: Floats, factor: float, weight: Floats
    ) -> None:
        epsilon, stream, normed, n = self.config.norm_epsilon, work.stream, work.normed, len(delta)
        if n < _ROWS_PER_THREAD and self._llama_norms:  # a token: two closures take as long as its norm
            add_norm(stream, delta, bias, weight, epsilon, 0, n, normed)
            return

        def llama(start: int, stop: int, _: int) -> None:
            add_norm(stream, delta, bias, weight, epsilon, start, stop, normed)

        def general(start: int, stop: int, _: int) -> None:
            add_normed(stream, delta, bias, delta_norm, factor, weight, epsilon, start, stop, normed)

        over_ranges(self.workers, llama if self._llama_norms else general, n, _ROWS_PER_THREAD)

    def gate(self, work: Buffers, gate_up: Floats, bias: Floats) -> None:
        """Gate the inner values."""
        over_ranges(
            self.workers,
            lambda start, stop, _: self._gate(gate_up, bias, start, stop, work.inner),
            len(gate_up),
            _ROWS_PER_THREAD,
        )

    def norm_in_place(self, values: Floats, weight: Floats) -> None:
        """Normalize what attention mixed, or the gated values; nothing where the weight is empty."""
        if weight.size:
            epsilon = self.config.norm_epsilon
            over_ranges(
                self.workers,
                lambda start, stop, _: norm_rows(values, weight, epsilon, start, stop),
                len(values),
                _ROWS_PER_THREAD,
            )

    def mix(self, work: Buffers, layer: Layer, number: int, parts: Sequence[Part]) -> Floats:
        """Return what tokens make of those before them: by attention, or of the state that these have left."""
        if layer.recurrent is not None:
            return layer.recurrent.mix(layer.qkv(work.normed), work.normed, number, parts)
        self.attend(work, layer, number, parts)
        return work.mixed

    def attend(self, work: Buffers, layer: Layer, number: int, parts: Sequence[Part]) -> None:
        """Let the tokens of each part read those before them, and put their keys and values into its cache.

        The caches are all of one type.
        """
        config = self.config
        qkv = layer.qkv(work.normed)
        bias, q_norm, k_norm = layer.qkv_bias, layer.q_norm, layer.k_norm
        gates = NO_MATRIX_VALUES
        if config.gated:
            qkv += bias
            qkv, gates = self._apart(qkv)
            bias = self._no_qkv_bias
        if config.qk_norm == "whole":
            self._norm_whole(qkv, layer)
            bias, q_norm, k_norm = self._no_qkv_bias, NO_NORM, NO_NORM
        window = config.windows[number] or NO_WINDOW
        if self._all_next:
            self._next.attend(qkv, work.mixed, bias, q_norm, k_norm, number, window)
        else:
            self._attend_parts(work, layer, qkv, number, window, parts, bias, q_norm, k_norm)
        if config.gated:
            over_ranges(
                self.workers,
                lambda start, stop, _: gate_by_sigmoid(work.mixed, gates, start, stop),
                len(gates),
                _ROWS_PER_THREAD,
            )

    def _attend_parts(
        self, work: Buffers, layer: Layer, qkv: Floats, number: int, window: int, parts: Sequence[Part],
        bias: Floats, q_norm: Floats, k_norm: Floats,
    ) -> None:  # fmt: skip
        """Let the tokens of each part read those before them, one part after the other."""
        config = self.config
        for part in parts:
            self._place(part, qkv[part.start : part.stop], number, bias, q_norm, k_norm)
        attend = (ATTEND_WITH_SINKS if config.sinks else ATTEND)[parts[0].cache.keys[number].dtype]
        if config.sinks:
            for scratch in self._scratch:
                scratch[self._scratch_size :] = layer.sinks
        if len(parts) == 1 and self._fits_one_thread(parts[0], window):  # most tokens: as little Python as can be
            cache, count = parts[0].cache, work_items(len(qkv), config.heads, config.kv_heads)
            attend(
                qkv, config.heads, cache.keys[number], cache.values[number], cache.length, window, 0, count,
                self._scratch[0], work.mixed,
            )  # fmt: skip
        else:
            self._attend_shared(attend, work, qkv, number, parts, window)

    def _fits_one_thread(self, part: Part, window: int) -> bool:
        """Return whether one thread computes a part's scores: it has no other, or they are few."""
        steps = _seen(part, window) * self.config.heads * self.config.head_dim
        return self.workers.threads == 1 or steps <= _STEPS_PER_THREAD

    def _attend_shared(
        self, attend: Any, work: Buffers, qkv: Floats, number: int, parts: Sequence[Part], window: int
    ) -> None:
        """Let the threads share the work items of all parts."""
        config = self.config
        items = [work_items(part.stop - part.start, config.heads, config.kv_heads) for part in parts]
        ends = list(itertools.accumulate(items))

        def run(start: int, stop: int, worker: int) -> None:
            for part, own, end in zip(parts, items, ends, strict=True):
                begin = end - own
                if begin < stop and end > start:
                    cache, rows = part.cache, slice(part.start, part.stop)
                    attend(
                        qkv[rows], config.heads, cache.keys[number], cache.values[number], cache.length, window,
                        max(start, begin) - begin, min(stop, end) - begin, self._scratch[worker], work.mixed[rows],
                    )  # fmt: skip

        steps = sum(_seen(part, window) for part in parts) * config.heads * config.head_dim
        over_ranges(self.workers, run, ends[-1], 1 if steps > _STEPS_PER_THREAD else ends[-1])

    def _apart(self, qkv: Floats) -> tuple[Floats, Floats]:
        """Return queries, keys and values, and the gates, whose rows lie with those of the queries, head by head."""
        config, n = self.config, len(qkv)
        queries = config.heads * config.head_dim
        pairs = qkv[:, : 2 * queries].reshape(n, config.heads, 2, config.head_dim)
        first = pairs[:, :, 0].reshape(n, queries)
        gates = np.ascontiguousarray(pairs[:, :, 1]).reshape(n, queries)
        return np.concatenate([first, qkv[:, 2 * queries :]], axis=1), gates

    def _place(self, part: Part, qkv: Floats, number: int, bias: Floats, q_norm: Floats, k_norm: Floats) -> None:
        """Rotate a part's queries, and put its keys and values into its cache."""
        config, cache, n = self.config, part.cache, len(qkv)
        cache.reach(cache.length + n)
        keys, values = cache.keys[number], cache.values[number]
        cosines, sines = cache.rotation(number)
        place = (PLACE_IN_PAIRS if config.rotates_in_pairs else PLACE)[keys.dtype]

        def rotate(start: int, stop: int, _: int) -> None:
            place(
                qkv, bias, q_norm, k_norm, config.norm_epsilon, self._query_scale, cosines, sines, cache.length,
                config.heads, start, stop, keys, values,
            )  # fmt: skip

        over_ranges(self.workers, rotate, n, _ROWS_PER_THREAD)
        rope = config.ropes[number]
        if rope.query_growth and cache.length + n > rope.original_context:
            qkv[:, : config.heads * config.head_dim] *= growth(rope, cache.length, n)[:, None]

    def _norm_whole(self, qkv: Floats, layer: Layer) -> None:
        """Add the bias, and normalize all queries of a token as one vector and all keys as one."""
        bias, epsilon = layer.qkv_bias, self.config.norm_epsilon
        over_ranges(
            self.workers,
            lambda start, stop, _: norm_queries_keys(qkv, bias, layer.q_norm, layer.k_norm, epsilon, start, stop),
            len(qkv),
            _ROWS_PER_THREAD,
        )
