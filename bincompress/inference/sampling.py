"""How the next token is chosen from logits: greedy, or drawn after the filters that transformers applies, in its order.

Order: logit bias, repetition penalty, frequency and presence penalty, DRY, temperature, top-k, top-p, min-p, typical,
XTC. Temperature 0 is greedy (after bias, penalties and DRY).
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bincompress.inference.samplers import dry, typical, without_top_choices
from bincompress.model.errors import SamplingError

if TYPE_CHECKING:
    from bincompress.inference.constraint import Constraint
    from bincompress.model.tokenizer import Tokenizer

Floats = NDArray[np.float32]
Scores = NDArray[np.float64]

_RUN = 64  # neighbouring logits
_UNLIKELY = 12.0  # logits below the largest
_MOST_PENALTY, _MOST_BIAS = 2.0, 100.0  # the limits of OpenAI's interface
_MOST_DRY = 100.0
_LEAST_REPETITION, _MOST_REPETITION = 0.01, 100.0  # beyond them logits leave float32


@dataclass(frozen=True)
class Sampling:
    """Settings; the defaults sample from the unchanged distribution."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of every token of the prompt and the answer
    presence_penalty: float = 0.0  # of every token of the answer, once
    frequency_penalty: float = 0.0  # of every token of the answer, as often as it came
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    typical_p: float = 1.0
    dry_multiplier: float = 0.0  # of tokens that go on with a repetition; 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2  # tokens that may be repeated
    dry_penalty_last_n: int = -1  # tokens that are looked at; -1: all
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")  # no repetition goes across them
    xtc_probability: float = 0.0  # that the likeliest tokens are left out
    xtc_threshold: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0.0 <= self.temperature <= sys.float_info.max, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0.0 <= self.top_p <= 1.0, "0 to 1"),
            ("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "0 to 1"),
            (
                "repetition_penalty", self.repetition_penalty,
                _LEAST_REPETITION <= self.repetition_penalty <= _MOST_REPETITION, "0.01 to 100",
            ),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= _MOST_PENALTY, "-2 to 2"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= _MOST_PENALTY, "-2 to 2"),
            ("typical_p", self.typical_p, 0.0 <= self.typical_p <= 1.0, "0 to 1"),
            ("dry_multiplier", self.dry_multiplier, 0.0 <= self.dry_multiplier <= _MOST_DRY, "0 (off) to 100"),
            ("dry_base", self.dry_base, 1.0 <= self.dry_base <= _MOST_DRY, "1 to 100"),
            ("dry_allowed_length", self.dry_allowed_length, self.dry_allowed_length >= 1, "1 or more"),
            ("dry_penalty_last_n", self.dry_penalty_last_n, self.dry_penalty_last_n >= -1, "-1 (all) or more"),
            ("xtc_probability", self.xtc_probability, 0.0 <= self.xtc_probability <= 1.0, "0 to 1"),
            ("xtc_threshold", self.xtc_threshold, 0.0 <= self.xtc_threshold <= 1.0, "0 to 1"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
        )  # fmt: skip
        for name, value, fine, expected in checks:
            if not fine:
                raise SamplingError(f"{name}: expected {expected}, found {_shown(value)}")
        for token, added in self.logit_bias:
            if token < 0 or not abs(added) <= _MOST_BIAS:
                raise SamplingError(
                    f"logit_bias: expected tokens from 0 and -100 to 100 for each, found {token}: {added}"
                )

    def breakers(self, tokenizer: "Tokenizer", vocab: int) -> NDArray[np.bool_] | None:
        """Return which tokens (vocab,) hold a sequence breaker, where DRY is on."""
        if not self.dry_multiplier:
            return None
        found = np.zeros(vocab, bool)
        found[[token for token in tokenizer.tokens_with(self.dry_sequence_breakers) if token < vocab]] = True
        return found


class Sampler:
    """Chooses tokens one after the other; the same seed and logits give the same tokens."""

    def __init__(
        self,
        settings: Sampling,
        vocab: int,
        seen: Iterable[int] = (),
        constraint: "Constraint | None" = None,
        breakers: NDArray[np.bool_] | None = None,
    ) -> None:
        """seen: tokens of the prompt. constraint: what the text is held to; `choose` raises its ConstraintError.

        breakers: bool (vocab,), tokens with one of `dry_sequence_breakers`; needed where DRY is on.
        """
        seen = list(seen)
        self._history = seen if settings.dry_multiplier else []  # for DRY
        self._breakers = np.zeros(vocab, bool) if breakers is None else breakers
        self.settings = settings
        self._constraint = constraint
        self._random = np.random.default_rng(settings.seed)
        self._seen = np.zeros(vocab, bool)
        self._seen[seen] = True
        self._counts = np.zeros(vocab, np.int32)  # of tokens chosen
        if outside := [token for token, _ in settings.logit_bias if token >= vocab]:
            raise SamplingError(f"logit_bias: expected tokens of the vocabulary, 0 to {vocab - 1}, found {outside[0]}")

    @property
    def is_complete(self) -> bool:
        """Whether the text has the form that it is held to, and nothing can follow."""
        return self._constraint is not None and self._constraint.is_complete

    def choose(self, logits: Floats) -> int:
        """Return the next token for logits (vocab,) and remember it for the penalties."""
        settings = self.settings
        values = penalised(biased(logits, settings.logit_bias), self._seen, settings.repetition_penalty)
        values = less_repeated(values, self._counts, settings.presence_penalty, settings.frequency_penalty)
        if settings.dry_multiplier:
            values = self._less_of_repetitions(values)
        if self._constraint is not None:
            values = np.where(self._constraint.allowed(), values, np.float32(-np.inf))
        if settings.temperature == 0.0:
            token = int(np.argmax(values))
        else:
            ids, scores = filtered(values, settings)
            if self._constraint is not None:  # rounding must not lead to one that is not allowed
                ids, scores = ids[scores > -np.inf], scores[scores > -np.inf]
            if settings.xtc_probability and self._random.random() < settings.xtc_probability:
                left = without_top_choices(scores, settings.xtc_threshold)
                ids, scores = ids[left], scores[left]
            steps = np.cumsum(_softmax(scores))
            drawn = np.searchsorted(steps, self._random.random() * steps[-1], side="right")
            token = int(ids[min(int(drawn), len(ids) - 1)])
        self._seen[token] = True
        self._counts[token] += 1
        if settings.dry_multiplier:
            self._history.append(token)
        if self._constraint is not None:
            self._constraint.take(token)
        return token

    def _less_of_repetitions(self, values: Floats) -> Floats:
        settings, last = self.settings, self.settings.dry_penalty_last_n
        seen = self._history if last < 0 else self._history[max(len(self._history) - last, 0) :]
        multiplier, base, length = settings.dry_multiplier, settings.dry_base, settings.dry_allowed_length
        return dry(values, np.asarray(seen, np.int64), self._breakers, multiplier, base, length)


def biased(logits: Floats, bias: Sequence[tuple[int, float]]) -> Floats:
    """Return logits (vocab,) with what is given added to those of single tokens."""
    if not bias:
        return logits
    result = logits.copy()
    for token, added in bias:
        result[token] += np.float32(added)
    return result


def penalised(logits: Floats, seen: NDArray[np.bool_], penalty: float) -> Floats:
    """Return logits (vocab,) with those of seen tokens divided by the penalty, or multiplied where negative."""
    if penalty == 1.0:
        return logits
    factor, result = np.float32(penalty), logits.copy()
    ids = np.flatnonzero(seen)  # few of a large vocabulary
    own = logits[ids]
    result[ids] = np.where(own < 0, own * factor, own / factor)
    return result


def less_repeated(logits: Floats, counts: NDArray[np.int32], presence: float, frequency: float) -> Floats:
    """Return logits (vocab,) less `presence` for each token that has come and `frequency` for each time that it did.

    counts: int32 (vocab,), how often each token has come. Source: OpenAI's API reference, "frequency and presence
    penalties".
    """
    if presence == 0.0 and frequency == 0.0:
        return logits
    return logits - np.float32(presence) * (counts > 0) - np.float32(frequency) * counts.astype(np.float32)


def candidates(logits: Floats, seen: NDArray[np.bool_], settings: Sampling) -> tuple[NDArray[np.intp], Scores]:
    """Return the tokens that every filter keeps and their scores after the repetition penalty and temperature."""
    return filtered(penalised(logits, seen, settings.repetition_penalty), settings)


def filtered(logits: Floats, settings: Sampling) -> tuple[NDArray[np.intp], Scores]:
    """Return the tokens that top-k, top-p, min-p and typical keep of logits (vocab,), with scores after temperature.

    A score is how far the logit lies below the largest of all, divided by the temperature: 0 or less, perhaps -inf.
    """
    ids = np.arange(len(logits))
    if 0 < settings.top_k < len(logits):  # before the temperature, which keeps the order but may round to ties
        ids = _largest(logits, settings.top_k)
    # The difference first, and in float64: a quotient of a logit alone may leave the range of floats.
    with np.errstate(over="ignore"):
        values = (logits[ids].astype(np.float64) - float(logits.max())) / float(settings.temperature)
    if settings.top_p < 1.0:
        chosen = _likeliest(_softmax(values), values, settings.top_p)
        ids, values = ids[chosen], values[chosen]
    if settings.min_p > 0.0:
        # probability < min_p * largest probability, without the common denominator
        kept = np.exp(values - values.max()) >= settings.min_p
        ids, values = ids[kept], values[kept]
    if settings.typical_p < 1.0:
        nearest = typical(values, settings.typical_p)
        ids, values = ids[nearest], values[nearest]
    return ids, values


def _largest(logits: Floats, count: int) -> NDArray[np.intp]:
    """Return, in order, the places of the `count` largest of logits (vocab,), and of all that equal the last."""
    rows = len(logits) // _RUN
    if rows < count:
        return np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    # So many runs have a logit as large as this, hence the one that is sought is no smaller: a tenth of the time.
    least = np.partition(logits[: rows * _RUN].reshape(rows, _RUN).max(1), -count)[-count]
    ids = np.flatnonzero(logits >= least)
    found = logits[ids]
    return np.asarray(ids[found >= np.partition(found, -count)[-count]])


def _likeliest(shares: Scores, values: Scores, top_p: float) -> NDArray[np.intp]:
    """Return, in order, the places of the likeliest tokens whose shares add up to top_p; at least one."""
    # Most of a large vocabulary is so unlikely that together it is left out: only the rest is to be sorted.
    likely = np.flatnonzero(values > values.max() - _UNLIKELY)
    below = float(shares.sum() - shares[likely].sum())
    if below > 1.0 - top_p:
        likely, below = np.arange(len(values)), 0.0
    order = likely[np.argsort(values[likely], kind="stable")]
    kept = below + np.cumsum(shares[order]) > 1.0 - top_p
    kept[-1] = True
    return np.sort(order[kept])


def _softmax(values: Scores) -> Scores:
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
