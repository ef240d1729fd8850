"""bincompress batch"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bincompress.commands.running import finish, run_bar, run_options, say_notes
from bincompress.commands.shared import kernels_announced, print_json

if TYPE_CHECKING:
    from bincompress.compression.placement import Placement
    from bincompress.compression.planning import Planned


@click.command()
@click.argument("manifest", type=click.Path(dir_okay=False, path_type=Path))
@run_options
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

    planned = api.plan_batch(manifest, archive=archive, export_only=export_only, headers_only=dry_run)
    for store, each in planned.items():
        say_notes(each, store)
    if dry_run:
        _show(planned, rate, as_json)
        return
    with run_bar(verbose, as_json) as progress:
        results = api.carry_out_all(planned, overwrite=overwrite, placement=placement, progress=progress)
    if as_json:
        print_json({store: asdict(result) for store, result in results.items()})
    finish(results.values(), quiet=as_json)


def _show(planned: dict[str, Planned], rate: int | None, as_json: bool) -> None:
    from bincompress.compression.estimate import estimate

    plans = {store: each.plan for store, each in planned.items()}
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
                "runs_here": plan.verdict.runs,
                "kept": plan.kept_lines(),
                "notes": list(planned[store].notes),
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
        click.echo("\n".join([*plan.kept_lines(), plan.verdict.line()]))
    click.echo(whole.line())
