"""How well a model predicts a text: perplexity, and how far its predictions are from a baseline's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.model.cache import CacheType
from bincompress.model.decoder import Decoder
from bincompress.model.errors import NotFiniteError, PromptError

Floats = NDArray[np.float32]
Progress = Callable[[int, int], None]  # windows done, windows in all

CONTEXT = 1024  # tokens of a window
_LARGEST_LOSS = 700.0  # nats, whose exponential is still a number
_LOGITS_AT_ONCE = 1 << 21  # items of a chunk of logits: 16 MB in float64


@dataclass(frozen=True)
class Evaluation:
    """Figures over the scored tokens, and the settings they hold for."""

    perplexity: float
    tokens: int  # scored
    windows: int
    context: int
    baseline_perplexity: float | None = None
    kl_divergence: float | None = None  # mean of KL(baseline || model), nats per token
    top1_agreement: float | None = None  # share of positions where both prefer the same token
    stride: int | None = None  # tokens from the beginning of a window to that of the next; the context: no overlap

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def evaluate(
    model: Decoder,
    tokens: NDArray[np.int64],
    context: int | None = None,
    windows: int | None = None,
    baseline: Decoder | None = None,
    progress: Progress | None = None,
    cache: CacheType = "float32",
    stride: int | None = None,
) -> Evaluation:
    """Score windows of `context` tokens: consecutive ones, each from its second token, or overlapping ones.

    `tokens` (n,) is the whole text as the tokenizer encodes it at once, so a beginning-of-text token comes first in
    the first window only. A rest shorter than `context` is left out, unless the text has no whole window. The baseline
    runs with a float32 cache. A context of None is 1024, or the models' limit.

    stride: a window begins so many tokens after the one before it, and only what that one did not score is scored. So
    each token but the first is scored once, with at least `context - stride` tokens before it, up to the text's end.
    """
    if context is None:
        context = min(CONTEXT, *(decoder.config.context for decoder in (model, baseline or model)))
    _check(model, baseline, context, windows, stride)
    if len(tokens) < 2:
        raise PromptError(f"the text has {len(tokens)} tokens; expected at least 2")
    context = min(context, len(tokens))
    places = _windows(len(tokens), context, stride)[:windows]
    scores = np.zeros(4)  # sums of: the model's loss, the baseline's, divergence, agreement
    caches = [model.new_cache(context, cache), baseline.new_cache(context) if baseline else None]
    for window, (begin, first, end) in enumerate(places):
        ids = tokens[begin:end]
        states = []
        for decoder, own in zip((model, baseline), caches, strict=True):
            if decoder is not None and own is not None:
                own.rewind()
                states.append(decoder.states(ids, own))
        scores += _score(model, baseline, states, ids, first - begin)
        if progress is not None:
            progress(window + 1, len(places))
    scored = sum(end - first for _, first, end in places)
    means = scores / scored
    if not (means[:3] < _LARGEST_LOSS).all():
        raise NotFiniteError(f"perplexity: not a finite number (a mean loss of {means[:3].max():.3g} nats a token)")
    return Evaluation(
        perplexity=float(np.exp(means[0])),
        tokens=scored,
        windows=len(places),
        context=context,
        baseline_perplexity=float(np.exp(means[1])) if baseline else None,
        kl_divergence=float(means[2]) if baseline else None,
        top1_agreement=float(means[3]) if baseline else None,
        stride=stride or context,
    )


def _check(model: Decoder, baseline: Decoder | None, context: int, windows: int | None, stride: int | None) -> None:
    """Raise PromptError for settings that do not fit the models."""
    for decoder in (model, baseline):
        if decoder is not None and not 2 <= context <= decoder.config.context:
            limit = decoder.config.context
            raise PromptError(f"context: expected 2 to {limit} ({decoder.config.context_limit}), found {context}")
    if baseline is not None and baseline.config.vocab != model.config.vocab:
        raise PromptError(
            f"baseline: expected the same vocabulary of {model.config.vocab} tokens, found {baseline.config.vocab}"
        )
    if windows is not None and windows < 1:
        raise PromptError(f"windows: expected at least 1, found {windows}")
    if stride is not None and not 1 <= stride < context:
        raise PromptError(f"stride: expected 1 to {context - 1}, less than the context, found {stride}")


def together(found: Sequence[Evaluation]) -> Evaluation:
    """Return the figures over the tokens of several texts, which were scored with the same settings."""
    weights = np.array([each.tokens for each in found], np.float64)

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.average(known, weights=weights)) if len(known) == len(values) else None

    def perplexity(values: list[float | None]) -> float | None:
        loss = mean([None if value is None else math.log(value) for value in values])
        return None if loss is None else math.exp(loss)

    return Evaluation(
        perplexity=perplexity([each.perplexity for each in found]) or math.nan,
        tokens=sum(each.tokens for each in found),
        windows=sum(each.windows for each in found),
        context=max(each.context for each in found),
        baseline_perplexity=perplexity([each.baseline_perplexity for each in found]),
        kl_divergence=mean([each.kl_divergence for each in found]),
        top1_agreement=mean([each.top1_agreement for each in found]),
        stride=found[0].stride,
    )


def _windows(count: int, context: int, stride: int | None) -> list[tuple[int, int, int]]:
    """Return where each window begins, the first token that it scores, and where it ends."""
    if stride is None:
        return [(begin, begin + 1, begin + context) for begin in range(0, count - context + 1, context)]
    found = [(0, 1, context)]
    while found[-1][2] < count:
        begin, _, end = found[-1]
        found.append((begin + stride, end, min(begin + stride + context, count)))
    return found


def _score(
    model: Decoder, baseline: Decoder | None, states: list[Floats], ids: NDArray[np.int64], first: int
) -> NDArray[Any]:
    """Return the four sums over one window, whose final states are given per decoder, each (context, hidden).

    first: the first of its tokens that is scored.
    """
    sums = np.zeros(4)
    step = max(1, _LOGITS_AT_ONCE // model.config.vocab)
    for start in range(first - 1, len(ids) - 1, step):
        stop = min(start + step, len(ids) - 1)
        following = ids[start + 1 : stop + 1]
        rows = np.arange(len(following))
        own = log_softmax(model.logits_of(states[0][start:stop]))
        sums[0] -= own[rows, following].sum()
        if baseline is not None:
            other = log_softmax(baseline.logits_of(states[1][start:stop]))
            sums[1] -= other[rows, following].sum()
            sums[3] += np.count_nonzero(own.argmax(axis=1) == other.argmax(axis=1))
            np.subtract(other, own, out=own)
            np.exp(other, out=other)
            sums[2] += np.einsum("ij,ij->", other, own)
    return sums


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Return log probabilities (n, vocab) in float64."""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values
