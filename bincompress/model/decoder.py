"""The decoder: tokens in, final states and logits out, over any form of matrices."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bincompress.model.cache import CacheType, KvCache
from bincompress.model.config import ModelConfig
from bincompress.model.errors import PromptError
from bincompress.model.linear import Embedding, Linear, WeightSource
from bincompress.model.threads import over_ranges
from cpu_kernels.attention import ATTEND, NO_WINDOW, scratch_size, work_items
from cpu_kernels.norms import PLACE, add_norm, gate
from cpu_kernels.products import Workers

Floats = NDArray[np.float32]

PREFILL_BLOCK = 512  # tokens that go through the layers together
_NONE = np.zeros(0, np.float32)
# Handing work to another thread costs some 30 microseconds, so small work stays on the calling thread.
_ROWS_PER_THREAD = 8
_STEPS_PER_THREAD = 1 << 20  # multiply-adds of one layer's scores


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; biases that the model lacks are zeros, norms of queries and keys it lacks are empty."""

    input_norm: Floats  # (hidden,)
    post_norm: Floats  # (hidden,)
    qkv: Linear  # queries, keys, values: ((heads + 2 kv_heads) * head_dim, hidden)
    qkv_bias: Floats
    q_norm: Floats  # (head_dim,)
    k_norm: Floats  # (head_dim,)
    out: Linear  # (hidden, heads * head_dim)
    out_bias: Floats
    gate_up: Linear  # (2 * inner, hidden)
    gate_up_bias: Floats
    down: Linear  # (hidden, inner)
    down_bias: Floats


class Decoder:
    """A decoder-only transformer. One instance serves one caller at a time; its work buffers are reused.

    >>> decoder = Decoder(config, source)  # doctest: +SKIP
    >>> cache = decoder.new_cache(128)  # doctest: +SKIP
    >>> logits = decoder.next_logits([1, 5, 9], cache)  # doctest: +SKIP
    """

    def __init__(self, config: ModelConfig, source: WeightSource, workers: Workers | None = None) -> None:
        names = config.declaration.names
        self.config = config
        self.workers = workers or Workers(1)
        self.layers = _layers(config, source, self.workers)
        self.norm = source.vector([names.norm])
        self.embedding: Embedding = source.embedding(names.embedding)
        self.head: Linear = source.linear([names.embedding if config.tied else names.head])
        self._no_bias = np.zeros(config.hidden, np.float32)
        self._scratch = [np.empty(scratch_size(config.head_dim), np.float32) for _ in range(self.workers.threads)]
        self._buffers = Buffers.for_tokens(config, 1)

    def new_cache(self, capacity: int | None = None, kind: CacheType = "float32") -> KvCache:
        """Return an empty cache for `capacity` positions (the model's whole context if not given)."""
        return KvCache(self.config, capacity or self.config.context, kind)

    def next_logits(self, ids: Sequence[int] | NDArray[np.int64], cache: KvCache) -> Floats:
        """Run these tokens after those in the cache and return the logits that follow the last, (vocab,)."""
        tokens = self._checked(ids, cache)
        for start in range(0, len(tokens), PREFILL_BLOCK):
            state = self._advance(tokens[start : start + PREFILL_BLOCK], cache)[-1:]
        return np.asarray(self.head(np.ascontiguousarray(state))[0])

    def states(self, ids: Sequence[int] | NDArray[np.int64], cache: KvCache) -> Floats:
        """Run these tokens after those in the cache and return what the output head reads, (n, hidden)."""
        tokens = self._checked(ids, cache)
        result = np.empty((len(tokens), self.config.hidden), np.float32)
        for start in range(0, len(tokens), PREFILL_BLOCK):
            stop = start + PREFILL_BLOCK
            result[start:stop] = self._advance(tokens[start:stop], cache)
        return result

    def logits(self, ids: Sequence[int] | NDArray[np.int64], cache: KvCache) -> Floats:
        """Run these tokens after those in the cache and return the logits after each, (n, vocab)."""
        return self.head(self.states(ids, cache))

    def check_ids(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens as an array; raise PromptError if there is none, or one outside of the vocabulary."""
        tokens = np.asarray(ids, np.int64)
        if tokens.ndim != 1 or not len(tokens):
            raise PromptError("no tokens to run: expected at least one")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab:
            worst = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise PromptError(f"token {worst} is not in the vocabulary: expected 0 to {self.config.vocab - 1}")
        return tokens

    def _checked(self, ids: Sequence[int] | NDArray[np.int64], cache: KvCache) -> NDArray[np.int64]:
        tokens = self.check_ids(ids)
        if len(tokens) > cache.free:
            raise PromptError(
                f"{len(tokens)} tokens after {cache.length} do not fit the context of {cache.capacity}; "
                "shorten the text or enlarge the context"
            )
        return tokens

    def _advance(self, tokens: NDArray[np.int64], cache: KvCache) -> Floats:
        """Run one block; the result, (n, hidden), is a buffer that the next block overwrites."""
        n = len(tokens)
        if len(self._buffers.stream) < n:
            self._buffers = Buffers.for_tokens(self.config, n)
        work = self._buffers.first(n)
        work.stream.fill(0.0)
        delta, bias = self.embedding.rows_of(tokens), self._no_bias
        for number, layer in enumerate(self.layers):
            self._add_norm(work, delta, bias, layer.input_norm)
            self._attend(work, layer, number, cache)
            self._add_norm(work, layer.out(work.mixed), layer.out_bias, layer.post_norm)
            self._gate(work, layer.gate_up(work.normed), layer.gate_up_bias)
            delta, bias = layer.down(work.inner), layer.down_bias
        self._add_norm(work, delta, bias, self.norm)
        cache.length += n
        return work.normed

    def _add_norm(self, work: "Buffers", delta: Floats, bias: Floats, weight: Floats) -> None:
        epsilon = self.config.norm_epsilon
        over_ranges(
            self.workers,
            lambda start, stop, _: add_norm(work.stream, delta, bias, weight, epsilon, start, stop, work.normed),
            len(delta),
            _ROWS_PER_THREAD,
        )

    def _gate(self, work: "Buffers", gate_up: Floats, bias: Floats) -> None:
        over_ranges(
            self.workers,
            lambda start, stop, _: gate(gate_up, bias, start, stop, work.inner),
            len(gate_up),
            _ROWS_PER_THREAD,
        )

    def _attend(self, work: "Buffers", layer: Layer, number: int, cache: KvCache) -> None:
        config, first, n = self.config, cache.length, len(work.normed)
        keys, values = cache.keys[number], cache.values[number]
        place, attend = PLACE[keys.dtype], ATTEND[keys.dtype]
        window = config.windows[number] or NO_WINDOW
        qkv = layer.qkv(work.normed)
        over_ranges(
            self.workers,
            lambda start, stop, _: place(
                qkv, layer.qkv_bias, layer.q_norm, layer.k_norm, config.norm_epsilon, cache.cosines, cache.sines,
                first, config.heads, start, stop, keys, values,
            ),
            n,
            _ROWS_PER_THREAD,
        )  # fmt: skip
        items = work_items(n, config.heads, config.kv_heads)
        steps = n * min(first + n, window) * config.heads * config.head_dim
        over_ranges(
            self.workers,
            lambda start, stop, worker: attend(
                qkv, config.heads, keys, values, first, window, start, stop, self._scratch[worker], work.mixed
            ),
            items,
            1 if steps > _STEPS_PER_THREAD else items,
        )


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


def _layers(config: ModelConfig, source: WeightSource, workers: Workers) -> list[Layer]:
    """Read every layer, several threads one each at a time."""
    found: dict[int, Layer] = {}

    def read(start: int, stop: int, _: int) -> None:
        for number in range(start, stop):
            found[number] = _layer(config, source, number)

    over_ranges(workers, read, config.layers)
    return [found[number] for number in range(config.layers)]


def _layer(config: ModelConfig, source: WeightSource, number: int) -> Layer:
    names = config.declaration.names

    def linear(*parts: str) -> Linear:
        return source.linear([names.of_layer(number, part + ".weight") for part in parts])

    def vector(part: str) -> Floats:
        return source.vector([names.of_layer(number, part)])

    def bias(present: bool, matrix: Linear, *parts: str) -> Floats:
        if not present:
            return np.zeros(matrix.rows, np.float32)
        return source.vector([names.of_layer(number, part + ".bias") for part in parts])

    qkv, out = linear(*names.qkv), linear(names.out)
    gate_up, down = linear(*names.gate_up), linear(names.down)
    return Layer(
        input_norm=vector(names.input_norm),
        post_norm=vector(names.post_norm),
        qkv=qkv,
        qkv_bias=bias(config.qkv_bias, qkv, *names.qkv),
        q_norm=vector(names.q_norm) if config.qk_norm else _NONE,
        k_norm=vector(names.k_norm) if config.qk_norm else _NONE,
        out=out,
        out_bias=bias(config.out_bias, out, names.out),
        gate_up=gate_up,
        gate_up_bias=bias(config.mlp_bias, gate_up, *names.gate_up),
        down=down,
        down_bias=bias(config.mlp_bias, down, names.down),
    )
