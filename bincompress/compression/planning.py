"""What will be done with a checkpoint? Settings, bits and what is calibrated on become a plan, or are refused."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from bincompress.calibration.collect import CONTEXT, SAMPLES, choose_samples, text_record
from bincompress.calibration.expert_tokens import expert_tokens, few_tokens
from bincompress.calibration.statistics import Statistics, open_statistics
from bincompress.compression.allocation import run_trials, spread, spreadable, trial_jobs, trials_of
from bincompress.compression.kept_weights import kept_weights
from bincompress.compression.manifest import read_manifest
from bincompress.compression.options import CompressionOptions, check_names, settings_of
from bincompress.compression.placement import Placement
from bincompress.compression.plan import Plan, make_plan
from bincompress.compression.progress import OnProgress, Tracker, ignore
from bincompress.compression.recipe import Recipe, load_recipe
from bincompress.compression.recognition import few_levels, refuse_lossy, taken, with_fallbacks, with_methods
from bincompress.compression.recognition import remarks as few_remarks
from bincompress.compression.text_only import language_model
from bincompress.errors import BincompressError
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.sources.checkpoint import Checkpoint
from bincompress.sources.hub import open_source
from bincompress.sources.text import read_text

_WORTH_SAYING = 1 << 20  # bytes
_FEW_TOKENS = 16  # for each column of the widest input


@dataclass(frozen=True)
class Planned:
    """A plan, with what is calibrated on while it is carried out."""

    plan: Plan
    samples: np.ndarray[Any, np.dtype[np.int64]] | None = None  # tokens (samples, context) of `sequential`
    sequential_tokens: int = 0  # as many as would be collected on, where the text was not read
    notes: tuple[str, ...] = ()  # what the user should know
    few_tokens: tuple[str, ...] = ()  # which experts saw few tokens of the calibration
    kept_weights: tuple[str, ...] = ()  # a line for each single weight that was found to be kept, with the reason
    few_levels: tuple[str, ...] = ()  # of tensors that are packed without loss, or could be

    def remarks(self) -> list[str]:
        """Return what a summary says of the plan: experts, few levels, weights found, what would save, what is slow."""
        plan, experts = self.plan, [*self.plan.expert_lines(), *self.few_tokens]
        return [*experts, *self.few_levels, *self.kept_weights, *plan.saving_lines(), *plan.decoded_lines()]


def plan(
    source: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    headers_only: bool = True,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
    **options: Unpack[CompressionOptions],
) -> Planned:
    """Return what `compress` would do, from headers alone: settings, expected bytes and memory of every tensor.

    The options are those of `compress`. headers_only: a Hub model's weights are not fetched, and a folder with only
    config.json is enough; such a plan cannot be carried out. Raises RecipeError, CheckpointError or StoreError for
    everything that can be refused before work begins.
    """
    check_names(options)
    stats, sequential, target_bits = options.get("stats"), options.get("sequential"), options.get("target_bits")
    samples, context = options.get("samples"), options.get("context")
    archive, export_only = options.get("archive", False), options.get("export_only", False)
    chosen = _recipe(recipe, settings_of(options), options.get("keep", ()))
    statistics = open_statistics(stats) if stats is not None else None
    _check_sequential(sequential, samples, context, stats, target_bits)
    checkpoint = _opened(str(source), headers_only, options.get("text_only", False))
    sequence: dict[str, Any] | None = None if sequential is None else {}
    asked, few = chosen, few_levels(checkpoint)
    exact = taken(chosen, few) if sequential is None and target_bits is None else {}
    chosen = with_methods(chosen, exact)
    kept, remarks = kept_weights(
        options.get("keep_weights"),
        lambda: make_plan(checkpoint, chosen, {}, archive, statistics, sequence),
        headers_only,
        progress,
    )
    if target_bits is not None:
        tried = make_plan(checkpoint, chosen, kept, archive, statistics)
        _check_runs(tried, export_only, headers_only)
        chosen = _spread_bits(tried, target_bits, placement, progress)
    if sequential is None:
        made = make_plan(checkpoint, chosen, kept, archive, statistics)
        refuse_lossy(made, few)
        found = _planned(with_fallbacks(made, asked, few, exact), export_only, headers_only)
        few_tokens = _few_experts(found.plan, statistics)
        return replace(found, kept_weights=remarks, few_levels=few_remarks(made, few), few_tokens=few_tokens)
    text = read_text(Path(sequential))
    tokens = None
    if not headers_only or "tokenizer.json" in checkpoint.assets():
        tokens = choose_samples(checkpoint, text, samples or SAMPLES, context)
    made = make_plan(checkpoint, chosen, kept, archive, sequence={} if tokens is None else text_record(tokens))
    refuse_lossy(made, few)
    found = replace(_planned(made, export_only, headers_only), few_levels=few_remarks(made, few))
    if tokens is None:
        return replace(found, sequential_tokens=(samples or SAMPLES) * (context or CONTEXT), kept_weights=remarks)
    notes = (*found.notes, *_few_tokens(checkpoint, tokens))
    return replace(found, samples=tokens, sequential_tokens=tokens.size, notes=notes, kept_weights=remarks)


def _opened(source: str, headers_only: bool, text_only: bool) -> Checkpoint:
    found = open_source(source, headers_only=headers_only)
    return language_model(found) if text_only else found


def plan_several(
    source: str | Path,
    recipes: Mapping[str, Recipe | str | Path],
    *,
    headers_only: bool = True,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
    **options: Unpack[CompressionOptions],
) -> dict[str, Planned]:
    """Return what `compress_several` would do, by store; the options are those of `plan`, for all recipes."""
    check_names(options)
    if options.get("sequential") is not None and len(recipes) > 1:
        raise BincompressError(
            "--sequential calibrates on what one store's own layers give: run it once for each recipe, or give all of "
            "them --stats STATS, as `bincompress calibrate` writes them"
        )
    return {
        store: plan(source, recipe=recipe, headers_only=headers_only, placement=placement, progress=progress, **options)
        for store, recipe in recipes.items()
    }


def plan_batch(
    manifest: str | Path, *, archive: bool = False, export_only: bool = False, headers_only: bool = True
) -> dict[str, Planned]:
    """Return what `batch` would do, by store; the parameters are those of `plan`."""
    return {
        entry.store: plan(
            entry.source, recipe=entry.recipe, archive=archive, export_only=export_only, headers_only=headers_only
        )
        for entry in read_manifest(Path(manifest))
    }


def _planned(made: Plan, export_only: bool, headers_only: bool) -> Planned:
    _check_runs(made, export_only, headers_only)
    against = () if made.verdict.runs else (made.verdict.line(),)
    return Planned(made, notes=(*made.verdict.notes, *_widened(made), *against))


def _widened(made: Plan) -> tuple[str, ...]:
    """Return what to say of tensors that a quantized source has in fewer bytes than the store will have."""
    kept = [tensor for tensor in made.tensors if not tensor.packed and tensor.source.encoding is not None]
    before, after = sum(tensor.source.nbytes for tensor in kept), sum(tensor.expected_bytes for tensor in kept)
    if after - before < _WORTH_SAYING:
        return ()
    return (
        f"tensors that stay unpacked are stored dequantized: {after:,} bytes, {before:,} in the source; "
        "--embeddings 8bit or 4bit packs embeddings and head",
    )


def _check_runs(made: Plan, export_only: bool, headers_only: bool) -> None:
    """Raise RecipeError where a store that is to be made would not run here; a plan alone says so in its verdict."""
    if not headers_only:
        made.verdict.require(export_only)


def _recipe(recipe: Recipe | str | Path | None, settings: Mapping[str, Any], keep: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        if settings or keep:
            raise BincompressError("a Recipe object has its own settings; give a recipe file, or change the object")
        return recipe
    return load_recipe(Path(recipe) if recipe is not None else None, settings, keep)


def _check_sequential(
    text: str | Path | None, samples: int | None, context: int | None, stats: str | None, target_bits: float | None
) -> None:
    """Raise BincompressError where parameters contradict a calibration layer after layer, or its absence."""
    if text is None:
        for option, value in (("--samples", samples), ("--context", context)):
            if value is not None:
                raise BincompressError(f"{option} is for --sequential TEXT; `bincompress calibrate` has its own")
    elif stats is not None and target_bits is None:
        raise BincompressError("--sequential collects statistics of its own: leave --stats out")
    elif stats is None and target_bits is not None:
        raise BincompressError(
            "--target-bits spreads the bits before --sequential has collected anything: give it --stats STATS too, as "
            "`bincompress calibrate` writes them"
        )


def _few_experts(made: Plan, statistics: Statistics | None) -> tuple[str, ...]:
    """Return which experts saw few tokens, where the plan uses statistics of a model that has experts."""
    config = made.verdict.config
    if statistics is None or config is None or not made.statistics:
        return ()
    return tuple(few_tokens(config, expert_tokens(config, statistics)))


def _few_tokens(checkpoint: Checkpoint, tokens: Any) -> tuple[str, ...]:
    cols = checkpoint_config(checkpoint).inner
    if tokens.size >= _FEW_TOKENS * cols:
        return ()
    return (
        f"{tokens.size:,} tokens are few for inputs of {cols:,} columns: layers will fit this text alone. "
        f"--samples {-(-_FEW_TOKENS * cols // tokens.shape[1])} would do",
    )


def _spread_bits(tried: Plan, target_bits: float, placement: Placement, progress: OnProgress) -> Recipe:
    """Try every matrix with several settings and return the recipe that spends a number of bits best."""
    tensors = {tensor.source.name: tensor for tensor in spreadable(tried)}
    jobs = trial_jobs(tried, tensors.values())
    tracker = Tracker("try settings", sum(job.source.nbytes for job in jobs), len(jobs), progress)
    trials = {}
    with contextlib.closing(placement.make(tracker.on_event, run_trials)(jobs)) as reports:
        for report in reports:
            if report.status == "failed":
                raise BincompressError(report.error)
            trials[report.name] = trials_of(tensors[report.name], report)
            tracker.on_report(report)
    return spread(tried, trials, target_bits)
