"""The key-value cache: allocated once for a number of positions, filled by the decoder, rewound for the next text."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bincompress.model import rope
from bincompress.model.config import ModelConfig
from bincompress.model.errors import PromptError
from cpu_kernels.decoder.attention import BLOCK, padded

CacheType = Literal["float32", "float16"]

_FIRST_POSITIONS = 512  # of the rotation table when it is first needed; it doubles from there

# float16 patterns are uint16 here, as the kernels take them.
_ITEMS: dict[CacheType, type[Any]] = {"float32": np.float32, "float16": np.uint16}


class KvCache:
    """Keys and values of the positions so far, and the rotation table for those that were reached.

    float16 halves the memory and the reading: decoding one token at 512 and 4096 positions (32 heads of 64, 8 of keys,
    one core) took 0.086 and 0.83 ms a layer against 0.15 and 2.2 ms with float32; float32 is exact.
    """

    def __init__(self, config: ModelConfig, capacity: int, kind: CacheType = "float32") -> None:
        if not 0 < capacity <= config.context:
            raise PromptError(
                f"context: expected 1 to {config.context} tokens ({config.context_limit}), found {capacity}"
            )
        self.capacity = capacity
        self.kind = kind
        self.length = 0
        self._touched = 0  # positions that were ever filled
        blocks = -(-capacity // BLOCK)
        item = _ITEMS[kind]
        # Zeros are handed out by the system page by page, so what a short text does not reach costs no memory.
        try:
            self.keys: list[NDArray[Any]] = [
                np.zeros((config.kv_heads, blocks, config.head_dim, BLOCK), item) for _ in range(config.layers)
            ]
            self.values: list[NDArray[Any]] = [
                np.zeros((config.kv_heads, blocks * BLOCK, padded(config.head_dim)), item) for _ in range(config.layers)
            ]
        except MemoryError:
            raise PromptError(
                f"context: {capacity:,} tokens need {cache_bytes(config, capacity, kind) / 1e9:,.1f} GB for their keys "
                "and values, more than there are; give a smaller --max-tokens"
            ) from None
        self._head_dim = config.head_dim
        self._ropes = _distinct(config)
        self._of_layer = [self._ropes.index(own) for own in config.ropes]
        # Of the positions that were reached: a table for the whole context may take gigabytes that no text uses.
        self._reached = 0
        self._tables = [rope.table(own, config.head_dim, 0) for own in self._ropes]

    def rotation(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return a layer's cosines and sines of the positions that were reached, each (positions, rotated / 2)."""
        return self._tables[self._of_layer[layer]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache once it is filled."""
        arrays = sum(array.nbytes for array in (*self.keys, *self.values))
        return arrays + _table_bytes(self._ropes, self._head_dim, self.capacity)

    @property
    def held_bytes(self) -> int:
        """Bytes of the positions that were ever filled: the memory that the cache takes at present."""
        share = -(-self._touched // BLOCK) * BLOCK / self.values[0].shape[1]
        arrays = sum(array.nbytes for array in (*self.keys, *self.values))
        return int(arrays * share) + _table_bytes(self._ropes, self._head_dim, self._reached)

    def copy_from(self, other: "KvCache", length: int) -> None:
        """Hold what the first `length` positions of another cache of this model and type hold, and nothing else."""
        if length > min(other.length, self.capacity):
            raise ValueError(f"cannot copy {length} positions of {other.length} into a cache of {self.capacity}")
        blocks = -(-length // BLOCK)
        for own, source in zip(self.keys, other.keys, strict=True):
            own[:, :blocks] = source[:, :blocks]
        for own, source in zip(self.values, other.values, strict=True):
            own[:, :length] = source[:, :length]
        self.hold(length)

    def hold(self, length: int) -> None:
        """Count so many positions as filled, whose keys and values were put there."""
        self.reach(length)
        self.length = length

    def reach(self, length: int) -> None:
        """Make the rotation tables long enough for so many positions, at most the capacity."""
        self._touched = max(self._touched, length)
        have = self._reached
        if length <= have:
            return
        until = min(self.capacity, max(length, 2 * have, _FIRST_POSITIONS))
        for number, (own, before) in enumerate(zip(self._ropes, self._tables, strict=True)):
            added = rope.table(own, self._head_dim, until, have)
            self._tables[number] = np.concatenate([before[0], added[0]]), np.concatenate([before[1], added[1]])
        self._reached = until

    @property
    def free(self) -> int:
        """Positions that are still to be filled."""
        return self.capacity - self.length

    def rewind(self, length: int = 0) -> None:
        """Forget all positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} positions")
        self.length = length


def cache_bytes(config: ModelConfig, capacity: int, kind: CacheType = "float32") -> int:
    """Return the bytes that a cache of this capacity takes, before one is made."""
    positions = -(-capacity // BLOCK) * BLOCK
    per_position = config.layers * config.kv_heads * (config.head_dim + padded(config.head_dim))
    return positions * per_position * np.dtype(_ITEMS[kind]).itemsize + _table_bytes(
        _distinct(config), config.head_dim, capacity
    )


def _distinct(config: ModelConfig) -> list[rope.Rope]:
    return list(dict.fromkeys(config.ropes))


def _table_bytes(ropes: list[rope.Rope], head_dim: int, positions: int) -> int:
    return sum(positions * rope.rotated(own, head_dim) * 4 for own in ropes)
