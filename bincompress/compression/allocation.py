"""How are bits spread over the matrices of a model, so that their summed error is least for an average of stored bits?

Each matrix is tried with a few numbers of planes and blocks, error compensation included and refinement left out; what
a trial costs is its output error relative to the outputs' own size, times the share of the model's weights. Trials are
independent jobs, and kept in the statistics store, so that another target needs no second run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import threadpoolctl

from bincompress.calibration.statistics import open_statistics
from bincompress.compression.plan import Plan, PlannedTensor, packed_bytes
from bincompress.compression.prepare import check_finite
from bincompress.compression.recipe import Override, Recipe
from bincompress.compression.records import Job, JobReport, failed_report
from bincompress.errors import BincompressError, RecipeError
from bincompress.methods import Settings, method_named
from bincompress.methods.declaration import CompensatedSettings
from bincompress.sources.checkpoint import read_weight

_CHECKSUM_BYTES = 8  # of a matrix's two arrays


@dataclass(frozen=True)
class Trial:
    """What one choice of settings for a matrix costs."""

    settings: Settings
    nbytes: int
    error: float  # of the outputs, relative and squared


def spreadable(plan: Plan) -> list[PlannedTensor]:
    """Return the tensors whose bits can be chosen: those with error compensation; raises RecipeError if none is."""
    found = [tensor for tensor in plan.tensors if tensor.inputs_hash and _trials(tensor.settings)]
    if not found:
        raise RecipeError("--target-bits needs --compensate and --stats: it chooses bits by the cost of errors")
    return found


def _trials(settings: Settings) -> Sequence[CompensatedSettings]:
    return method_named(settings.method).trials(settings) if settings.calibrated else ()


def trial_jobs(plan: Plan, tensors: Iterable[PlannedTensor]) -> list[Job]:
    """Return a job per tensor; `run_trials` does it."""
    return [
        Job("", t.source.name, t.source, t.settings, statistics=plan.statistics, inputs_hash=t.inputs_hash,
            peak_memory=t.peak_memory)
        for t in tensors
    ]  # fmt: skip


def run_trials(job: Job) -> JobReport:
    """Try a matrix with every choice of settings; the report holds each one's error as JSON."""
    try:
        return JobReport(job.name, "done", 0.0, job.source.nbytes, {"errors": _errors(job)})
    except BincompressError as error:
        return failed_report(job, str(error), fatal=True)


def trials_of(tensor: PlannedTensor, report: JobReport) -> list[Trial]:
    """Return a tensor's trials with the errors that `run_trials` found."""
    rows, cols = tensor.source.shape
    return [
        Trial(settings, packed_bytes(settings, rows, cols) + _CHECKSUM_BYTES, error)
        for settings, error in zip(_trials(tensor.settings), report.report["errors"], strict=True)
    ]


def _errors(job: Job) -> list[float]:
    """Return the relative squared error of the outputs for every trial, without refinement; kept in the statistics."""
    tried = [replace(settings, refine=0) for settings in _trials(job.settings)]
    statistics = open_statistics(job.statistics)
    key = f"{job.inputs_hash}-{job.source.offset}"
    known = {str(trial["settings"]): trial["error"] for trial in statistics.read_trials(job.name, key) or []}
    if not all(str(settings.record()) in known for settings in tried):
        threadpoolctl.threadpool_limits(1, user_api="blas")
        weight, inputs = read_weight(job.source), statistics.read(job.name)
        check_finite(job.name, weight)
        for settings in tried:
            found = method_named(settings.method).binarize(weight, settings, inputs)
            known[str(settings.record())] = found.notes["output_error"]
        trials = [{"settings": settings, "error": error} for settings, error in known.items()]
        statistics.write_trials(job.name, key, trials)
    return [known[str(settings.record())] for settings in tried]


def spread(plan: Plan, trials: Mapping[str, Sequence[Trial]], target_bits: float) -> Recipe:
    """Return the plan's recipe with settings per tensor that spend at most `target_bits` stored bits a weight.

    The average is over all matrices in binary planes, those with fixed settings included. Raises RecipeError where no
    choice spends so little.
    """
    binary = [tensor for tensor in plan.tensors if tensor.packed and method_named(tensor.settings.method).binary]
    weights = {t.source.name: t.source.shape[0] * t.source.shape[1] for t in binary}
    fixed = sum(t.expected_bytes + _CHECKSUM_BYTES for t in binary if t.source.name not in trials)
    budget = target_bits * sum(weights.values()) / 8 - fixed
    least = sum(min(trial.nbytes for trial in own) for own in trials.values())
    if least > budget:
        raise RecipeError(
            f"--target-bits {target_bits:g}: these matrices need at least "
            f"{8 * (least + fixed) / sum(weights.values()):.3f} bits a weight"
        )
    chosen = _cheapest(trials, weights, budget)
    settings = {t.source.name: t.settings for t in binary}
    overrides = [
        Override(name, tuple(_changes(settings[name], trial.settings).items()))
        for name, trial in sorted(chosen.items())
    ]
    return replace(plan.recipe, overrides=(*plan.recipe.overrides, *overrides))


def _changes(before: Settings, after: Settings) -> dict[str, Any]:
    """Return what an override has to say to turn settings into others."""
    old, new = before.all_values(), after.all_values()
    changed = {key: value for key, value in new.items() if key not in old or value != old[key]}
    return ({"method": after.method} if before.method != after.method or not changed else {}) | changed


def _cheapest(trials: Mapping[str, Sequence[Trial]], weights: Mapping[str, int], budget: float) -> dict[str, Trial]:
    """Return a choice per tensor of least summed error within a budget of bytes: one price for all bytes, bisected."""

    def at(price: float) -> dict[str, Trial]:
        return {
            name: min(own, key=lambda trial: (trial.error * weights[name] + price * trial.nbytes, trial.nbytes))
            for name, own in trials.items()
        }

    def spent(choice: Mapping[str, Trial]) -> int:
        return sum(trial.nbytes for trial in choice.values())

    low, high = 0.0, 1.0
    while spent(at(high)) > budget:
        low, high = high, 4 * high
        if high > 1e12:
            return {name: min(own, key=lambda trial: trial.nbytes) for name, own in trials.items()}
    for _ in range(100):
        middle = (low + high) / 2
        if spent(at(middle)) > budget:
            low = middle
        else:
            high = middle
    chosen = at(high)
    # What one price leaves over goes to the single steps that gain most.
    while True:
        left = budget - spent(chosen)
        steps = [
            ((chosen[name].error - trial.error) * weights[name] / (trial.nbytes - chosen[name].nbytes), name, trial)
            for name, own in trials.items()
            for trial in own
            if 0 < trial.nbytes - chosen[name].nbytes <= left and trial.error < chosen[name].error
        ]
        if not steps:
            return chosen
        _, name, trial = max(steps, key=lambda step: (step[0], step[1]))
        chosen[name] = trial
