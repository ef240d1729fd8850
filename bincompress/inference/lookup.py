"""Prompt lookup: what followed the last tokens when they came before is drafted, and checked in one pass.

The text stays what it is without drafts. A token gets the same logits whichever tokens share its pass, and each is
chosen from its own logits; a draft only decides how many of these one pass computes. Source: A. Saxena, "Prompt Lookup
Decoding", 2023.
"""

from collections.abc import Sequence

import numpy as np

from bincompress.inference.sampling import Floats
from bincompress.model.cache import KvCache
from bincompress.model.decoder import Decoder

# A pass of 8 tokens takes nearly 7 times as long as one of a single token (docs/figures.md), so that only long drafts
# pay, and only where nearly all of their tokens come.
MATCHED = 12  # tokens that have to have come before in this order
LONGEST = 7  # tokens of a draft
SHORTEST = 4


class Lookup:
    """The tokens of a text, and where each run of MATCHED of them ended last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token."""
        # The run that ends before it: the last one is looked for, and must not be found at its own place.
        if len(self._tokens) >= MATCHED:
            self._ends[tuple(self._tokens[-MATCHED:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Return at most so many tokens that may follow, none where few or nothing is known."""
        place = self._ends.get(tuple(self._tokens[-MATCHED:])) if len(self._tokens) > MATCHED else None
        found = [] if place is None else self._tokens[place : place + min(most, LONGEST)]
        return found if len(found) >= SHORTEST else []


class Following:
    """Gives the logits that follow each token of a text, several from one pass where a draft was right."""

    def __init__(self, decoder: Decoder, cache: KvCache, tokens: Sequence[int], drafts: bool) -> None:
        """tokens: those in the cache. drafts: whether there are any; without them each token has a pass."""
        self._decoder, self._cache = decoder, cache
        self._lookup = Lookup(tokens) if drafts else None
        self._run = len(tokens)  # tokens of the text that were run
        self._drafted: list[int] = []
        self._states: list[Floats] = []  # after each drafted token, (1, hidden)
        self._most = min(LONGEST, (decoder.tokens_alike or LONGEST + 1) - 1) if drafts else 0

    def after(self, token: int) -> Floats:
        """Return the logits (vocab,) that follow a token of the text, the next one after those before."""
        if self._lookup is None:
            return self._decoder.next_logits([token], self._cache)
        self._lookup.push(token)
        self._run += 1
        if self._drafted and self._drafted[0] == token:
            del self._drafted[0]
            return self._logits(self._states.pop(0))
        self._cache.rewind(self._run - 1)
        draft = self._lookup.draft(min(self._most, self._cache.free - 1))
        if not draft:
            self._drafted = []
            return self._decoder.next_logits([token], self._cache)
        states = self._decoder.states_of_all([([token, *draft], self._cache)])
        self._drafted, self._states = draft, [states[row : row + 1] for row in range(1, len(states))]
        return self._logits(states[:1])

    def _logits(self, state: Floats) -> Floats:
        # One at a time: the head takes as long for several, and is not run behind a draft that was wrong.
        return np.asarray(self._decoder.logits_of(state)[0])

    def finish(self) -> None:
        """Let the cache hold tokens of the text alone."""
        if self._lookup is not None:
            self._cache.rewind(min(self._cache.length, self._run))
