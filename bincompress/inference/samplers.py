"""Samplers beyond the usual filters, each a pure function: typical, DRY and XTC."""

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Tokens = NDArray[np.int64]

_LONGEST_REPEAT = 50  # tokens of a repetition that count, as in DRY's first implementation
_MOST_PENALTY = 1e30  # within float32


def typical(scores: Scores, mass: float) -> NDArray[np.intp]:
    """Return, in order, the places of the tokens whose surprise is nearest to the mean, together of this probability.

    scores: float64 (n,), logits up to a constant; mass: 0 to 1. At least one is kept. Source: Meister et al. 2023,
    "Locally Typical Sampling"; what is kept is what transformers keeps.
    """
    powers = np.exp(scores - scores.max())
    shares = powers / powers.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(shares)
        distance = np.abs(surprise - np.where(shares > 0, shares * surprise, 0.0).sum())
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(shares[order]) < mass).sum()), len(order) - 1)
    return np.flatnonzero(distance <= distance[order[last]])


def repetitions(history: Tokens, breakers: NDArray[np.bool_]) -> tuple[Tokens, Tokens]:
    """Return the tokens that would go on with a repetition, and how many tokens it has repeated before.

    history: int64 (n,), all tokens so far; breakers: bool (vocab,), tokens that no repetition goes across. A token
    comes once, with its longest repetition of at most 50. Source: DRY, oobabooga/text-generation-webui#5677.
    """
    end = len(history) - 1
    if end < 1 or breakers[history[end]]:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    places = np.flatnonzero(history[:end] == history[end])
    lengths = np.ones(len(places), np.int64)
    alive = np.arange(len(places))
    for back in range(1, min(_LONGEST_REPEAT, end)):
        alive = alive[places[alive] >= back]
        before = history[end - back]
        if breakers[before] or not len(alive):
            break
        alive = alive[history[places[alive] - back] == before]
        lengths[alive] += 1
    tokens, where = np.unique(history[places + 1], return_inverse=True)
    longest = np.zeros(len(tokens), np.int64)
    np.maximum.at(longest, where, lengths)
    return tokens, longest


def dry(
    logits: NDArray[np.float32],
    history: Tokens,
    breakers: NDArray[np.bool_],
    multiplier: float,
    base: float,
    allowed_length: int,
) -> NDArray[np.float32]:
    """Return logits (vocab,) less multiplier * base ** (n - allowed_length) for tokens that go on with a repetition.

    n: tokens that are repeated (`repetitions`); where it is below `allowed_length` nothing is taken off.
    """
    tokens, lengths = repetitions(history, breakers)
    long = lengths >= allowed_length
    result = logits.copy()
    with np.errstate(over="ignore"):
        penalties = multiplier * float(base) ** (lengths[long] - allowed_length)
    result[tokens[long]] -= np.minimum(penalties, _MOST_PENALTY).astype(np.float32)
    return result


def without_top_choices(scores: Scores, threshold: float) -> NDArray[np.intp]:
    """Return the places of tokens but for the likeliest: of those that reach the threshold the least likely is left.

    scores: float64 (n,), logits up to a constant; threshold: a probability. Source: XTC,
    oobabooga/text-generation-webui#6335.
    """
    powers = np.exp(scores - scores.max())
    shares = powers / powers.sum()
    reached = np.flatnonzero(shares >= threshold)
    if len(reached) < 2:
        return np.arange(len(scores))
    kept = np.ones(len(scores), bool)
    kept[reached] = False
    kept[reached[np.argmin(shares[reached])]] = True
    return np.flatnonzero(kept)
