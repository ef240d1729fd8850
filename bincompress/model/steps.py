"""The steps of a layer beside its matrices: norms, attention and the gate, on a block of tokens' work buffers."""

from dataclasses import dataclass

import numpy as np

from bincompress.model.cache import KvCache
from bincompress.model.config import ModelConfig
from bincompress.model.linear import Floats, Linear
from bincompress.model.threads import over_ranges
from cpu_kernels.decoder.attention import ATTEND, NO_WINDOW, scratch_size, work_items
from cpu_kernels.decoder.norms import PLACE, add_norm, gate
from cpu_kernels.parallel.workers import Workers

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


class Steps:
    """Runs them on an exact number of threads; one caller at a time."""

    def __init__(self, config: ModelConfig, workers: Workers) -> None:
        self.config = config
        self.workers = workers
        self._scratch = [np.empty(scratch_size(config.head_dim), np.float32) for _ in range(workers.threads)]

    def add_norm(self, work: Buffers, delta: Floats, bias: Floats, weight: Floats) -> None:
        """Add to the stream what a matrix gave, and normalize it."""
        epsilon = self.config.norm_epsilon
        over_ranges(
            self.workers,
            lambda start, stop, _: add_norm(work.stream, delta, bias, weight, epsilon, start, stop, work.normed),
            len(delta),
            _ROWS_PER_THREAD,
        )

    def gate(self, work: Buffers, gate_up: Floats, bias: Floats) -> None:
        """Gate the inner values."""
        over_ranges(
            self.workers,
            lambda start, stop, _: gate(gate_up, bias, start, stop, work.inner),
            len(gate_up),
            _ROWS_PER_THREAD,
        )

    def attend(self, work: Buffers, layer: Layer, number: int, cache: KvCache) -> None:
        """Let the tokens read those before them, and put their keys and values into the cache."""
        config, first, n = self.config, cache.length, len(work.normed)
        cache.reach(first + n)
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
