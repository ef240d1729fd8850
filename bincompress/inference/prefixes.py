"""Which beginning of a text has been computed already? Caches of earlier texts, within a bound of memory.

A conversation's next turn begins with the turns before it, so only what is new is computed. Numbers are those that the
whole text gets alone: a key or value depends on nothing but the tokens before it. Layers without attention have a state
in their place, which is of all positions at once: such a cache is of use for texts that begin with all of its tokens,
or with those before its last pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bincompress.model.cache import CacheType, KvCache
from bincompress.model.decoder import Decoder

_SHORTEST_COPY = 4  # tokens; fewer are computed as soon as a cache is copied


@dataclass(frozen=True)
class Prefix:
    """A text's tokens (n,) and the cache that holds at least these positions."""

    tokens: NDArray[np.int64]
    cache: KvCache


class PrefixCache:
    """Caches that no text uses at present, the least recently used given up first. For one thread at a time."""

    def __init__(self, decoder: Decoder, capacity: int, kind: CacheType, most_bytes: int) -> None:
        self._decoder = decoder
        self.capacity = capacity
        self.kind: CacheType = kind
        self._most_bytes = most_bytes
        self._idle: list[Prefix] = []  # the least recently used first

    @property
    def held_bytes(self) -> int:
        """Bytes of the caches that wait."""
        return sum(prefix.cache.held_bytes for prefix in self._idle)

    @property
    def last(self) -> Prefix | None:
        """The cache that was used last, of those that wait."""
        return self._idle[-1] if self._idle else None

    def take(self, prompt: Sequence[int], in_use: Iterable[Prefix] = ()) -> KvCache:
        """Return a cache that holds the longest known beginning of a prompt, never all of it: one token is to be run.

        in_use: texts that are being written, whose caches may be copied. Raises PromptError where memory lacks.
        """
        wanted = np.asarray(prompt[:-1], np.int64)
        shared, best, idle = 0, None, False
        for prefixes, waits in ((self._idle, True), (in_use, False)):
            for prefix in prefixes:
                length = prefix.cache.reusable(_common(prefix.tokens[: prefix.cache.length], wanted))
                if length > shared:
                    shared, best, idle = length, prefix, waits
        if best is not None and idle and 2 * shared >= best.cache.length:
            self._idle = [prefix for prefix in self._idle if prefix is not best]
            best.cache.rewind(shared)
            return best.cache
        made = self._decoder.new_cache(self.capacity, self.kind)
        if best is not None and shared >= _SHORTEST_COPY:
            # The other text goes on differently, and more of it than this beginning may be wanted again.
            made.copy_from(best.cache, shared)
        return made

    def put(self, tokens: Sequence[int], cache: KvCache) -> None:
        """Keep the cache of a text that is no longer written; tokens: at least those in the cache."""
        held = np.asarray(tokens[: cache.length], np.int64)
        if not cache.length or cache.capacity != self.capacity:
            return
        for prefix in self._idle:
            if prefix.cache.reusable(_common(prefix.tokens, held)) == len(held):
                return  # another one holds this and more
        # What this text begins with is held by it now.
        self._idle = [
            prefix for prefix in self._idle if cache.reusable(_common(prefix.tokens, held)) < len(prefix.tokens)
        ]
        self._idle.append(Prefix(held, cache))
        while self._idle and self.held_bytes > self._most_bytes:
            self._idle.pop(0)


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Return how many tokens two texts begin with in common."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(np.argmax(differs)) if differs.any() else length
