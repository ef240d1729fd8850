"""From checkpoints to stores: `compress` and `batch`, and carrying out what was planned."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from bincompress.api.pytorch import torch_needed
from bincompress.compression.events import EventLog
from bincompress.compression.options import CompressionOptions, check_names
from bincompress.compression.placement import Placement
from bincompress.compression.planning import Planned, plan, plan_batch, plan_several
from bincompress.compression.progress import OnProgress, Tracker, ignore
from bincompress.compression.recipe import Recipe
from bincompress.compression.run import Outcome, compress_all
from bincompress.compression.sequential import in_sequence
from bincompress.errors import BincompressError
from bincompress.inference.load import usable_threads
from bincompress.reporting.inspection import inspect as inspect_store
from bincompress.sources.text import read_text
from bincompress.store.pack import beside, check_target
from bincompress.store.pack import pack as pack_store
from bincompress.store.store import open_store

if TYPE_CHECKING:
    from bincompress.distillation.train_run import Trained


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
    notes: tuple[str, ...] = ()  # what the user should know of how the model was read
    remarks: tuple[str, ...] = ()  # single weights that were found to be kept and why; tensors that are slow to run
    packed: str | None = None  # the one file that the store was written to as well
    trained: "Trained | None" = None  # how its layers learned


def compress(
    source: str | Path,
    store: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    train: str | Path | None = None,
    pack: bool = False,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
    **options: Unpack[CompressionOptions],
) -> CompressionResult:
    """Pack a checkpoint's weight matrices into a store; the same call resumes where an interrupted one stopped.

    source: a checkpoint folder or a Hub id (owner/name, owner/name@revision). store: a path or an fsspec URL.
    options: `method`, the settings of the methods (see `bincompress.methods`), and `embeddings` ("keep", "4bit",
    "8bit"), which go over the defaults of the recipe, a TOML file. keep: patterns of tensors that stay as they are.
    keep_weights: single weights kept exactly, the file that lists them, or "auto": those that the model depends on,
    found by running it. stats: statistics of the inputs, as `calibrate` collects them; sequential: in their place a
    text on which each layer is calibrated as those before it have become, in `samples` windows of `context` tokens.
    target_bits: stored bits a weight that are spread over the matrices by what errors cost. train: a text on which the
    planes and scales are then trained, layer after layer, as `train` does by default; needs PyTorch. archive: arrays
    are compressed with zstd. export_only: a store that would not run here is made all the same, to be exported.
    text_only: of a model that also sees or hears, the language model alone, as a model of its own. pack: the finished
    store is also written as one file beside it, STORE.bincompress.zip. overwrite: a store made with other settings is
    replaced.
    Raises RecipeError, CheckpointError or StoreError before work begins; tensors that fail are in `failures`.
    """
    check_names(options)
    made = plan(source, recipe=recipe, headers_only=False, placement=placement, progress=progress, **options)
    return carry_out(
        made, str(store), train=train, pack=pack, overwrite=overwrite, placement=placement, progress=progress
    )


def compress_several(
    source: str | Path,
    recipes: Mapping[str, Recipe | str | Path],
    *,
    pack: bool = False,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
    **options: Unpack[CompressionOptions],
) -> dict[str, CompressionResult]:
    """Pack a checkpoint by several recipes, each into its store, reading every tensor once; returns results by store.

    recipes: by store. options: as for `compress`, for all of them; the stores are those that single calls would make.
    Raises as `compress` does, before any store is begun.
    """
    check_names(options)
    made = plan_several(source, recipes, headers_only=False, placement=placement, progress=progress, **options)
    return carry_out_several(made, pack=pack, overwrite=overwrite, placement=placement, progress=progress)


def carry_out(
    planned: Planned,
    store: str,
    *,
    train: str | Path | None = None,
    pack: bool = False,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
) -> CompressionResult:
    """Do what `plan` with headers_only=False has planned; train, pack: as for `compress`."""
    return carry_out_several(
        {store: planned}, train=train, pack=pack, overwrite=overwrite, placement=placement, progress=progress
    )[store]


def carry_out_several(
    planned: Mapping[str, Planned],
    *,
    train: str | Path | None = None,
    pack: bool = False,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
) -> dict[str, CompressionResult]:
    """Do what `plan_several` with headers_only=False has planned; train (of one store) and pack: as `compress`."""
    for store in planned if pack else ():  # before the work
        check_target(beside(store), store, overwrite=True)
    if train is None:
        done = carry_out_all(planned, overwrite=overwrite, placement=placement, progress=progress)
    else:
        ((store, alone),) = planned.items()
        done = {store: _trained(alone, store, read_text(Path(train)), overwrite, placement, progress)}
    if not pack:
        return done
    return {
        store: replace(each, packed=pack_store(store, beside(store), overwrite=overwrite).file)
        if each.complete
        else each
        for store, each in done.items()
    }


def _trained(
    planned: Planned, store: str, text: str, overwrite: bool, placement: Placement, progress: OnProgress
) -> CompressionResult:
    """Carry out a plan beside the place of its store, and train the result into it."""
    with torch_needed("training"):
        from bincompress.distillation.after_compression import train_planned
    made: list[CompressionResult] = []

    def carry_out_at(place: str) -> None:
        made.append(carry_out_all({place: planned}, placement=placement, progress=progress)[place])
        for name, cause in made[0].failures.items():
            raise BincompressError(f"{name}: {cause}; nothing was trained, the same command goes on from what is done")

    found = train_planned(planned.plan, carry_out_at, text, store, overwrite=overwrite, progress=progress)
    report = inspect_store(open_store(store))
    return replace(made[0], store=store, tensors=report["tensors"], total=report["total"], trained=found)


def carry_out_all(
    planned: Mapping[str, Planned],
    *,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
) -> dict[str, CompressionResult]:
    """Do several plans, each into its store, in one queue over all their matrices; returns the results by store."""
    plans = {store: each.plan for store, each in planned.items()}
    total, tensors = sum(p.source_bytes for p in plans.values()), sum(len(p.tensors) for p in plans.values())
    sampled = {store: each.samples for store, each in planned.items() if each.samples is not None}
    with EventLog(placement.events) as log, contextlib.ExitStack() as held:
        tracker = Tracker("compress", total, tensors, progress, log)
        runner = placement.make(tracker.on_event, held=held if sampled else None)
        if sampled:
            ((store, samples),) = sampled.items()  # of the one plan that is calibrated layer after layer
            runner = in_sequence(
                plans[store].checkpoint, samples, store, runner, threads=usable_threads(), tell=tracker.on_stage
            )
        outcomes = compress_all(plans, runner=runner, overwrite=overwrite, on_report=tracker.on_report)
    return {store: _result(store, outcome, planned[store]) for store, outcome in outcomes.items()}


def _result(store: str, outcome: Outcome, planned: Planned) -> CompressionResult:
    found = inspect_store(open_store(store))
    return CompressionResult(
        store, outcome.done, outcome.unchanged, outcome.failures, outcome.complete, found["tensors"], found["total"],
        tuple(planned.plan.kept_lines()), planned.notes, tuple(planned.remarks()),
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
    planned = plan_batch(manifest, archive=archive, export_only=export_only, headers_only=False)
    return carry_out_all(planned, overwrite=overwrite, placement=placement, progress=progress)
