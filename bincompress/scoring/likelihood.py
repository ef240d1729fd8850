"""How likely is a continuation of a context? Tokens that contexts and continuations share are computed once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bincompress.inference.evaluate import log_softmax
from bincompress.model.cache import CacheType, KvCache
from bincompress.model.decoder import PREFILL_BLOCK, Decoder
from bincompress.model.linear import FEW_TOKENS, Floats

_POSITIONS_AT_ONCE = 8192  # of the caches that are in use together


@dataclass(frozen=True)
class Pair:
    """A context and what follows it, at least one token each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def run(self) -> tuple[int, ...]:
        """The tokens that are run: all but the last, which nothing follows."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True)
class Likelihood:
    """The natural logarithm of a continuation's probability, and whether greedy decoding would write it."""

    logprob: float
    greedy: bool


def likelihoods(
    decoder: Decoder,
    pairs: Sequence[Pair],
    kind: CacheType,
    at_once: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
    """Return how likely each continuation is, in the order of the pairs.

    kind: type of the caches. at_once: contexts that share a pass over the weights. progress: is called with the number
    of pairs that are done. Raises PromptError where a pair does not fit the model's context, or NotFiniteError.
    """
    found: dict[int, Likelihood] = {}
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, pair in enumerate(pairs):
        by_context.setdefault(pair.context, []).append(number)
    trunk = _Trunk(decoder, max((len(context) for context in by_context), default=1), kind)
    # In this order contexts that begin alike stand beside each other.
    for contexts in _batches(sorted(by_context), by_context, pairs, at_once):
        trunk.grow(contexts)
        caches = [trunk.branch(max(len(pairs[n].run) for n in by_context[context])) for context in contexts]
        _run(decoder, [(context[cache.length : -1], cache) for context, cache in zip(contexts, caches, strict=True)])
        for context, cache in zip(contexts, caches, strict=True):
            for numbers in _slices(by_context[context], pairs):
                found |= _follow(decoder, cache, {number: pairs[number] for number in numbers}, kind)
            progress(len(found))
    return [found[number] for number in range(len(pairs))]


class _Trunk:
    """What the contexts of a batch begin with in common, kept for the next batch."""

    def __init__(self, decoder: Decoder, capacity: int, kind: CacheType) -> None:
        self._decoder = decoder
        self._cache = decoder.new_cache(capacity, kind)
        self._tokens: tuple[int, ...] = ()

    def grow(self, contexts: Sequence[tuple[int, ...]]) -> None:
        """Hold what all of these begin with, less the last token of each."""
        first, last = contexts[0], contexts[-1]  # of a sorted list: what these two share all others share too
        shared = first[: min(_common(first, last), min(len(context) for context in contexts) - 1)]
        self._cache.rewind(self._cache.reusable(_common(self._tokens, shared)))
        _run(self._decoder, [(shared[self._cache.length :], self._cache)])
        self._tokens = shared

    def branch(self, capacity: int) -> KvCache:
        """Return a cache of its own that holds the same."""
        made = self._decoder.new_cache(capacity, self._cache.kind)
        made.copy_from(self._cache, self._cache.length)
        return made


def _batches(
    contexts: Sequence[tuple[int, ...]],
    by_context: dict[tuple[int, ...], list[int]],
    pairs: Sequence[Pair],
    at_once: int,
) -> Iterator[list[tuple[int, ...]]]:
    """Yield contexts that are computed together: so many, and no more than their caches may take."""
    batch: list[tuple[int, ...]] = []
    positions = 0
    for context in contexts:
        needed = max(len(pairs[number].run) for number in by_context[context])
        if batch and (len(batch) == at_once or positions + needed > _POSITIONS_AT_ONCE):
            yield batch
            batch, positions = [], 0
        batch.append(context)
        positions += needed
    if batch:
        yield batch


def _slices(numbers: Sequence[int], pairs: Sequence[Pair]) -> Iterator[list[int]]:
    """Yield continuations of one context that are computed together, within what their caches may take."""
    part: list[int] = []
    positions = 0
    for number in numbers:
        if part and positions + len(pairs[number].run) > _POSITIONS_AT_ONCE:
            yield part
            part, positions = [], 0
        part.append(number)
        positions += len(pairs[number].run)
    yield part


def _follow(decoder: Decoder, cache: KvCache, pairs: dict[int, Pair], kind: CacheType) -> dict[int, Likelihood]:
    """Return the likelihoods of continuations of one context, whose cache holds all but its last token."""
    runs = list(dict.fromkeys(pair.run for pair in pairs.values()))
    jobs = []
    for run in runs:
        own = decoder.new_cache(len(run), kind)
        own.copy_from(cache, cache.length)
        jobs.append((run[cache.length :], own))
    states = dict(zip(runs, _run(decoder, jobs), strict=True))
    found = {}
    for number, pair in pairs.items():
        logprobs, likeliest = _scores(decoder, states[pair.run], np.asarray(pair.continuation, np.int64))
        found[number] = Likelihood(float(logprobs.sum()), bool(likeliest.all()))
    return found


def _scores(
    decoder: Decoder, states: Floats, following: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the log probability of the token after each state, and whether it is the likeliest, (n,) both."""
    logprobs, likeliest = np.empty(len(following)), np.empty(len(following), bool)
    # A head that is kept as it is gives a state the same numbers beside so many others, and not beside more.
    for start in range(0, len(following), FEW_TOKENS):
        part = slice(start, start + FEW_TOKENS)
        logits = decoder.logits_of(states[part])
        rows = np.arange(len(logits))
        logprobs[part] = log_softmax(logits)[rows, following[part]]
        likeliest[part] = logits.argmax(axis=1) == following[part]
    return logprobs, likeliest


def _run(decoder: Decoder, jobs: Sequence[tuple[tuple[int, ...], KvCache]]) -> list[Floats]:
    """Run the tokens of each job after those in its cache, several jobs a pass; return their states, (n, hidden)."""
    made = [np.empty((len(tokens), decoder.config.hidden), np.float32) for tokens, _ in jobs]
    done = [0] * len(jobs)
    while True:
        room, taken = PREFILL_BLOCK, []
        for number, (tokens, _) in enumerate(jobs):
            share = min(len(tokens) - done[number], room)
            if share:
                taken.append((number, slice(done[number], done[number] + share)))
                room -= share
        if not taken:
            return made
        states = decoder.states_of_all([(jobs[number][0][part], jobs[number][1]) for number, part in taken])
        end = 0
        for number, part in taken:
            share = part.stop - part.start
            made[number][part] = states[end : end + share]
            end, done[number] = end + share, part.stop


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    length = min(len(first), len(second))
    return next((place for place in range(length) if first[place] != second[place]), length)
