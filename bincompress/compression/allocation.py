"""How are bits spread over the matrices of a model, so that their summed error is least for an average of stored bits?

Each matrix is tried with a few numbers of planes and blocks, error compensation included and refinement left out; what
a trial costs is its output error relative to the outputs' own size, times the share of the model's weights. Trials are
independent jobs, and kept in the statistics store, so that another target needs no second run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import threadpoolctl

from bincompress.calibration.statistics import open_statistics
from bincompress.compression.job import check_finite
from bincompress.compression.plan import Plan, PlannedTensor, packed_bytes
from bincompress.compression.recipe import Override, Recipe
from bincompress.errors import BincompressError, RecipeError
from bincompress.methods.rounding.codebook import Rounding, sum_of_planes
from bincompress.methods.rounding.compensation import compensate, curvature
from bincompress.methods.rounding.initial_scales import of_planes
from bincompress.records import Block, Job, JobReport, Settings
from bincompress.sources.checkpoint import read_weight

_CHECKSUM_BYTES = 8  # of a matrix's two arrays
# One plane gains little from smaller blocks, several planes much.
_CANDIDATES: tuple[tuple[int, Block], ...] = (
    (1, "row"), (1, 128), (1, 64), (2, 256), (2, 128), (2, 64), (3, 256), (3, 128), (3, 64), (4, 128),
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What one choice of settings for a matrix costs."""

    planes: int
    block: Block
    nbytes: int
    error: float  # of the outputs, relative and squared

    def settings(self, base: Settings) -> Settings:
        """Return settings like `base` with this choice."""
        return replace(base, method="xnor", planes=self.planes, block=self.block)


def spreadable(plan: Plan) -> list[PlannedTensor]:
    """Return the tensors whose bits can be chosen: those with error compensation; raises RecipeError if none is."""
    found = [tensor for tensor in plan.tensors if tensor.inputs_hash and tensor.settings.method in ("wgm", "xnor")]
    if not found:
        raise RecipeError("--target-bits spreads bits by what errors cost: give --compensate and --stats too")
    return found


def trial_jobs(plan: Plan, tensors: Iterable[PlannedTensor]) -> list[Job]:
    """Return a job per tensor; `run_trials` does it."""
    return [
        Job("", t.source.name, t.source, t.settings, statistics=plan.statistics, inputs_hash=t.inputs_hash,
            peak_memory=t.peak_memory)
        for t in tensors
    ]  # fmt: skip


def run_trials(job: Job) -> JobReport:
    """Try a matrix with every candidate; the report holds the trials as JSON, or the error."""
    try:
        return JobReport(job.name, "done", 0.0, job.source.nbytes, {"trials": _trials(job)})
    except BincompressError as error:
        return JobReport(job.name, "failed", 0.0, 0, error=str(error), fatal=True)


def _trials(job: Job) -> list[dict[str, Any]]:
    statistics = open_statistics(job.statistics)
    key = f"{job.inputs_hash}-{job.settings.scale_bits}-{job.source.offset}"
    known = statistics.read_trials(job.name, key)
    if known is not None:
        return known
    threadpoolctl.threadpool_limits(1, user_api="blas")
    weight = read_weight(job.source)
    check_finite(job.name, weight)
    weights, inputs = weight.float32(), statistics.read(job.name)
    costs = curvature(inputs.hessian, job.name)
    rounding = Rounding(job.settings.scale_bits, float(abs(weights).max(initial=0.0)))
    rows, cols = weight.shape
    found = []
    for planes, block in _CANDIDATES:
        wide = block if isinstance(block, int) else cols
        done = compensate(weights, costs, sum_of_planes(planes), wide, of_planes(planes), rounding, 0)
        trial = Trial(planes, block, 0, float(f"{done.cost:.5g}"))
        nbytes = packed_bytes(trial.settings(job.settings), rows, cols) + _CHECKSUM_BYTES
        found.append(asdict(replace(trial, nbytes=nbytes)))
    statistics.write_trials(job.name, key, found)
    return found


def spread(plan: Plan, trials: Mapping[str, Sequence[Trial]], target_bits: float) -> Recipe:
    """Return the plan's recipe with settings per tensor that spend at most `target_bits` stored bits a weight.

    The average is over all matrices in binary planes, those with fixed settings included. Raises RecipeError where no
    choice spends so little.
    """
    binary = [tensor for tensor in plan.tensors if tensor.packed and tensor.settings.method != "uniform"]
    weights = {t.source.name: t.source.shape[0] * t.source.shape[1] for t in binary}
    fixed = sum(t.expected_bytes + _CHECKSUM_BYTES for t in binary if t.source.name not in trials)
    budget = target_bits * sum(weights.values()) / 8 - fixed
    least = sum(min(trial.nbytes for trial in own) for own in trials.values())
    if least > budget:
        raise RecipeError(
            f"--target-bits {target_bits:g}: the least that these matrices take is "
            f"{8 * (least + fixed) / sum(weights.values()):.3f} bits a weight"
        )
    chosen = _cheapest(trials, weights, budget)
    settings = {t.source.name: t.settings for t in binary}
    overrides = [
        Override(name, tuple(_changes(settings[name], trial.settings(settings[name])).items()))
        for name, trial in sorted(chosen.items())
    ]
    return replace(plan.recipe, overrides=(*plan.recipe.overrides, *overrides))


def _changes(before: Settings, after: Settings) -> dict[str, Any]:
    old, new = asdict(before), asdict(after)
    return {key: value for key, value in new.items() if value != old[key]} or {"method": after.method}


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
