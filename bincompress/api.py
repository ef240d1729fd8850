"""What can a program do with bincompress? Each function is one verb of the command line, which calls nothing else.

>>> import bincompress
>>> result = bincompress.compress("./Llama-3.2-1B", "./store", groups=2, block=128)  # doctest: +SKIP
>>> print(result.total["stored_bits"])  # doctest: +SKIP
>>> print("".join(bincompress.load("./store").stream("The scheduler")))  # doctest: +SKIP

Every function raises a subclass of `bincompress.errors.BincompressError` for what the user can mend.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bincompress.calibration.collect import calibrate as collect
from bincompress.calibration.collect import choose_samples, run_in_threads, text_record
from bincompress.calibration.statistics import Statistics, open_statistics
from bincompress.compression.allocation import run_trials, spread, spreadable, trial_jobs, trials_of
from bincompress.compression.events import EventLog
from bincompress.compression.manifest import read_manifest
from bincompress.compression.placement import Placement
from bincompress.compression.plan import Plan, make_plan
from bincompress.compression.progress import OnProgress, Tracker, ignore
from bincompress.compression.recipe import Recipe, load_kept_weights, load_recipe
from bincompress.compression.run import Outcome, compress_all
from bincompress.compression.sequential import in_sequence
from bincompress.errors import BincompressError
from bincompress.inference.evaluate import Evaluation
from bincompress.inference.evaluate import evaluate as score
from bincompress.inference.load import load, load_baseline, load_decoder, usable_threads
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import load_tokenizer
from bincompress.reporting.inspection import inspect as inspect_store
from bincompress.sources.checkpoint import Checkpoint
from bincompress.sources.hub import open_source
from bincompress.sources.text import read_text
from bincompress.store.export import export as export_store
from bincompress.store.store import open_store
from bincompress.store.verify import verify as verify_store

if TYPE_CHECKING:
    from bincompress.distillation.run import Distilled
    from bincompress.distillation.settings import DistillSettings
    from bincompress.distillation.train import OnStep

__all__ = [
    "CalibrationResult", "CompressionResult", "Placement", "VerifyResult", "batch", "calibrate", "compress", "distill",
    "evaluate", "export", "inspect", "load", "plan", "verify",
]  # fmt: skip

SAMPLES, CONTEXT = 64, 512  # of a calibration: windows and their tokens
_FEW_TOKENS = 16  # for each column of the widest input

OnCount = Callable[[int, int], None]  # pieces done, pieces in all


def _uncounted(done: int, total: int) -> None:
    """Take no notice."""


@dataclass(frozen=True)
class CompressionResult:
    """What came of a compression."""

    store: str
    done: int  # tensors packed or copied by this run
    unchanged: int  # tensors that an earlier run had completed
    failures: dict[str, str]  # causes by tensor
    complete: bool  # whether the store holds every tensor
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)  # reports, as `inspect` gives them
    total: dict[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()  # a line for each group of tensors that stayed unpacked, with the reason


@dataclass(frozen=True)
class CalibrationResult:
    """What came of a calibration."""

    stats: str
    tokens: int
    inputs: dict[str, str]  # by matrix: the input that it reads


@dataclass(frozen=True)
class VerifyResult:
    """What is wrong with a store: problems by tensor; nothing where it is whole."""

    store: str
    problems: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not self.problems


@dataclass(frozen=True)
class Planned:
    """A plan, with what is calibrated on while it is carried out."""

    plan: Plan
    samples: np.ndarray[Any, np.dtype[np.int64]] | None = None  # tokens (samples, context) of `sequential`
    sequential_tokens: int = 0  # as many as would be collected on, where the text was not read
    notes: tuple[str, ...] = ()  # what the user should know


def plan(
    source: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    keep: Sequence[str] = (),
    keep_weights: str | Path | Mapping[str, tuple[tuple[int, int], ...]] | None = None,
    stats: str | None = None,
    sequential: str | Path | None = None,
    samples: int | None = None,
    context: int | None = None,
    target_bits: float | None = None,
    archive: bool = False,
    export_only: bool = False,
    headers_only: bool = True,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
    **settings: Any,
) -> Planned:
    """Return what `compress` would do, from headers alone: settings, expected bytes and memory of every tensor.

    The parameters are those of `compress`. headers_only: a Hub model's weights are not fetched, and a folder with only
    config.json is enough; such a plan cannot be carried out. Raises RecipeError, CheckpointError or StoreError for
    everything that can be refused before work begins.
    """
    chosen = _recipe(recipe, settings, keep)
    kept = load_kept_weights(Path(keep_weights)) if isinstance(keep_weights, str | Path) else keep_weights or {}
    statistics = open_statistics(stats) if stats is not None else None
    _check_sequential(sequential, samples, context, stats, target_bits)
    checkpoint = open_source(str(source), headers_only=headers_only)
    if target_bits is not None:
        tried = make_plan(checkpoint, chosen, kept, archive, statistics)
        _check_runs(tried, export_only, headers_only)
        chosen = _spread_bits(tried, target_bits, placement, progress)
    if sequential is None:
        return _planned(make_plan(checkpoint, chosen, kept, archive, statistics), export_only, headers_only)
    number, length = samples or SAMPLES, context or CONTEXT
    text = read_text(Path(sequential))
    if headers_only and "tokenizer.json" not in checkpoint.assets():
        made = make_plan(checkpoint, chosen, kept, archive, sequence={})
        return replace(_planned(made, export_only, headers_only), sequential_tokens=number * length)
    tokens = choose_samples(checkpoint, text, number, length)
    made = make_plan(checkpoint, chosen, kept, archive, sequence=text_record(tokens))
    found = _planned(made, export_only, headers_only)
    notes = (*found.notes, *_few_tokens(checkpoint, tokens))
    return replace(found, samples=tokens, sequential_tokens=tokens.size, notes=notes)


def _planned(made: Plan, export_only: bool, headers_only: bool) -> Planned:
    _check_runs(made, export_only, headers_only)
    return Planned(made, notes=made.verdict.notes)


def _check_runs(made: Plan, export_only: bool, headers_only: bool) -> None:
    """Raise RecipeError where a store that is to be made would not run here; a plan alone says so in its verdict."""
    if not headers_only:
        made.verdict.require(export_only)


def compress(
    source: str | Path,
    store: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    keep: Sequence[str] = (),
    keep_weights: str | Path | Mapping[str, tuple[tuple[int, int], ...]] | None = None,
    stats: str | None = None,
    sequential: str | Path | None = None,
    samples: int | None = None,
    context: int | None = None,
    target_bits: float | None = None,
    archive: bool = False,
    export_only: bool = False,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
    **settings: Any,
) -> CompressionResult:
    """Pack a checkpoint's weight matrices into a store; the same call resumes where an interrupted one stopped.

    source: a checkpoint folder or a Hub id (owner/name, owner/name@revision). store: a path or an fsspec URL.
    settings: `method`, the settings of the methods (see `bincompress.methods`), and `embeddings` ("keep", "4bit",
    "8bit"); they go over the defaults of the recipe, a TOML file. keep: patterns of tensors that stay as they are.
    keep_weights: single weights kept exactly, or the file that lists them. stats: statistics of the inputs, as
    `calibrate` collects them; sequential: in their place a text on which each layer is calibrated as those before it
    have become, in `samples` windows of `context` tokens. target_bits: stored bits a weight that are spread over the
    matrices by what errors cost. archive: arrays are compressed with zstd. export_only: a store that would not run here
    is made all the same, to be exported. overwrite: a store made with other settings is replaced.
    Raises RecipeError, CheckpointError or StoreError before work begins; tensors that fail are in `failures`.
    """
    made = plan(
        source, recipe=recipe, keep=keep, keep_weights=keep_weights, stats=stats, sequential=sequential,
        samples=samples, context=context, target_bits=target_bits, archive=archive, export_only=export_only,
        headers_only=False,         placement=placement, progress=progress, **settings,
    )  # fmt: skip
    return carry_out(made, str(store), overwrite=overwrite, placement=placement, progress=progress)


def carry_out(
    planned: Planned,
    store: str,
    *,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
) -> CompressionResult:
    """Do what `plan` with headers_only=False has planned."""
    outcome = _run({store: planned.plan}, overwrite, placement, progress, planned.samples)[store]
    found = inspect_store(open_store(store))
    return CompressionResult(
        store, outcome.done, outcome.unchanged, outcome.failures, outcome.complete, found["tensors"], found["total"],
        tuple(planned.plan.kept_lines()),
    )  # fmt: skip


def batch(
    manifest: str | Path,
    *,
    archive: bool = False,
    export_only: bool = False,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
) -> dict[str, CompressionResult]:
    """Compress the models of a manifest (TOML), one queue over all their matrices; returns the results by store.

    What can be refused of any model is refused before the first is begun.
    """
    plans = plan_batch(manifest, archive=archive, headers_only=False)
    for made in plans.values():
        _check_runs(made, export_only, headers_only=False)
    outcomes = _run(plans, overwrite, placement, progress)
    return {
        store: CompressionResult(store, outcome.done, outcome.unchanged, outcome.failures, outcome.complete)
        for store, outcome in outcomes.items()
    }


def plan_batch(manifest: str | Path, *, archive: bool = False, headers_only: bool = True) -> dict[str, Plan]:
    """Return the plans of a manifest's models by store."""
    return {
        entry.store: make_plan(
            open_source(entry.source, headers_only=headers_only), load_recipe(entry.recipe, {}), archive=archive
        )
        for entry in read_manifest(Path(manifest))
    }


def calibrate(
    source: str | Path,
    stats: str,
    text: str | Path,
    *,
    samples: int = SAMPLES,
    context: int = CONTEXT,
    runner: Literal["local", "ray"] = "local",
    threads: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    progress: OnCount = _uncounted,
) -> CalibrationResult:
    """Collect the statistics of what a model's linear layers read on a text, for error-compensated quantization.

    text: a UTF-8 file like what the model is for, and not the one that it is evaluated on. samples: windows spread
    evenly over it, of `context` tokens each. The same call resumes after the last completed layer of an interrupted
    one. Raises StoreError, CheckpointError, UnsupportedModelError or TensorError.
    """
    if runner == "local":
        if address is not None:
            raise BincompressError("--address is for --runner ray; the local runner takes --threads")
        run_layer = run_in_threads(threads or usable_threads())
    else:
        if threads is not None:
            raise BincompressError("--threads is for --runner local; on a cluster every part runs on one core")
        from bincompress.process.own_jobs import own_jobs

        run_layer = own_jobs("calibration").run_on_ray(address, stats)
    checkpoint = open_source(str(source))
    tokens = choose_samples(checkpoint, read_text(Path(text)), samples, context)
    found: Statistics = collect(checkpoint, tokens, stats, runner=run_layer, overwrite=overwrite, progress=progress)
    return CalibrationResult(stats, int(tokens.size), found.attributes["inputs"])


def distill(
    store: str,
    teacher: str | Path,
    out: str,
    *,
    text: str | Path | None = None,
    settings: "DistillSettings | None" = None,
    device: str = "auto",
    threads: int | None = None,
    checkpoint_every: int = 100,
    work: Path | None = None,
    cached_logits: Path | None = None,
    overwrite: bool = False,
    on_step: "OnStep" = lambda progress: None,
    on_written: OnCount = _uncounted,
) -> "Distilled":
    """Train the coefficients of a store against the model that it was made from, and write them to a new store.

    text: a UTF-8 file to train on; without one the teacher writes what is trained on (settings.written_tokens). The
    same call resumes from the last checkpoint of an interrupted one. device: "auto", "cpu" or "cuda". work: where
    checkpoints lie, every `checkpoint_every` steps; beside the store if not given. cached_logits: a folder that keeps
    the teacher's logits. Needs PyTorch: pip install 'bincompress[distill]'.
    Raises DistillError, StoreError, CheckpointError or UnsupportedModelError.
    """
    try:
        from bincompress.distillation.run import Places
        from bincompress.distillation.run import distill as train
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise BincompressError(
            "distillation needs PyTorch, which is not installed: pip install 'bincompress[distill]'"
        ) from None
    from bincompress.distillation.settings import DistillSettings

    content = read_text(Path(text)) if text is not None else None
    places = Places(device, threads, checkpoint_every, work, cached_logits)
    return train(
        store, open_source(str(teacher)), content, out, settings or DistillSettings(), places,
        overwrite=overwrite, on_step=on_step, on_written=on_written,
    )  # fmt: skip


def evaluate(
    store: str | Path,
    text: str | Path,
    *,
    context: int = 1024,
    windows: int | None = None,
    baseline: str | Path | None = None,
    threads: int | None = None,
    activation_bits: int = 8,
    activation_scale: Literal["token", "segment"] = "segment",
    kernel: str | None = None,
    progress: OnCount = _uncounted,
) -> Evaluation:
    """Measure how well a model predicts a text: perplexity and, beside a baseline, what the bits cost.

    store: a store, or an unquantized checkpoint folder, which runs in float32. text: a UTF-8 file, tokenized as a
    whole and cut into consecutive windows of `context` tokens, of which at most `windows` are scored. baseline: the
    unquantized checkpoint to compare with. threads, activation_bits, activation_scale, kernel: as for `load`. Raises
    StoreError, CheckpointError, UnsupportedModelError or PromptError.
    """
    content = read_text(Path(text))
    if (Path(store) / "config.json").is_file():
        source = open_source(str(store))
        decoder, assets = load_baseline(source, threads), source.assets()
    else:
        loaded = load_decoder(str(store), threads, ActivationSettings(activation_bits, activation_scale), kernel)
        decoder, assets = loaded.decoder, loaded.assets
    other = load_baseline(open_source(str(baseline)), threads) if baseline is not None else None
    tokens = np.array(load_tokenizer(assets).encode(content), np.int64)
    return score(decoder, tokens, context, windows, other, progress)


def inspect(store: str | Path) -> dict[str, Any]:
    """Return what is in a store: `{"tensors": {name: report}, "total": {...}}`; bits are per weight."""
    return inspect_store(open_store(str(store)))


def verify(store: str | Path, *, progress: OnCount = _uncounted) -> VerifyResult:
    """Read every byte of a store and compare it with its hash and the format; raises StoreError where there is none."""
    opened = open_store(str(store))
    total = len(opened.tensors()) + 1
    problems = {}
    for number, (name, problem) in enumerate(verify_store(opened), 1):
        if problem:
            problems[name] = problem
        progress(number, total)
    return VerifyResult(str(store), problems)


def export(
    store: str | Path, folder: str | Path, *, progress: Callable[[str, int], None] = lambda name, n: None
) -> Path:
    """Write a store as a Hugging Face folder, dequantized to bfloat16, and return it.

    progress is called with each tensor's name and bytes. Raises StoreError where the store is not complete or the
    folder holds something.
    """
    return export_store(open_store(str(store)), Path(folder), progress)


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


def _run(
    plans: Mapping[str, Plan],
    overwrite: bool,
    placement: Placement,
    progress: OnProgress,
    samples: Any = None,
) -> dict[str, Outcome]:
    """Carry out plans by store; samples: of the one plan that is calibrated layer after layer."""
    total, tensors = sum(p.source_bytes for p in plans.values()), sum(len(p.tensors) for p in plans.values())
    with EventLog(placement.events) as log, contextlib.ExitStack() as held:
        tracker = Tracker("compress", total, tensors, progress, log)
        runner = placement.make(tracker.on_event, held=held if samples is not None else None)
        if samples is not None:
            ((store, only),) = plans.items()
            runner = in_sequence(
                only.checkpoint, samples, store, runner, threads=usable_threads(), tell=tracker.on_stage
            )
        return compress_all(plans, runner=runner, overwrite=overwrite, on_report=tracker.on_report)
