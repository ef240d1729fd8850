"""bincompress compress"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bincompress.commands.running import (
    Placement,
    Rate,
    layer_after_layer,
    placement_options,
    run_plans,
    spread_bits,
)
from bincompress.commands.shared import kernels_announced, print_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bincompress.calibration.statistics import Statistics
    from bincompress.compression.plan import Plan
    from bincompress.compression.run import Outcome
    from bincompress.sources.checkpoint import Checkpoint

_SAMPLES, _CONTEXT = 64, 512  # of --sequential
_FEW_TOKENS = 16  # for each column of the widest input
_SETTINGS = (
    "method", "groups", "solver", "window", "lam", "lam_normalized", "block", "embeddings", "planes", "scale_bits",
    "compensate", "refine", "epsilon",
)  # fmt: skip


class _Block(click.ParamType[int | str]):
    name = "64|128|256|row|matrix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in ("row", "matrix"):
            return str(value)
        if str(value) in ("64", "128", "256"):
            return int(value)
        self.fail(f"{value!r}: expected one of {self.name}", param, ctx)


@click.command()
@click.argument("source")
@click.argument("store")
@click.option(
    "--method",
    type=click.Choice(["xnor", "wgm", "billm", "dbellquant", "dbllm"]),
    help="How matrices become planes.  [default: wgm]",
)
@click.option("--groups", type=int, help="wgm: at most so many groups of magnitudes in a unit.  [default: 2]")
@click.option(
    "--solver",
    type=click.Choice(["exact", "greedy", "windowed"]),
    help="wgm: the paper's algorithm 1, 2 or 3.  [default: exact]",
)
@click.option("--window", type=int, help="windowed: magnitudes in a starting group.  [default: 512]")
@click.option("--lambda", "lam", type=float, help="wgm: the weight of 1/size in a group's cost.  [default: 0]")
@click.option(
    "--lambda-normalized",
    "lam_normalized",
    is_flag=True,
    default=None,
    help="wgm: lambda is a share between the paper's l_min and l_max.",
)
@click.option("--block", type=_Block(), help="The unit that shares scales.  [default: 128; dbllm: 64]")
@click.option(
    "--embeddings", type=click.Choice(["keep", "4bit", "8bit"]), help="Embeddings and output head.  [default: keep]"
)
@click.option(
    "--recipe", type=click.Path(dir_okay=False, path_type=Path), help="TOML file: defaults and overrides per tensor."
)
@click.option("--keep", multiple=True, metavar="PATTERN", help="Leave matching tensors as they are (repeatable).")
@click.option(
    "--keep-weights",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Single weights kept exactly, lines of 'tensor row column'.",
)
@click.option(
    "--stats", help="Statistics of the layers' inputs, as `bincompress calibrate` writes them: a path or fsspec URL."
)
@click.option(
    "--sequential",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="TEXT",
    help="In place of --stats: calibrate on this text layer after layer, each as those before it have become.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help=f"sequential: windows, spread evenly over the text.  [default: {_SAMPLES}]",
)
@click.option("--context", type=click.IntRange(min=2), help=f"sequential: tokens of a window.  [default: {_CONTEXT}]")
@click.option(
    "--compensate",
    is_flag=True,
    default=None,
    help="Let later columns make up for the error of each, as the statistics tell what it costs.",
)
@click.option("--refine", type=int, help="compensate: rounds of scale refit and bit flips after it.  [default: 0]")
@click.option(
    "--planes",
    type=int,
    help="Planes, each with its own scale: xnor with --compensate 1 to 4 (default 1), dbellquant 1 or 2 (default 2).",
)
@click.option(
    "--epsilon", type=float, help="dbellquant: what the inputs' size counts in its first scale, 0 to 1. [default: 0.85]"
)
@click.option(
    "--target-bits", type=float, help="Spread so many stored bits a weight over the matrices by what errors cost."
)
@click.option(
    "--scale-bits", type=click.Choice(["16", "8"]), help="compensate: bits of each scale in the store.  [default: 16]"
)
@placement_options
@click.option("--dry-run", is_flag=True, help="Show what would be done: tensors, bytes, memory, core-hours.")
@click.option("--rate", type=Rate(), help="--dry-run: source bytes a second of one core.  [default: measured here]")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace a store made with other settings: it is removed before the new one is written.",
)
@click.option("--archive", is_flag=True, help="Code the arrays with zstd: smaller, slower to load.")
@click.option("--verbose", "-v", is_flag=True, help="A line per tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: str, store: str, recipe: Path | None, keep: tuple[str, ...], keep_weights: Path | None, stats: str | None,
    sequential: Path | None, samples: int | None, context: int | None, target_bits: float | None,
    placement: Placement, dry_run: bool, rate: int | None, overwrite: bool, archive: bool, verbose: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Pack the weight matrices of SOURCE into STORE.

    SOURCE is a checkpoint folder or a Hub id (owner/name, owner/name@revision); STORE is a path or an fsspec URL. The
    same command goes on where an interrupted one stopped. For --dry-run a folder with only config.json does.
    Exit code: 0 all done, 1 some tensors failed, 2 refused.

    \b
    Examples:
      bincompress compress ./Llama-3.2-1B ./store
      bincompress compress ./Llama-3.2-1B ./store --groups 32 --block matrix
      bincompress compress ./Llama-3.2-1B ./store --stats ./stats --compensate --refine 4 --scale-bits 8
      bincompress compress ./Llama-3.2-1B ./store --stats ./stats --compensate --refine 4 --target-bits 2.25
      bincompress compress ./Llama-3.2-1B ./store --sequential wiki.txt --method xnor --compensate --refine 4
      bincompress compress meta-llama/Llama-3.2-1B ./store --embeddings 8bit --dry-run
      bincompress compress /shared/Llama-3.1-405B s3://bucket/store --runner ray --address auto
    """
    from bincompress.calibration.collect import text_record
    from bincompress.compression.plan import make_plan
    from bincompress.compression.recipe import load_kept_weights, load_recipe
    from bincompress.sources.hub import open_source

    given = {key: options[key] for key in _SETTINGS if options[key] is not None}
    if "scale_bits" in given:
        given["scale_bits"] = int(given["scale_bits"])
    chosen = load_recipe(recipe, given, keep)
    kept = load_kept_weights(keep_weights) if keep_weights else {}
    statistics = _statistics(stats)
    checkpoint = open_source(source, headers_only=dry_run)
    tokens = _tokens(checkpoint, sequential, samples, context, stats, target_bits, dry_run)
    if target_bits is not None:
        tried = make_plan(checkpoint, chosen, kept, archive, statistics)
        chosen = spread_bits(tried, target_bits, placement, as_json)
    if sequential is None:
        plan = make_plan(checkpoint, chosen, kept, archive, statistics)
    else:
        plan = make_plan(checkpoint, chosen, kept, archive, sequence={} if tokens is None else text_record(tokens))
    if dry_run:
        collected = tokens.size if tokens is not None else (samples or _SAMPLES) * (context or _CONTEXT)
        _show_plan(plan, rate, verbose, as_json, collected)
        return
    wrapped = layer_after_layer(checkpoint, tokens, store) if tokens is not None else None
    outcomes = run_plans({store: plan}, placement, overwrite=overwrite, verbose=verbose, quiet=as_json, wrapped=wrapped)
    finish(store, outcomes[store], as_json)


def _tokens(
    checkpoint: Checkpoint, text: Path | None, samples: int | None, context: int | None, stats: str | None,
    target_bits: float | None, dry_run: bool,
) -> NDArray[np.int64] | None:  # fmt: skip
    """Return what a run layer after layer is calibrated on; raises BincompressError where options contradict it.

    None without --sequential, and in a dry run of a model whose tokenizer is not there.
    """
    from bincompress.calibration.collect import choose_samples
    from bincompress.errors import BincompressError
    from bincompress.model.config import parse
    from bincompress.sources.text import read_text

    if text is None:
        for option, value in (("--samples", samples), ("--context", context)):
            if value is not None:
                raise BincompressError(f"{option} is for --sequential TEXT; `bincompress calibrate` has its own")
        return None
    if stats is not None and target_bits is None:
        raise BincompressError("--sequential collects statistics of its own: leave --stats out")
    if stats is None and target_bits is not None:
        raise BincompressError(
            "--target-bits spreads the bits before --sequential has collected anything: give it --stats STATS too, as "
            "`bincompress calibrate` writes them"
        )
    whole = read_text(text)
    if dry_run and "tokenizer.json" not in checkpoint.assets():
        return None
    chosen = choose_samples(checkpoint, whole, samples or _SAMPLES, context or _CONTEXT)
    cols = parse(checkpoint.config).inner
    if chosen.size < _FEW_TOKENS * cols:
        click.echo(
            f"note: {chosen.size:,} tokens are few for inputs of {cols:,} columns, and layers fit them more than the "
            f"model; --samples {-(-_FEW_TOKENS * cols // chosen.shape[1])} would do",
            err=True,
        )
    return chosen


def _statistics(url: str | None) -> Statistics | None:
    if url is None:
        return None
    from bincompress.calibration.statistics import open_statistics

    return open_statistics(url)


def finish(store: str, outcome: Outcome, as_json: bool) -> None:
    """Show what a run made, and exit with 1 where tensors failed."""
    from bincompress.reporting.inspection import inspect, totals
    from bincompress.store.store import open_store

    found = inspect(open_store(store))
    if as_json:
        print_json(
            {
                "store": store,
                "done": outcome.done,
                "unchanged": outcome.unchanged,
                "failures": outcome.failures,
                **found,
            }
        )
    else:
        again = f", {outcome.unchanged} were complete already" if outcome.unchanged else ""
        click.echo(f"{store}: {outcome.done} tensors done{again}")
        click.echo("\n".join(totals(found["total"])))
    if not outcome.complete:
        sys.exit(1)


def _show_plan(plan: Plan, rate: int | None, verbose: bool, as_json: bool, tokens: int) -> None:
    """Show what would be done; tokens: that --sequential would collect statistics of, if the plan has it."""
    from bincompress.compression.estimate import estimate
    from bincompress.compression.sequential import memory
    from bincompress.model.config import parse

    with kernels_announced():
        cost = estimate(plan.tensors, rate)
    weights = {t.source.name: max(1, _weights(t)) for t in plan.tensors}
    collecting = None if plan.sequence is None else memory(parse(plan.checkpoint.config), tokens)
    if as_json:
        print_json(
            {
                "source": plan.record()["source"],
                "source_bytes": plan.source_bytes,
                "expected_bytes": plan.expected_bytes,
                "peak_memory_bytes": plan.peak_memory,
                "collecting_memory_bytes": collecting,
                "estimate": cost.record(),
                "tensors": {
                    t.source.name: {
                        "kind": t.kind,
                        "method": t.settings.method,
                        "shape": list(t.source.shape),
                        "dtype": t.source.dtype,
                        "source_bytes": t.source.nbytes,
                        "expected_bytes": t.expected_bytes,
                        "peak_memory_bytes": t.peak_memory,
                    }
                    for t in plan.tensors
                },
            }
        )  # fmt: skip
        return
    if verbose:
        for t in plan.tensors:
            click.echo(
                f"{t.source.name}  {t.source.dtype} {list(t.source.shape)}  {t.settings.method}  "
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
    click.echo(f"memory: at most about {plan.peak_memory / 1e6:,.0f} MB a worker")
    click.echo(cost.line())
    if collecting is not None:
        click.echo(
            f"not counted: --sequential runs {tokens:,} tokens through the unquantized model and the binarized one, in "
            f"about {collecting / 1e6:,.0f} MB beside the workers"
        )


def _weights(tensor: Any) -> int:
    import math

    return math.prod(tensor.source.shape)
