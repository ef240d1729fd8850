"""Perplexities of texts and accuracies on tasks, of a model with activations of several bits, beside its baseline."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bincompress.errors import BincompressError
from bincompress.inference.evaluate import Evaluation, evaluate, together
from bincompress.model.packed_linear import ActivationSettings
from bincompress.scoring.models import Scored, load_scored
from bincompress.scoring.questions import Accuracy, Question, accuracy
from bincompress.scoring.scorer import Scorer
from bincompress.sources.hub import is_checkpoint

Progress = Callable[[str, int, int], None]  # what is scored, pieces done, pieces in all


@dataclass(frozen=True)
class Wanted:
    """What is to be scored, and how.

    texts, tasks (their questions): by name. context, windows, stride: as for `evaluate`. at_once: contexts of
    questions that share a pass over the weights.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    context: int | None = None
    windows: int | None = None
    stride: int | None = None
    at_once: int = 8


@dataclass(frozen=True)
class Engine:
    """How a store is run; as for `load`, but for several numbers of bits, one after the other."""

    threads: int | None = None
    activation_bits: tuple[int, ...] = (8,)
    activation_scale: Literal["token", "segment"] = "segment"
    kernel: str | None = None
    memory: int | None = None
    kv_bits: int = 16  # a text's perplexity with 16 is that with float32 keys and values

    def settings(self, place: str) -> list[ActivationSettings]:
        """Return the settings of each run."""
        if len(self.activation_bits) > 1 and is_checkpoint(place):
            raise BincompressError(
                f"{place}: an unquantized checkpoint runs in float32 alone; --activation-bits with several numbers is "
                "for a store"
            )
        if self.kv_bits != 16 and is_checkpoint(place):
            raise BincompressError(
                f"{place}: an unquantized checkpoint runs in float32 alone; --kv-bits is for a store"
            )
        return [ActivationSettings(bits, self.activation_scale) for bits in self.activation_bits]


@dataclass(frozen=True)
class TextRow:
    """Figures of a text; of all texts together where its name is None."""

    text: str | None
    activations: str
    found: Evaluation

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {"text": self.text, "activations": self.activations, **self.found.as_dict()}


@dataclass(frozen=True)
class TaskRow:
    """Figures of a task, and the baseline's."""

    task: str
    activations: str
    found: Accuracy
    baseline: Accuracy | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        other = {} if self.baseline is None else self.baseline.as_dict()
        return {
            "task": self.task, "activations": self.activations, **self.found.as_dict(),
            **{f"baseline_{name}": value for name, value in other.items() if name != "questions"},
        }  # fmt: skip


def measure(
    place: str, wanted: Wanted, engine: Engine, baseline: str | None, progress: Progress
) -> Iterator[TextRow | TaskRow]:
    """Yield the figures of every text and task with every number of bits, as they are found.

    place: a store, or an unquantized checkpoint. baseline: the unquantized checkpoint. Raises the errors of `load` and
    PromptError.
    """
    runs = engine.settings(place)
    other = None if baseline is None else load_scored(baseline, engine.threads, baseline=True)
    other_tasks = {} if other is None else dict(_accuracies(other, wanted, "baseline ", progress))
    for settings in runs:
        scored = load_scored(place, engine.threads, settings, engine.kernel, engine.memory, kv_bits=engine.kv_bits)
        label = f"{scored.activations}: " if len(runs) > 1 else ""
        found = []
        for name, content in wanted.texts.items():
            tokens = np.array(scored.model.tokenizer.encode(content), np.int64)
            told = _told(progress, label + name)
            other_decoder = None if other is None else other.model.decoder
            found.append(
                evaluate(
                    scored.model.decoder, tokens, wanted.context, wanted.windows, other_decoder, told,
                    cache="int8" if engine.kv_bits == 8 else "float32", stride=wanted.stride,
                )
            )  # fmt: skip
            yield TextRow(name, scored.activations, found[-1])
        if len(found) > 1:
            yield TextRow(None, scored.activations, together(found))
        for name, figures in _accuracies(scored, wanted, label, progress):
            yield TaskRow(name, scored.activations, figures, other_tasks.get(name))
        del scored  # before the next one is loaded


def _accuracies(scored: Scored, wanted: Wanted, label: str, progress: Progress) -> Iterator[tuple[str, Accuracy]]:
    if wanted.tasks:
        scorer = Scorer(scored, at_once=wanted.at_once)
        for name, questions in wanted.tasks.items():
            yield name, accuracy(scorer, questions, _told(progress, label + name))


def _told(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
