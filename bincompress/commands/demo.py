"""bincompress demo"""

import sys
from pathlib import Path

import click


@click.command()
@click.argument("store", default="bincompress-demo")
def command(store: str) -> None:
    """Compress the small model that ships with the package into STORE (./bincompress-demo), show it, check it.

    \b
    Example:
      bincompress demo
    """
    from importlib.resources import as_file, files

    from bincompress.checkpoint import open_checkpoint
    from bincompress.commands.running import Placement, run_plans
    from bincompress.commands.verify import check
    from bincompress.inspection import inspect, table
    from bincompress.plan import make_plan
    from bincompress.recipe import load_recipe
    from bincompress.store import open_store

    with as_file(files("bincompress") / "demo_model") as folder:
        plan = make_plan(open_checkpoint(Path(folder)), load_recipe(None, {"embeddings": "8bit"}))
        outcome = run_plans({store: plan}, Placement(), overwrite=False, verbose=False, quiet=False)[store]
    click.echo(table(inspect(open_store(store))))
    problems = check(store, quiet=False)
    for name, problem in problems.items():
        click.echo(f"{name}: {problem}", err=True)
    if problems or not outcome.complete:
        sys.exit(1)
    click.echo(f"\nverified: every tensor of {store} is as it was written. Next:")
    click.echo(f"  bincompress inspect {store} model.layers.0.mlp.up_proj.weight")
    click.echo("  bincompress compress --help")
