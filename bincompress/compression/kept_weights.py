"""Which single weights stay exact? Those that a file lists, or those that the model depends on, found by running it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from bincompress.calibration.super_weights import LEAST_EFFECT, TriedWeight, try_super_weights
from bincompress.compression.plan import Plan
from bincompress.compression.progress import OnProgress, Progress
from bincompress.compression.recipe import load_kept_weights
from bincompress.errors import RecipeError
from bincompress.process.machine import usable_cpus

AUTO = "auto"
Places = Mapping[str, tuple[tuple[int, int], ...]]  # rows and columns, by tensor


def kept_weights(
    given: str | Path | Places | None, bare: Callable[[], Plan], headers_only: bool, progress: OnProgress
) -> tuple[Places, tuple[str, ...]]:
    """Return the weights to keep, and what a summary says of those that were found.

    given: places, the file that lists them, or "auto". bare: makes the plan without them, so that what can be refused
    is refused before the model is run. headers_only: nothing is searched for, as the weights may not be there.
    Raises RecipeError where the file is wrong, or where the model does not run.
    """
    if given is None or isinstance(given, Mapping):
        return given or {}, ()
    if str(given) != AUTO:
        return load_kept_weights(Path(given)), ()
    plan = bare()
    config = plan.verdict.config
    if config is not None and config.experts is not None:
        raise RecipeError(
            f"--keep-weights auto does not know mixtures of experts yet ({config.architecture}); give a file that "
            "lists the weights, or leave --keep-weights out"
        )
    if headers_only:
        return {}, ("kept exactly: --keep-weights auto runs the model to find them, and a dry run does not",)
    if not plan.verdict.runs:
        raise RecipeError(
            f"--keep-weights auto runs the model, which does not run here: {'; '.join(plan.verdict.faults)}; give a "
            "file that lists the weights, or leave --keep-weights out"
        )

    def tell(done: int, total: int) -> None:
        size = plan.source_bytes
        progress(Progress("find super weights", size * done // total, size, done, 0, total))

    packed = {tensor.source.name for tensor in plan.tensors if tensor.packed}
    tried = try_super_weights(plan.checkpoint, packed.__contains__, usable_cpus(), tell)
    found = [weight for weight in tried if weight.effect >= LEAST_EFFECT]
    places: dict[str, list[tuple[int, int]]] = {}
    for weight in found:
        places.setdefault(weight.name, []).append((weight.row, weight.col))
    return {name: tuple(sorted(own)) for name, own in places.items()}, _lines(found, tried)


def _lines(found: list[TriedWeight], tried: list[TriedWeight]) -> tuple[str, ...]:
    rest = [weight for weight in tried if weight.effect < LEAST_EFFECT]
    if not tried:
        return ("kept exactly: no single weight; none makes a spike in the output of a down_proj",)
    return (
        f"kept exactly: {len(found)} of {len(tried)} single weights that make a spike in the output of a down_proj; "
        f"setting one of them to zero changes predictions by {LEAST_EFFECT} nats a token or more:",
        *(f"  {weight.line()}" for weight in found),
        *((f"  not kept, the next: {rest[0].line()}",) if rest else ()),
    )
