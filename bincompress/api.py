"""What can a program do with bincompress? Each function is one verb of the command line, which calls nothing else.

>>> import bincompress
>>> result = bincompress.compress("./Llama-3.2-1B", "./store", groups=2, block=128)  # doctest: +SKIP
>>> print(result.total["stored_bits"])  # doctest: +SKIP
>>> print("".join(bincompress.load("./store").stream("The scheduler")))  # doctest: +SKIP

Every function raises a subclass of `bincompress.errors.BincompressError` for what the user can mend.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bincompress.calibration.collect import CONTEXT, SAMPLES, choose_samples, run_in_threads
from bincompress.calibration.collect import calibrate as collect
from bincompress.calibration.expert_tokens import expert_tokens, few_tokens
from bincompress.calibration.statistics import Statistics, open_statistics
from bincompress.compression.events import EventLog
from bincompress.compression.placement import Placement
from bincompress.compression.planning import Planned, plan, plan_batch
from bincompress.compression.progress import OnProgress, Tracker, ignore
from bincompress.compression.recipe import Recipe
from bincompress.compression.recompute import Proof, compare, plan_proof
from bincompress.compression.run import Outcome, compress_all
from bincompress.compression.sequential import in_sequence
from bincompress.errors import BincompressError
from bincompress.inference.evaluate import Evaluation
from bincompress.inference.evaluate import evaluate as score
from bincompress.inference.load import load, load_baseline, load_decoder, usable_threads
from bincompress.methods import of_planes
from bincompress.methods.declaration import Block
from bincompress.model.checkpoint_source import checkpoint_config
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.tokenizer import load_tokenizer
from bincompress.reporting.inspection import inspect as inspect_store
from bincompress.sources.hub import is_checkpoint, open_source
from bincompress.sources.text import read_text
from bincompress.store.export import export as export_store
from bincompress.store.pack import OnStage, Packed, beside, check_target, untold
from bincompress.store.pack import pack as pack_store
from bincompress.store.pack import unpack as unpack_store
from bincompress.store.store import Store, open_store
from bincompress.store.verify import verify as verify_store

if TYPE_CHECKING:
    from bincompress.distillation.independent import LayerRunner
    from bincompress.distillation.layer_run import OnLayers
    from bincompress.distillation.run import Distilled
    from bincompress.distillation.settings import DistillSettings, LayerSettings
    from bincompress.distillation.train import OnStep
    from bincompress.distillation.train_run import Trained
    from bincompress.reporting.publish import Pushed

__all__ = [
    "CalibrationResult", "CompressionResult", "Packed", "Placement", "VerifyResult", "batch", "calibrate", "compress",
    "distill", "evaluate", "export", "inspect", "load", "pack", "plan", "plan_batch", "push", "train", "unpack",
    "verify",
]  # fmt: skip


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
    notes: tuple[str, ...] = ()  # what the user should know of how the model was read
    remarks: tuple[str, ...] = ()  # single weights that were found to be kept and why; tensors that are slow to run
    packed: str | None = None  # the one file that the store was written to as well


@dataclass(frozen=True)
class CalibrationResult:
    """What came of a calibration."""

    stats: str
    tokens: int
    inputs: dict[str, str]  # by matrix: the input that it reads
    experts: dict[int, list[int]] = field(default_factory=dict)  # by layer: the tokens that each expert saw
    remarks: tuple[str, ...] = ()  # which experts saw too few tokens


@dataclass(frozen=True)
class VerifyResult:
    """What is wrong with a store: problems by tensor; nothing where it is whole."""

    store: str
    problems: dict[str, str]
    recomputed: tuple[str, ...] = ()  # tensors that were made from the source once more, and compared

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not self.problems


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
    pack: bool = False,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
    **settings: Any,
) -> CompressionResult:
    """Pack a checkpoint's weight matrices into a store; the same call resumes where an interrupted one stopped.

    source: a checkpoint folder or a Hub id (owner/name, owner/name@revision). store: a path or an fsspec URL.
    settings: `method`, the settings of the methods (see `bincompress.methods`), and `embeddings` ("keep", "4bit",
    "8bit"); they go over the defaults of the recipe, a TOML file. keep: patterns of tensors that stay as they are.
    keep_weights: single weights kept exactly, the file that lists them, or "auto": those that the model depends on,
    found by running it. stats: statistics of the inputs, as `calibrate` collects them; sequential: in their place a
    text on which each layer is calibrated as those before it have become, in `samples` windows of `context` tokens.
    target_bits: stored bits a weight that are spread over the matrices by what errors cost. archive: arrays are
    compressed with zstd. export_only: a store that would not run here is made all the same, to be exported. pack: the
    finished store is also written as one file beside it, STORE.bincompress.zip. overwrite: a store made with other
    settings is replaced.
    Raises RecipeError, CheckpointError or StoreError before work begins; tensors that fail are in `failures`.
    """
    made = plan(
        source, recipe=recipe, keep=keep, keep_weights=keep_weights, stats=stats, sequential=sequential,
        samples=samples, context=context, target_bits=target_bits, archive=archive, export_only=export_only,
        headers_only=False, placement=placement, progress=progress, **settings,
    )  # fmt: skip
    return carry_out(made, str(store), pack=pack, overwrite=overwrite, placement=placement, progress=progress)


def carry_out(
    planned: Planned,
    store: str,
    *,
    pack: bool = False,
    overwrite: bool = False,
    placement: Placement = Placement(),
    progress: OnProgress = ignore,
) -> CompressionResult:
    """Do what `plan` with headers_only=False has planned; pack: as for `compress`."""
    if pack:  # before the work
        check_target(beside(store), store, overwrite=True)
    done = carry_out_all({store: planned}, overwrite=overwrite, placement=placement, progress=progress)[store]
    if not pack or not done.complete:
        return done
    return replace(done, packed=pack_store(store, beside(store), overwrite=overwrite).file)


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
    config = checkpoint_config(checkpoint)
    counts = expert_tokens(config, found)
    inputs = found.attributes["inputs"]
    return CalibrationResult(stats, int(tokens.size), inputs, counts, tuple(few_tokens(config, counts)))


def distill(
    store: str,
    teacher: str | Path,
    out: str,
    *,
    text: str | Path | None = None,
    settings: "DistillSettings | None" = None,
    device: str = "auto",
    threads: int | None = None,
    checkpoint_every: int | None = None,
    work: Path | None = None,
    cached_logits: Path | None = None,
    overwrite: bool = False,
    on_step: "OnStep" = lambda progress: None,
    on_written: OnCount = _uncounted,
) -> "Distilled":
    """Train the coefficients of a store against the model that it was made from, and write them to a new store.

    text: a UTF-8 file to train on; without one the teacher writes what is trained on (settings.written_tokens). The
    same call resumes from the last checkpoint of an interrupted one. device: "auto", "cpu" or "cuda". work: where
    checkpoints lie, every `checkpoint_every` steps, or by time; beside the store if not given. cached_logits: a folder
    that keeps the teacher's logits. Needs PyTorch: pip install 'bincompress[distill]'.
    Raises DistillError, StoreError, CheckpointError or UnsupportedModelError.
    """
    with _torch_needed("distillation"):
        from bincompress.distillation.places import Places
        from bincompress.distillation.run import distill as run
    from bincompress.distillation.settings import DistillSettings

    content = read_text(Path(text)) if text is not None else None
    places = Places(device, threads, checkpoint_every, work, cached_logits)
    return run(
        store, open_source(str(teacher)), content, out, settings or DistillSettings(), places,
        overwrite=overwrite, on_step=on_step, on_written=on_written,
    )  # fmt: skip


def train(
    source: str | Path,
    store: str,
    text: str | Path,
    *,
    start: str | None = None,
    planes: Literal[1, 2] = 2,
    block: Block = 128,
    scale_bits: Literal[8, 16] | None = None,
    embeddings: Literal["keep", "4bit", "8bit"] = "keep",
    layers: "LayerSettings | None" = None,
    model: "DistillSettings | None" = None,
    runner: Literal["local", "ray"] = "local",
    address: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    checkpoint_every: int | None = None,
    work: Path | None = None,
    overwrite: bool = False,
    on_layers: "OnLayers" = lambda done, total, line: None,
    on_step: "OnStep" = lambda progress: None,
    on_written: OnCount = _uncounted,
) -> "Trained":
    """Train the planes and scales of a model's layers on a text, and write the result to a new store.

    start: the store to begin with; without one a store of `planes` planes with scales for each `block` columns and
    these embeddings is made from the source, without calibration. scale_bits: of the trained scales; None keeps the
    start's. layers: settings of the training layer after layer; model: of the whole model's training, which follows it
    where both are given. runner: who trains layers that read the unquantized model's (layers.inputs); "ray" trains them
    beside each other on a Ray cluster, at `address`, one of `threads` cores each (1 if not given), and on GPUs where it
    has them. The same call resumes an interrupted one. device, threads, checkpoint_every, work: as for
    `distill`. Needs PyTorch: pip install 'bincompress[distill]'.
    Raises DistillError, StoreError, CheckpointError, RecipeError or UnsupportedModelError.
    """
    with _torch_needed("training"):
        from bincompress.distillation.places import START, Places
        from bincompress.distillation.train_run import train as run
    if layers is None and model is None:
        raise BincompressError("nothing to train: expected layers or model, or both")
    run_layers = _training_on_ray(layers, address) if runner == "ray" else None
    checkpoint = open_source(str(source))

    def make_start(folder: Path) -> str:
        made = str(folder / START)
        # The checkpoint's own place: a revision that moved meanwhile would be another model.
        compress(checkpoint.place, made, block=block, embeddings=embeddings, **of_planes(planes))
        return made

    places = Places(device, threads, checkpoint_every, work)
    return run(
        start, make_start, checkpoint, read_text(Path(text)), store, layers, model, scale_bits, places,
        overwrite=overwrite, run_layers=run_layers, on_layers=on_layers, on_step=on_step, on_written=on_written,
    )  # fmt: skip


def _training_on_ray(layers: "LayerSettings | None", address: str | None) -> "LayerRunner":
    if layers is None or layers.inputs != "unquantized":
        raise BincompressError(
            "--runner ray trains layers beside each other, and these read the trained layers before them; "
            "--layer-inputs unquantized makes them independent"
        )
    from bincompress.process.own_jobs import own_jobs

    runner: LayerRunner = own_jobs("training").run_on_ray(address)
    return runner


@contextlib.contextmanager
def _torch_needed(what: str) -> Iterator[None]:
    """Say how to install PyTorch where it is not."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise BincompressError(
            f"{what} needs PyTorch, which is not installed: pip install 'bincompress[distill]'"
        ) from None


def evaluate(
    store: str | Path,
    text: str | Path,
    *,
    context: int = 1024,
    windows: int | None = None,
    stride: int | None = None,
    baseline: str | Path | None = None,
    threads: int | None = None,
    activation_bits: int = 8,
    activation_scale: Literal["token", "segment"] = "segment",
    kernel: str | None = None,
    memory: int | None = None,
    progress: OnCount = _uncounted,
) -> Evaluation:
    """Measure how well a model predicts a text: perplexity and, beside a baseline, what the bits cost.

    store: a store, or an unquantized checkpoint folder, which runs in float32. text: a UTF-8 file, tokenized as a
    whole and cut into consecutive windows of `context` tokens, of which at most `windows` are scored; with a stride
    they overlap (see `bincompress.inference.evaluate`). baseline: the unquantized checkpoint to compare with. threads,
    activation_bits, activation_scale, kernel, memory: as for `load`.
    Raises StoreError, CheckpointError, UnsupportedModelError or PromptError.
    """
    content = read_text(Path(text))
    if is_checkpoint(store):
        source = open_source(str(store))
        decoder, assets = load_baseline(source, threads), source.assets()
    else:
        settings = ActivationSettings(activation_bits, activation_scale)
        loaded = load_decoder(str(store), threads, settings, kernel, memory)
        decoder, assets = loaded.decoder, loaded.assets
    other = load_baseline(open_source(str(baseline)), threads) if baseline is not None else None
    tokens = np.array(load_tokenizer(assets).encode(content), np.int64)
    return score(decoder, tokens, context, windows, other, progress, stride=stride)


def inspect(store: str | Path) -> dict[str, Any]:
    """Return what is in a store: `{"tensors": {name: report}, "total": {...}}`; bits are per weight."""
    return inspect_store(open_store(str(store)))


def verify(
    store: str | Path,
    *,
    source: str | Path | None = None,
    sample: int | None = None,
    seed: int = 0,
    statistics: str | None = None,
    progress: OnCount = _uncounted,
) -> VerifyResult:
    """Read every byte of a store and compare it with its hash and the format.

    source: also make tensors from this checkpoint (a folder or a Hub id) once more, as the store says that they were
    made, and compare their bytes; `sample` of them, drawn by `seed`, or all. statistics: those that calibrated tensors
    were made with. Raises StoreError where there is no store, and where its bytes do not follow from a source: it was
    trained, distilled or calibrated layer after layer, or its statistics are not given.
    """
    opened = open_store(str(store))
    proof = prove(opened, source, sample, seed, statistics)
    jobs = proof.jobs if proof is not None else ()
    total = len(opened.tensors()) + 2 + len(jobs)
    problems: dict[str, str] = {}
    results = chain(verify_store(opened), compare(proof) if proof is not None else ())
    for number, (name, problem) in enumerate(results, 1):
        if problem:
            problems.setdefault(name, problem)
        progress(number, total)
    known = proof.problems if proof is not None else {}
    return VerifyResult(str(store), {**known, **problems}, tuple(job.name for job in jobs))


def prove(
    store: Store, source: str | Path | None, sample: int | None, seed: int, statistics: str | None
) -> Proof | None:
    """Return what `verify` is to make from a source once more, None where none is given; raises as it does."""
    if source is None:
        if sample is not None or statistics is not None:
            raise BincompressError("--sample and --statistics are for --source MODEL")
        return None
    found = open_statistics(statistics) if statistics is not None else None
    return plan_proof(store, open_source(str(source)), found, sample, seed)


def pack(store: str | Path, file: str | Path, *, overwrite: bool = False, progress: OnStage = untold) -> Packed:
    """Write a finished store as one file, which every function that reads a store reads as well.

    file: a path or an fsspec URL that ends in ".zip". overwrite: another packed store there is replaced; nothing else
    ever is. progress is called with what is being done and how much of it. Raises StoreError or DamagedError.
    """
    return pack_store(str(store), str(file), overwrite=overwrite, on_stage=progress)


def unpack(file: str | Path, store: str | Path, *, overwrite: bool = False, progress: OnStage = untold) -> Packed:
    """Write a packed file as a folder again, with the same bytes; raises StoreError or DamagedError."""
    return unpack_store(str(file), str(store), overwrite=overwrite, on_stage=progress)


def push(
    store: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    evaluations: Sequence[str | Path] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    progress: OnStage = untold,
) -> "Pushed":
    """Upload a store to the Hugging Face Hub: one file, config and tokenizer files, and a model card.

    repo: owner/name; it is made where it is not there. base_model, licence: what the card says; by default what the
    store and the base model's card say. evaluations: files that `bincompress evaluate --json` has printed. overwrite:
    a card that bincompress did not write is replaced. dry_run: nothing is uploaded. Raises StoreError, DamagedError.
    """
    from bincompress.reporting.publish import push as push_store

    return push_store(
        str(store), repo, private=private, revision=revision, base_model=base_model, licence=licence,
        evaluations=[Path(path) for path in evaluations], overwrite=overwrite, dry_run=dry_run, on_stage=progress,
    )  # fmt: skip


def export(
    store: str | Path, folder: str | Path, *, progress: Callable[[str, int], None] = lambda name, n: None
) -> Path:
    """Write a store as a Hugging Face folder, dequantized to bfloat16, and return it.

    progress is called with each tensor's name and bytes. Raises StoreError where the store is not complete or the
    folder holds something.
    """
    return export_store(open_store(str(store)), Path(folder), progress)
