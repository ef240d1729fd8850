"""bincompress compress"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bincompress.commands.method_options import method_options, method_settings
from bincompress.commands.running import Size, finish, run_bar, run_options, say_notes
from bincompress.commands.shared import kernels_announced, print_json

if TYPE_CHECKING:
    from bincompress.api import CompressionResult
    from bincompress.compression.placement import Placement
    from bincompress.compression.planning import Planned

_SAMPLES, _CONTEXT = 64, 512  # of --sequential; calibration.collect has the same, and takes longer to import


@click.command()
@click.argument("source")
@click.argument("store")
@method_options
@click.option(
    "--recipe",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    help="TOML file: defaults and overrides per tensor. Given several times, each makes a store: {recipe} in STORE is "
    "its name.",
)
@click.option("--keep", multiple=True, metavar="PATTERN", help="Leave matching tensors as they are (repeatable).")
@click.option(
    "--keep-weights",
    metavar="FILE|auto",
    help="Single weights kept exactly: lines of 'tensor row column', or auto: found by their effect on the model.",
)
@click.option("--stats", help="Input statistics written by `bincompress calibrate`: a path or fsspec URL.")
@click.option(
    "--sequential",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="TEXT",
    help="Instead of --stats: calibrate on this text layer by layer, on the outputs of those binarized so far.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help=f"sequential: windows, spread evenly over the text.  [default: {_SAMPLES}]",
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help=f"sequential: tokens of a window.  [default: {_CONTEXT}, or the model's limit]  "
    "fit: tokens that the process holds.  [default: 2048, or the model's limit]",
)
@click.option(
    "--fit", type=Size(), help="Choose planes and embeddings so that running the model stays under this, such as 600MB."
)
@click.option(
    "--target-bits",
    type=float,
    help="Average stored bits per weight: choose planes and blocks per matrix where errors cost most.",
)
@click.option(
    "--train", type=click.Path(dir_okay=False, path_type=Path), metavar="TEXT",
    help="Then train the planes and scales on this text, layer after layer. Needs PyTorch.",
)  # fmt: skip
@click.option(
    "--text-only", is_flag=True,
    help="Of a model that also sees or hears: the language model alone, without the towers beside it.",
)  # fmt: skip
@click.option(
    "--pack", is_flag=True, help="Also write the finished store as one file beside it: STORE.bincompress.zip."
)
@run_options
def command(
    source: str, store: str, recipe: tuple[Path, ...], placement: Placement, dry_run: bool, rate: int | None,
    overwrite: bool, verbose: bool, as_json: bool, train: Path | None, pack: bool, fit: int | None, **options: Any,
) -> None:  # fmt: skip
    """Pack the weight matrices of SOURCE into STORE.

    SOURCE is a checkpoint folder, a .gguf file or a Hub id (owner/name, owner/name@revision); STORE is a path or an
    fsspec URL. Quantized checkpoints are dequantized as they are read. The same command resumes where an interrupted
    one stopped. For --dry-run a folder with only config.json is enough.
    Exit code: 0 all done, 1 some tensors failed, 2 refused.

    \b
    Examples:
      bincompress compress ./Llama-3.2-1B ./store
      bincompress compress ./Llama-3.2-1B ./store --groups 32 --block matrix
      bincompress compress ./Llama-3.2-1B ./store --stats ./stats --compensate --refine 4 --scale-bits 8
      bincompress compress ./Llama-3.2-1B ./store --stats ./stats --compensate --refine 4 --target-bits 2.25
      bincompress compress ./Llama-3.2-1B ./store --sequential wiki.txt --method xnor --compensate --refine 4
      bincompress compress ./model-Q8_0.gguf ./store --embeddings 4bit
      bincompress compress ./Llama-3.2-1B ./store --train wiki.txt
      bincompress compress ./Llama-3.2-1B ./store --fit 1.5GB --context 4096
      bincompress compress ./Llama-3.2-1B ./store --pack
      bincompress compress ./Llama-3.2-1B ./stores/{recipe} --recipe one.toml --recipe two.toml
      bincompress compress meta-llama/Llama-3.2-1B ./store --embeddings 8bit --dry-run
      bincompress compress /shared/Llama-3.1-405B s3://bucket/store --runner ray --address auto
    """
    from bincompress import api
    from bincompress.compression.manifest import stores_of
    from bincompress.errors import BincompressError

    chosen = {**method_settings(options), **options}
    if fit is not None:
        chosen |= _fitting(source, fit, recipe, chosen, dry_run)
    stores: dict[str, Any] = dict(stores_of(store, recipe)) if recipe else {store: None}
    several = len(stores) > 1
    if train is not None and several:
        raise BincompressError("--train is for one store: give one --recipe, and `bincompress train` for the others")
    with run_bar(verbose, as_json) as progress:
        planned = api.plan_several(
            source, stores, headers_only=dry_run, placement=placement, progress=progress, **chosen
        )
        for place, each in planned.items():
            say_notes(each, place if several else "")
        if not dry_run:
            done = api.carry_out_several(
                planned, train=train, pack=pack, overwrite=overwrite, placement=placement, progress=progress
            )
    if dry_run:
        _show_plans(planned, rate, verbose, as_json)
        if train is not None and not as_json:
            _say_training(next(iter(planned.values())))
        return
    _show_results(done, pack, as_json)


def _fitting(source: str, size: int, recipe: tuple[Path, ...], chosen: dict[str, Any], dry_run: bool) -> dict[str, Any]:
    """Return the settings that fit, and say them; --context is of the process that runs the model then."""
    from bincompress import api
    from bincompress.errors import BincompressError

    for option, given in (
        ("--recipe", recipe),
        *((f"--{name}", chosen[name]) for name in ("sequential", "target_bits")),
    ):
        if given:
            raise BincompressError(f"--fit chooses the settings of all matrices; leave out {option.replace('_', '-')}")
    others = {name: value for name, value in chosen.items() if name not in ("sequential", "target_bits", "samples")}
    found = api.fit(source, size, headers_only=dry_run, **others)
    click.echo(found.line(size), err=True)
    return {**found.settings, "context": None}


def _show_results(done: dict[str, CompressionResult], pack: bool, as_json: bool) -> None:
    """Show what was made, and exit with 1 where tensors failed."""
    if as_json:
        records = {place: asdict(result) for place, result in done.items()}
        print_json(records if len(done) > 1 else records[next(iter(records))])
    for result in done.values() if pack else ():
        click.echo(
            f"{result.packed}: the same store as one file, read back"
            if result.packed
            else "not packed, as the store is not complete",
            err=as_json,
        )
    for result in done.values():
        if result.trained is not None and not as_json:
            from bincompress.commands.train import say_trained

            say_trained(result.trained)
    finish(done.values(), quiet=as_json)


def _show_plans(planned: dict[str, Planned], rate: int | None, verbose: bool, as_json: bool) -> None:
    """Show what would be done, for each of the stores."""
    records = {}
    for store, each in planned.items():
        if len(planned) > 1 and not as_json:
            click.echo(f"{store}:")
        records[store] = _show_plan(each, rate, verbose, as_json)
    if as_json:
        print_json(records if len(records) > 1 else records[next(iter(records))])


def _show_plan(planned: Planned, rate: int | None, verbose: bool, as_json: bool) -> dict[str, Any]:
    """Show what would be done, and return it as JSON, which is not shown here."""
    from bincompress.compression.estimate import estimate
    from bincompress.compression.sequential import memory
    from bincompress.model.checkpoint_source import checkpoint_config

    plan, tokens = planned.plan, planned.sequential_tokens
    with kernels_announced():
        cost = estimate(plan.tensors, rate)
    collecting = None if plan.sequence is None else memory(checkpoint_config(plan.checkpoint), tokens)
    record = _plan_record(planned, cost.record(), collecting)
    if as_json:
        return record
    weights = {t.source.name: max(1, math.prod(t.source.shape)) for t in plan.tensors}
    if verbose:
        for t in plan.tensors:
            read_from = t.source.dtype if t.source.encoding is None else t.source.encoding.format
            click.echo(
                f"{t.source.name}  {read_from} {list(t.source.shape)}  {t.settings.method}  "
                f"{t.expected_bytes:,} bytes, {8 * t.expected_bytes / weights[t.source.name]:.3f} bits"
            )
    for kind in ("linear", "embedding", "head", "other"):
        chosen = [t for t in plan.tensors if t.kind == kind]
        if chosen:
            total = sum(weights[t.source.name] for t in chosen)
            expected = sum(t.expected_bytes for t in chosen)
            methods = ", ".join(sorted({t.settings.method for t in chosen}))
            click.echo(
                f"{kind:10s} {len(chosen):5d} tensors  {total:15,d} weights  {methods:12s} "
                f"{expected:15,d} bytes  {8 * expected / total:7.3f} bits"
            )
    click.echo(
        f"reads {plan.source_bytes:,} bytes, writes {plan.expected_bytes:,} bytes "
        f"({plan.source_bytes / max(1, plan.expected_bytes):.1f} x smaller)"
    )
    click.echo("\n".join([*plan.kept_lines(), plan.verdict.line(), *planned.remarks()]))
    click.echo(f"memory: at most about {plan.peak_memory / 1e6:,.0f} MB a worker")
    click.echo(cost.line())
    if collecting is not None:
        click.echo(
            f"not included: --sequential also runs {tokens:,} tokens through the unquantized model and the compressed "
            f"one, in about {collecting / 1e6:,.0f} MB on top of the workers"
        )
    return record


def _say_training(planned: Planned) -> None:
    """Show what --train adds to a plan."""
    from bincompress.distillation import memory
    from bincompress.distillation.settings import LayerSettings
    from bincompress.model.checkpoint_source import checkpoint_config

    settings = LayerSettings()
    needed = memory.of_layers(checkpoint_config(planned.plan.checkpoint), settings)
    click.echo(
        f"not included: --train then runs {settings.windows * settings.context:,} tokens {settings.passes} times "
        f"through each layer, in about {needed / 1e9:.1f} GB"
    )


def _plan_record(planned: Planned, estimate: dict[str, Any], collecting: int | None) -> dict[str, Any]:
    """Return a plan as JSON."""
    plan = planned.plan
    return {
        "source": plan.record()["source"],
        "source_bytes": plan.source_bytes,
        "expected_bytes": plan.expected_bytes,
        "peak_memory_bytes": plan.peak_memory,
        "collecting_memory_bytes": collecting,
        "estimate": estimate,
        "runs_here": plan.verdict.runs,
        "faults": list(plan.verdict.faults),
        "notes": list(planned.notes),
        "kept": plan.kept_lines(),
        "remarks": planned.remarks(),
        "tensors": {
            t.source.name: {
                "kind": t.kind,
                "method": t.settings.method,
                "shape": list(t.source.shape),
                "dtype": t.source.dtype,
                "source_bytes": t.source.nbytes,
                "source_format": t.source.encoding.format if t.source.encoding is not None else None,
                "expected_bytes": t.expected_bytes,
                "peak_memory_bytes": t.peak_memory,
            }
            for t in plan.tensors
        },
    }
