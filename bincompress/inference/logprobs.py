"""How likely was a token? Logarithms of the model's own probabilities, before penalties, bias and temperature."""

from dataclasses import dataclass

import numpy as np

from bincompress.inference.sampling import Floats


@dataclass(frozen=True)
class TokenLogprob:
    """A token, the natural logarithm of its probability, and the likeliest tokens with theirs, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: Floats, token: int, alternatives: int) -> TokenLogprob:
    """Return the log probability of a token under logits (vocab,), with those of so many of the likeliest tokens."""
    wide = logits.astype(np.float64)
    largest = wide.max()
    all_mass = largest + np.log(np.exp(wide - largest).sum())
    count = min(alternatives, len(wide))
    likeliest = np.argpartition(-wide, count - 1)[:count] if count else np.empty(0, np.intp)
    ordered = likeliest[np.argsort(-wide[likeliest], kind="stable")]
    top = tuple((int(each), float(wide[each] - all_mass)) for each in ordered)
    return TokenLogprob(token, float(wide[token] - all_mass), top)
