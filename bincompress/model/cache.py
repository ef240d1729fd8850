"""The key-value cache: allocated once for a number of positions, filled by the decoder, rewound for the next text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bincompress.model import rope
from bincompress.model.config import ModelConfig
from bincompress.model.errors import PromptError
from bincompress.model.recurrence_fields import Recurrent
from bincompress.process.pages import zeros_by_page
from cpu_kernels.decoder.attention import BLOCK, padded
from cpu_kernels.decoder.quantized_cache import SCALE_ROWS, set_factors

CacheType = Literal["float32", "float16", "int8"]

_FIRST_POSITIONS = 512  # of the rotation table when it is first needed; it doubles from there

# float16 patterns are uint16 here, as the kernels take them.
_ITEMS: dict[CacheType, type[Any]] = {"float32": np.float32, "float16": np.uint16, "int8": np.int8}
_OF_BITS: dict[int, CacheType] = {16: "float16", 8: "int8"}


def cache_type(kv_bits: int) -> CacheType:
    """Return how keys and values of so many bits are kept; raises PromptError for other numbers."""
    if kv_bits not in _OF_BITS:
        raise PromptError(f"kv bits: expected {' or '.join(map(str, _OF_BITS))}, found {kv_bits!r:.40}")
    return _OF_BITS[kv_bits]


class State:
    """What the tokens of a layer without attention read: that after the positions so far, and room for the next."""

    def __init__(self, sizes: Recurrent) -> None:
        shapes: list[tuple[int, ...]] = [(sizes.width - 1, sizes.channels)]
        if sizes.kind == "delta":
            shapes.append((sizes.heads, sizes.key_dim, sizes.value_dim))
        # The last inputs of the convolution, and what the heads have learnt.
        self.now = [np.zeros(shape, np.float32) for shape in shapes]
        self.following = [np.zeros(shape, np.float32) for shape in shapes]

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(array.nbytes for array in (*self.now, *self.following))

    def turn(self) -> None:
        """Let the two change places: to the state after a pass, or back to the one before it."""
        self.now, self.following = self.following, self.now


class KvCache:
    """Keys and values of the positions so far, and the rotation table for those that were reached.

    Of a layer without attention there is a state in their place, for the last positions and for those before the last
    pass. Such a cache can be rewound to these, or to nothing (`reusable`).

    float16 halves the memory and the reading: decoding one token at 512 and 4096 positions (32 heads of 64, 8 of keys,
    one core) took 0.086 and 0.83 ms a layer against 0.15 and 2.2 ms with float32; float32 is exact. int8 has one scale
    per token and head, and takes 0.53 of float16's memory with heads of 64.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        kind: CacheType = "float32",
        factors: Sequence[NDArray[np.float32]] | None = None,
    ) -> None:
        """factors: of int8 keys' columns, (kv heads, head_dim) for each layer; without them all are 1."""
        if not 0 < capacity <= config.context:
            raise PromptError(
                f"context: expected 1 to {config.context} tokens ({config.context_limit}), found {capacity}"
            )
        self.capacity = capacity
        self.kind = kind
        self.length = 0
        self._touched = 0  # positions that were ever filled
        self._before: int | None = None  # positions before the last pass, of whose states this is known
        blocks = -(-capacity // BLOCK)
        item = _ITEMS[kind]
        # Zeros are handed out by the system page by page, so what a short text does not reach costs no memory.
        try:
            heads = [0 if config.is_recurrent(layer) else config.kv_heads for layer in range(config.layers)]
            self.keys: list[NDArray[Any]] = [
                zeros_by_page((own, *_key_shape(config, blocks, kind)), item) for own in heads
            ]
            self.values: list[NDArray[Any]] = [
                zeros_by_page((own, blocks * BLOCK, padded(config.head_dim)), item) for own in heads
            ]
            sizes = config.recurrent
            which = [layer for layer in range(config.layers) if config.is_recurrent(layer)]
            self._states = {layer: State(sizes) for layer in which} if sizes is not None else {}
        except MemoryError:
            raise PromptError(
                f"context: {capacity:,} tokens need {cache_bytes(config, capacity, kind) / 1e9:,.1f} GB for their keys "
                "and values, more than there are; give a smaller --max-tokens"
            ) from None
        if kind == "int8":
            for layer, own in enumerate(self.keys):
                given = np.ones((len(own), config.head_dim), np.float32) if factors is None else factors[layer]
                set_factors(own, given[: len(own)])
        self._head_dim = config.head_dim
        self._ropes = _distinct(config)
        self._of_layer = [self._ropes.index(own) for own in config.ropes]
        # Of the positions that were reached: a table for the whole context may take gigabytes that no text uses.
        self._reached = 0
        self._placed, self._places = -1, np.empty(0, np.int64)
        self._tables = [rope.table(own, config.head_dim, 0) for own in self._ropes]

    def rotation(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return a layer's cosines and sines of the positions that were reached, each (positions, rotated / 2)."""
        return self._tables[self._of_layer[layer]]

    def places(self) -> NDArray[np.int64]:
        """Return where each layer's arrays lie and how long they are, int64 (layers, TEXT); it changes with `reach`.

        TEXT: the words of `cpu_kernels.decoder.next_tokens`, of which the position is left 0.
        """
        if self._placed != self._reached:
            self._placed = self._reached
            self._places = np.array(
                [
                    [
                        keys.ctypes.data, values.ctypes.data, *keys.shape[1:3], *values.shape[1:], 0,
                        cosines.ctypes.data, sines.ctypes.data, cosines.shape[1],
                    ]
                    for keys, values, (cosines, sines) in zip(
                        self.keys, self.values, map(self.rotation, range(len(self.keys))), strict=True
                    )
                ],
                np.int64,
            )  # fmt: skip
        return self._places

    def state(self, layer: int) -> State:
        """Return the state of a layer without attention."""
        return self._states[layer]

    @property
    def _state_bytes(self) -> int:
        return sum(state.nbytes for state in self._states.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache once it is filled."""
        arrays = sum(array.nbytes for array in (*self.keys, *self.values))
        return arrays + self._state_bytes + _table_bytes(self._ropes, self._head_dim, self.capacity)

    @property
    def held_bytes(self) -> int:
        """Bytes of the positions that were ever filled: the memory that the cache takes at present."""
        share = -(-self._touched // BLOCK) * BLOCK / self.values[0].shape[1]
        arrays = sum(array.nbytes for array in (*self.keys, *self.values))
        tables = _table_bytes(self._ropes, self._head_dim, self._reached)
        return int(arrays * share) + self._state_bytes + tables

    def advance(self, count: int) -> None:
        """Note that a pass over `count` tokens is done: what it wrote counts from now on."""
        self._before, self.length = self.length, self.length + count
        for state in self._states.values():
            state.turn()

    def reusable(self, length: int) -> int:
        """Return how many of the first `length` positions `rewind` and `copy_from` can go back to."""
        if not self._states:
            return min(length, self.length)
        return max((known for known in (self.length, self._before or 0) if known <= length), default=0)

    def copy_from(self, other: "KvCache", length: int) -> None:
        """Hold what the first `length` positions of another cache of this model and type hold, and nothing else."""
        if length > min(other.length, self.capacity) or other.reusable(length) != length:
            raise ValueError(f"cannot copy {length} positions of {other.length} into a cache of {self.capacity}")
        for layer, state in self._states.items():
            theirs = other.state(layer)
            of_length = theirs.now if length == other.length else theirs.following
            for array, found in zip(state.now, of_length, strict=True):
                array[:] = found if length else 0
        self._before = None
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
        longer = []  # of all before one counts: memory may end on the way
        for own, before in zip(self._ropes, self._tables, strict=True):
            added = rope.table(own, self._head_dim, until, have)
            longer.append((np.concatenate([before[0], added[0]]), np.concatenate([before[1], added[1]])))
        self._tables, self._reached = longer, until

    @property
    def free(self) -> int:
        """Positions that are still to be filled."""
        return self.capacity - self.length

    def rewind(self, length: int = 0) -> None:
        """Forget all positions from `length` on."""
        if not 0 <= length <= self.length or self.reusable(length) != length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} positions")
        if length != self.length:
            for state in self._states.values():
                state.turn()
                for array in state.now if not length else ():
                    array.fill(0)
            self._before = None
        self.length = length


@dataclass(frozen=True)
class Part:
    """The rows start .. stop - 1 of a block: tokens of one sequence, after those in its cache."""

    cache: KvCache
    start: int
    stop: int


def cache_bytes(config: ModelConfig, capacity: int, kind: CacheType = "float32") -> int:
    """Return the bytes that a cache of this capacity takes, before one is made."""
    positions = -(-capacity // BLOCK) * BLOCK
    with_attention = sum(not config.is_recurrent(layer) for layer in range(config.layers))
    heads = with_attention * config.kv_heads
    items = heads * (math.prod(_key_shape(config, positions // BLOCK, kind)) + positions * padded(config.head_dim))
    states = (config.layers - with_attention) * config.recurrent.state_bytes if config.recurrent is not None else 0
    tables = _table_bytes(_distinct(config), config.head_dim, capacity)
    return items * np.dtype(_ITEMS[kind]).itemsize + states + tables


def _key_shape(config: ModelConfig, blocks: int, kind: CacheType) -> tuple[int, int, int]:
    """Return the shape of a head's keys: of int8 with scales in every block, and a block for the columns' factors."""
    return (blocks + 1, config.head_dim + SCALE_ROWS, BLOCK) if kind == "int8" else (blocks, config.head_dim, BLOCK)


def _distinct(config: ModelConfig) -> list[rope.Rope]:
    return list(dict.fromkeys(config.ropes))


def _table_bytes(ropes: list[rope.Rope], head_dim: int, positions: int) -> int:
    return sum(positions * rope.rotated(own, head_dim) * 4 for own in ropes)
