"""The decoder: tokens in, final states and logits out, over any form of matrices."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bincompress.model.cache import CacheType, KvCache
from bincompress.model.config import ModelConfig
from bincompress.model.errors import NotFiniteError, PromptError
from bincompress.model.experts import read_experts
from bincompress.model.kv_factors import key_factors
from bincompress.model.linear import FEW_TOKENS, Embedding, Linear, WeightSource
from bincompress.model.recurrent import read_recurrent_layer
from bincompress.model.residents import Residents
from bincompress.model.rounded_linear import rounding
from bincompress.model.steps import NO_MATRIX, NO_NORM, Buffers, Layer, Part, Steps
from bincompress.model.threads import in_turn
from cpu_kernels.parallel.workers import Workers

Floats = NDArray[np.float32]

PREFILL_BLOCK = 512  # tokens that go through the layers together


class Decoder:
    """A decoder-only transformer, which any number of threads may call, each with a cache of its own.

    Its work buffers are shared, so blocks of tokens run one after the other, whichever thread they come from.

    >>> decoder = Decoder(config, source)  # doctest: +SKIP
    >>> cache = decoder.new_cache(128)  # doctest: +SKIP
    >>> logits = decoder.next_logits([1, 5, 9], cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        workers: Workers | None = None,
        residents: Residents | None = None,
    ) -> None:
        """residents: where experts are read as tokens choose them, which of them are in memory."""
        names = config.declaration.names
        self.config = config
        self.workers = workers or Workers(1)
        self.residents = residents
        self.layers, self.embedding, self.head = _read(config, source, self.workers, residents)
        self.norm = read_norm(config, source, names.norm)
        self._steps = Steps(config, self.workers)
        self._buffers = Buffers.for_tokens(config, 1)

    def new_cache(self, capacity: int | None = None, kind: CacheType = "float32") -> KvCache:
        """Return an empty cache for `capacity` positions (the model's whole context if not given)."""
        factors = self._key_factors if kind == "int8" else None
        return KvCache(self.config, capacity or self.config.context, kind, factors)

    @functools.cached_property
    def _key_factors(self) -> list[Floats]:
        return [key_factors(self.config, layer, number) for number, layer in enumerate(self.layers)]

    def next_logits(self, ids: Sequence[int] | NDArray[np.int64], cache: KvCache) -> Floats:
        """Run these tokens after those in the cache and return the logits that follow the last, (vocab,)."""
        tokens = self._checked(ids, cache)
        for start in range(0, len(tokens), PREFILL_BLOCK):
            with self.workers.lock:
                state = self._advance(tokens[start : start + PREFILL_BLOCK], cache).normed[-1:].copy()
        return np.asarray(self.logits_of(state)[0])

    def states(self, ids: Sequence[int] | NDArray[np.int64], cache: KvCache) -> Floats:
        """Run these tokens after those in the cache and return what the output head reads, (n, hidden)."""
        tokens = self._checked(ids, cache)
        result = np.empty((len(tokens), self.config.hidden), np.float32)
        for start in range(0, len(tokens), PREFILL_BLOCK):
            stop = start + PREFILL_BLOCK
            with self.workers.lock:
                result[start:stop] = self._advance(tokens[start:stop], cache).normed
        return result

    def states_of_all(self, texts: Sequence[tuple[Sequence[int] | NDArray[np.int64], KvCache]]) -> Floats:
        """Run tokens of several sequences, each after those in its own cache, in one pass over the weights.

        Returns what the output head reads, (n, hidden), the first sequence's tokens first. Up to `tokens_alike` tokens
        get the numbers that each gets alone. Raises PromptError or NotFiniteError, and then no cache has changed.
        """
        checked = [self._checked(ids, cache) for ids, cache in texts]
        if len({id(cache) for _, cache in texts}) < len(texts):
            raise ValueError("sequences that run together: expected a cache for each")
        parts, n = [], 0
        for tokens, (_, cache) in zip(checked, texts, strict=True):
            parts.append(Part(cache, n, n + len(tokens)))
            n += len(tokens)
        with self.workers.lock:
            return self._advance_parts(np.concatenate(checked), parts).normed.copy()

    @property
    def tokens_alike(self) -> int | None:
        """The most tokens that may share a pass for each to get the numbers that it gets alone; None: any number."""
        found = [
            getattr(matrix, "tokens_alike", FEW_TOKENS)
            for layer in self.layers
            for matrix in (getattr(layer, field.name) for field in dataclasses.fields(layer))
            if callable(matrix)
        ]
        return min((most for most in found if most is not None), default=None)

    def logits(self, ids: Sequence[int] | NDArray[np.int64], cache: KvCache) -> Floats:
        """Run these tokens after those in the cache and return the logits after each, (n, vocab)."""
        return self.logits_of(self.states(ids, cache))

    def logits_of(self, states: Floats) -> Floats:
        """Return the logits (n, vocab) of final states (n, hidden); raises NotFiniteError."""
        workers = self.workers
        with workers.lock:
            workers.claim()
            workers.busy = True
            try:
                found = self.head(states)
            finally:
                workers.busy = False
        found = finished_logits(self.config, found)
        # The states too: quantizing them for the head could make numbers of NaN.
        if not (np.isfinite(states).all() and np.isfinite(found).all()):
            raise NotFiniteError(
                "the model computes NaN or infinity: a norm, an embedding or another weight that was kept as it is "
                "holds such a value, or float32 overflows; check the checkpoint and compress it again"
            )
        return found

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

    def _advance(self, tokens: NDArray[np.int64], cache: KvCache) -> Buffers:
        """Run one block of tokens (n,); the next one overwrites the buffers, so the caller holds the workers' lock."""
        return self._advance_parts(tokens, [Part(cache, 0, len(tokens))])

    def _advance_parts(self, tokens: NDArray[np.int64], parts: Sequence[Part]) -> Buffers:
        self.workers.claim()
        self.workers.busy = True
        try:
            return self._run(embedded(self.config, self.embedding, tokens), parts)
        finally:
            self.workers.busy = False

    def _run(self, vectors: Floats, parts: Sequence[Part]) -> Buffers:
        if not np.isfinite(vectors).all():
            raise NotFiniteError("a token's embedding holds NaN or infinity; check the checkpoint and compress again")
        n = len(vectors)
        if len(self._buffers.stream) < n:
            self._buffers = Buffers.for_tokens(self.config, n)
        work, steps = self._buffers.first(n), self._steps
        steps.take(parts)
        steps.begin(work, vectors, self.layers[0].input_norm)
        for number, layer in enumerate(self.layers):
            following = self.layers[number + 1].input_norm if number + 1 < len(self.layers) else self.norm
            mixed = steps.mix(work, layer, number, parts)
            steps.norm_in_place(mixed, layer.mixed_norm)
            steps.add(work, layer.out(mixed), layer.out_bias, layer.out_norm, layer.post_norm)
            if layer.experts is None:
                steps.gate(work, layer.gate_up(work.normed), layer.gate_up_bias)
                steps.norm_in_place(work.inner, layer.inner_norm)
                made = layer.down(work.inner)
            else:
                made = layer.experts(work.normed)
            steps.add(work, made, layer.down_bias, layer.down_norm, following)
        for part in parts:
            part.cache.advance(part.stop - part.start)
        return work


def _read(
    config: ModelConfig, source: WeightSource, workers: Workers, residents: Residents | None
) -> tuple[list[Layer], Embedding, Linear]:
    """Read every layer, the embedding and the head, several threads a part each at a time."""
    names = config.declaration.names
    layers: dict[int, Layer] = {}
    ends: list[tuple[Embedding, Linear]] = []

    def read(part: int) -> None:
        if part:
            layers[part - 1] = read_layer(config, source, part - 1, workers, residents)
        else:  # begun first, as it is the largest part; the embedding before a head that shares its memory
            embedding = source.embedding(names.embedding)
            ends.append((embedding, source.linear([names.embedding if config.tied else names.head])))

    in_turn(workers, read, 1 + config.layers)
    return [layers[number] for number in range(config.layers)], *ends[0]


def embedded(config: ModelConfig, table: Embedding, ids: NDArray[np.int64]) -> Floats:
    """Return what the first layer adds to of these tokens, (n, hidden), in a new array."""
    vectors = table.rows_of(ids)
    if config.embedding_multiplier != 1:
        vectors *= np.float32(config.embedding_multiplier)
    return vectors


def finished_logits(config: ModelConfig, found: Floats) -> Floats:
    """Return the logits (n, vocab) of what the head gave, which may be overwritten: divided and capped."""
    if config.logit_divisor != 1:
        found /= np.float32(config.logit_divisor)
    if config.logit_cap is None:
        return found
    cap = np.float32(config.logit_cap)
    return np.asarray(np.tanh(found / cap) * cap)


def read_norm(config: ModelConfig, source: WeightSource, name: str) -> Floats:
    """Read what a norm multiplies with."""
    stored = source.vector([name])
    return stored if not config.norm_offset else stored + np.float32(config.norm_offset)


def read_layer(
    config: ModelConfig,
    source: WeightSource,
    number: int,
    workers: Workers | None = None,
    residents: Residents | None = None,
) -> Layer:
    """Read one layer's weights; workers: that multiply with its experts, if it has any; residents: see `Decoder`."""
    names = config.declaration.names

    def linear(*parts: str) -> Linear:
        found = source.linear([names.of_layer(number, part + ".weight") for part in parts])
        return rounding(found) if config.rounds_inputs else found

    def norm(part: str, present: bool = True) -> Floats:
        return read_norm(config, source, names.of_layer(number, part)) if part and present else NO_NORM

    def bias(present: bool, matrix: Linear, *parts: str) -> Floats:
        if not present:
            return np.zeros(matrix.rows, np.float32)
        return source.vector([names.of_layer(number, part + ".bias") for part in parts])

    workers = workers or Workers(1)
    recurrent = read_recurrent_layer(config, source, number, workers)
    attends = recurrent is None
    read, written = config.mixing_of(number)
    qkv, out = linear(*read), linear(written)
    experts = read_experts(config, source, number, workers, residents)
    gate_up = linear(*names.gate_up) if experts is None else NO_MATRIX
    down = linear(names.down) if experts is None else NO_MATRIX
    mlp_bias = config.mlp_bias and experts is None
    return Layer(
        input_norm=norm(names.input_norm),
        post_norm=norm(names.post_norm),
        out_norm=norm(names.out_norm),
        down_norm=norm(names.down_norm),
        qkv=qkv,
        qkv_bias=bias(config.qkv_bias and attends, qkv, *read),
        q_norm=norm(names.q_norm, bool(config.qk_norm) and attends),
        k_norm=norm(names.k_norm, bool(config.qk_norm) and attends),
        out=out,
        out_bias=bias(config.out_bias if attends else config.has_recurrent_biases, out, written),
        gate_up=gate_up,
        gate_up_bias=bias(mlp_bias, gate_up, *names.gate_up),
        down=down,
        down_bias=bias(mlp_bias, down, names.down) if experts is None else np.zeros(config.hidden, np.float32),
        mixed_norm=norm(names.mixed_norm),
        inner_norm=norm(names.inner_norm),
        recurrent=recurrent,
        sinks=source.vector([names.of_layer(number, names.sinks)]) if config.sinks else NO_NORM,
        experts=experts,
    )
