"""How does a plan of `compress` become a trained store: its store is the start, and goes when the training is done."""

from collections.abc import Callable
from pathlib import Path

from bincompress.compression.plan import Plan
from bincompress.compression.progress import OnProgress, Progress
from bincompress.distillation.places import DEFAULT_PLACES, START, fastest_products
from bincompress.distillation.planes import refuse_untrainable_settings
from bincompress.distillation.settings import HELD_OUT, DistillError, LayerSettings
from bincompress.distillation.train_run import Trained, train
from bincompress.distillation.windows import tokens_of
from bincompress.sources.checkpoint import Checkpoint


def train_planned(
    plan: Plan, carry_out: Callable[[str], None], text: str, out: str, *, overwrite: bool, progress: OnProgress
) -> Trained:
    """Carry out a plan, train the layers of its store on a text, one after the other, and write the result.

    carry_out: makes the plan's store in the place that it is given. As many windows of the text are used as
    `bincompress train` does by default, or as it has. Raises DistillError before the work for planes that cannot be
    trained, and whatever carry_out and training raise.
    """
    for tensor in plan.tensors:
        if tensor.packed and tensor.kind == "linear":
            refuse_untrainable_settings(tensor.source.name, tensor.settings)
    total = sum(tensor.source.nbytes for tensor in plan.tensors)

    def on_layers(done: int, steps: int, line: str) -> None:
        progress(Progress("train", total * done // steps, total, done, 0, steps, stage=line))

    def make_start(folder: Path) -> str:
        carry_out(str(folder / START))
        return str(folder / START)

    settings = _settings(plan.checkpoint, text)
    return train(None, make_start, plan.checkpoint, text, out, settings, None, overwrite=overwrite, on_layers=on_layers)


def _settings(checkpoint: Checkpoint, text: str) -> LayerSettings:
    """Return the default settings with at most as many windows as the text has."""
    settings = LayerSettings(dtype=fastest_products(DEFAULT_PLACES.device))
    tokens = len(tokens_of(checkpoint, text))
    windows = min(settings.windows, tokens // settings.context - HELD_OUT)
    if windows < 1:
        raise DistillError(
            f"the text to train on has {tokens:,} tokens; expected at least {(HELD_OUT + 1) * settings.context:,}: "
            "give a longer one, or train with windows of your choice by `bincompress train SOURCE STORE2 --start STORE`"
        )
    return LayerSettings(dtype=settings.dtype, windows=windows)
