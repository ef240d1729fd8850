"""How the next token is chosen from logits: greedy, or drawn after the filters that transformers applies, in its order.

Order: repetition penalty, temperature, top-k, top-p, min-p. Temperature 0 is greedy (after the repetition penalty).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bincompress.model.errors import SamplingError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """Settings; the defaults sample from the unchanged distribution."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0.0 <= self.temperature < np.inf, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0.0 <= self.top_p <= 1.0, "0 to 1"),
            ("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < np.inf, "above 0"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
        )
        for name, value, fine, expected in checks:
            if not fine:
                raise SamplingError(f"{name}: expected {expected}, found {value}")


class Sampler:
    """Chooses tokens one after the other; the same seed and logits give the same tokens."""

    def __init__(self, settings: Sampling, vocab: int, seen: Iterable[int] = ()) -> None:
        self.settings = settings
        self._random = np.random.default_rng(settings.seed)
        self._seen = np.zeros(vocab, bool)
        self._seen[list(seen)] = True

    def choose(self, logits: Floats) -> int:
        """Return the next token for logits (vocab,) and remember it for the repetition penalty."""
        if self.settings.temperature == 0.0:
            token = int(np.argmax(penalised(logits, self._seen, self.settings.repetition_penalty)))
        else:
            ids, values = candidates(logits, self._seen, self.settings)
            steps = np.cumsum(_softmax(values))
            drawn = np.searchsorted(steps, self._random.random() * steps[-1], side="right")
            token = int(ids[min(int(drawn), len(ids) - 1)])
        self._seen[token] = True
        return token


def penalised(logits: Floats, seen: NDArray[np.bool_], penalty: float) -> Floats:
    """Return logits (vocab,) with those of seen tokens divided by the penalty, or multiplied where negative."""
    if penalty == 1.0:
        return logits
    factor = np.float32(penalty)
    return np.where(seen, np.where(logits < 0, logits * factor, logits / factor), logits)


def candidates(logits: Floats, seen: NDArray[np.bool_], settings: Sampling) -> tuple[NDArray[np.intp], Floats]:
    """Return the tokens that every filter keeps and their logits after penalty and temperature."""
    values = penalised(logits, seen, settings.repetition_penalty) / np.float32(settings.temperature)
    ids = np.arange(len(values))
    if 0 < settings.top_k < len(values):
        kept = values >= np.partition(values, -settings.top_k)[-settings.top_k]
        ids, values = ids[kept], values[kept]
    if settings.top_p < 1.0:
        order = np.argsort(values, kind="stable")
        kept = np.cumsum(_softmax(values[order])) > 1.0 - settings.top_p
        kept[-1] = True
        chosen = np.sort(order[kept])
        ids, values = ids[chosen], values[chosen]
    if settings.min_p > 0.0:
        # probability < min_p * largest probability, without the common denominator
        kept = np.exp((values - values.max()).astype(np.float64)) >= settings.min_p
        ids, values = ids[kept], values[kept]
    return ids, values


def _softmax(values: Floats) -> NDArray[np.float64]:
    powers = np.exp((values - values.max()).astype(np.float64))
    return np.asarray(powers / powers.sum())
