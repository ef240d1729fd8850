"""A task of one's own: questions with choices, of which the model is to find the right one the likeliest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.inference.prompts import PromptFileError, read_values
from bincompress.scoring.scorer import Scorer

_FIELDS = ("context", "choices", "answer", "id")
_EXAMPLE = '{"context": "The sky is", "choices": [" blue", " green"], "answer": 0}'


@dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which of that is right."""

    context: str
    choices: tuple[str, ...]
    answer: int  # a place in choices, from 0


@dataclass(frozen=True)
class Accuracy:
    """How many questions were answered rightly, as shares with their standard errors (None for one question).

    acc: the likeliest choice counts. acc_norm: that with the largest log probability per character.
    """

    questions: int
    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def read_questions(path: Path) -> list[Question]:
    """Return a file's questions, JSON objects one a line; raise PromptFileError naming the line and what is wrong."""
    found = [_question(path, number, given) for number, given in read_values(path)]
    if not found:
        raise PromptFileError(f"{path}: holds no question; expected lines such as {_EXAMPLE}")
    return found


def _question(path: Path, number: int, given: Any) -> Question:
    def refuse(what: str) -> PromptFileError:
        return PromptFileError(f"{path}, line {number}: {what}")

    if not isinstance(given, dict):
        raise refuse(f"expected an object such as {_EXAMPLE}")
    if unknown := [name for name in given if name not in _FIELDS]:
        raise refuse(f"{unknown[0]!r:.40} is not supported; expected {', '.join(_FIELDS)}")
    context, choices, answer = (given.get(name) for name in _FIELDS[:3])
    if not isinstance(context, str):
        raise refuse("context: expected a text, which may be empty")
    if not isinstance(choices, list) or len(choices) < 2:
        raise refuse("choices: expected a list of at least two texts")
    if not all(isinstance(choice, str) and choice for choice in choices) or len(set(choices)) < len(choices):
        raise refuse("choices: expected texts that are not empty and differ")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise refuse(f"answer: expected the place of the right choice, 0 to {len(choices) - 1}, found {answer!r:.40}")
    return Question(context, tuple(choices), answer)


def accuracy(
    scorer: Scorer, questions: Sequence[Question], progress: Callable[[int, int], None] = lambda done, total: None
) -> Accuracy:
    """Return how many questions a model answers rightly.

    progress: is called with the choices that were scored and their number. A choice follows its context as it stands;
    lengths are counted in characters. Source: multiple_choice tasks of lm-evaluation-harness 0.4.13.
    """
    asked = [(question.context, choice) for question in questions for choice in question.choices]
    found = iter(scorer.loglikelihood(asked, lambda done: progress(done, len(asked))))
    right = np.zeros((2, len(questions)))
    for number, question in enumerate(questions):
        shares = np.array([next(found)[0] for _ in question.choices])
        lengths = np.array([len(choice) for choice in question.choices])
        right[:, number] = np.argmax(shares) == question.answer, np.argmax(shares / lengths) == question.answer
    (acc, stderr), (norm, norm_stderr) = _mean(right[0]), _mean(right[1])
    return Accuracy(len(questions), acc, stderr, norm, norm_stderr)


def _mean(values: NDArray[np.float64]) -> tuple[float, float | None]:
    """Return the mean and its standard error."""
    count = len(values)
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None
