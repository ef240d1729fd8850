"""bincompress batch"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bincompress.commands.running import Rate, placement_options, run_bar
from bincompress.commands.shared import kernels_announced, print_json

if TYPE_CHECKING:
    from bincompress.compression.placement import Placement
    from bincompress.compression.plan import Plan


@click.command()
@click.argument("manifest", type=click.Path(dir_okay=False, path_type=Path))
@placement_options
@click.option("--dry-run", is_flag=True, help="Show what would be done: jobs, bytes, memory, core-hours.")
@click.option("--rate", type=Rate(), help="--dry-run: source bytes a second of one core.  [default: measured here]")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace stores made with other settings: they are removed before new ones are written.",
)
@click.option("--export-only", is_flag=True, help="Make stores although they will not run here, to export them.")
@click.option("--archive", is_flag=True, help="Compress the arrays with zstd: smaller, slower to load.")
@click.option("--verbose", "-v", is_flag=True, help="A line per tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    manifest: Path, placement: Placement, dry_run: bool, rate: int | None, overwrite: bool, export_only: bool,
    archive: bool, verbose: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compress the models of MANIFEST: all their matrices in one queue, the largest first.

    MANIFEST is a TOML file with a [[model]] table for each: source, store and, optionally, recipe. What can be
    refused of any is refused before the first is begun. Exit code: 0 all done, 1 some tensors failed, 2 refused.

    \b
    Examples:
      bincompress batch models.toml --dry-run
      bincompress batch models.toml --workers 8
      bincompress batch models.toml --runner ray --address auto --events events.jsonl
    """
    from bincompress import api

    if dry_run:
        _show(api.plan_batch(manifest, archive=archive), rate, as_json)
        return
    with run_bar(verbose, as_json) as progress:
        results = api.batch(
            manifest,
            archive=archive,
            export_only=export_only,
            overwrite=overwrite,
            placement=placement,
            progress=progress,
        )
    if as_json:
        shown = ("done", "unchanged", "failures", "complete")
        print_json({store: {name: getattr(result, name) for name in shown} for store, result in results.items()})
    else:
        for store, result in results.items():
            failed = f", {len(result.failures)} FAILED" if result.failures else ""
            click.echo(f"{store}: {result.done} tensors done, {result.unchanged} already complete{failed}")
    if not all(result.complete for result in results.values()):
        sys.exit(1)


def _show(plans: dict[str, Plan], rate: int | None, as_json: bool) -> None:
    from bincompress.compression.estimate import estimate

    with kernels_announced():
        whole = estimate((tensor for plan in plans.values() for tensor in plan.tensors), rate)
    if as_json:
        models = {
            store: {
                "source": plan.checkpoint.name,
                "jobs": len(plan.tensors),
                "source_bytes": plan.source_bytes,
                "expected_bytes": plan.expected_bytes,
                "peak_memory_bytes": plan.peak_memory,
            }
            for store, plan in plans.items()
        }
        print_json({"models": models, "estimate": whole.record()})
        return
    for store, plan in plans.items():
        click.echo(
            f"{plan.checkpoint.name} -> {store}: {len(plan.tensors):,} jobs, reads {plan.source_bytes:,} bytes, writes "
            f"{plan.expected_bytes:,} bytes, at most about {plan.peak_memory / 1e6:,.0f} MB a job"
        )
    click.echo(whole.line())
