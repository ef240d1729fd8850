"""bincompress models"""

from dataclasses import asdict

import click

from bincompress.commands.shared import print_json


@click.command()
@click.option("--remove", multiple=True, metavar="OWNER/NAME", help="Remove a model from the cache (repeatable).")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(remove: tuple[str, ...], as_json: bool) -> None:
    """List the models that lie in the Hub's cache: packed stores and checkpoints, with their sizes.

    --remove takes OWNER/NAME, or OWNER/NAME@COMMIT for one revision. Other programs use the same cache (HF_HOME).

    \b
    Examples:
      bincompress models
      bincompress models --remove me/Llama-3.2-1B-2bit
    """
    from bincompress.store.hub import cached_models, remove_cached

    removed, freed = [], 0
    for name in remove:
        gone, size = remove_cached(name)
        removed += gone
        freed += size
    shown = removed if remove else cached_models()
    if as_json:
        print_json({"removed" if remove else "models": [asdict(one) for one in shown]})
        return
    if not shown:
        click.echo("no models in the cache")
        return
    width = max(len(one.name) for one in shown)
    for one in shown:
        what = "removed  " if remove else ""
        click.echo(f"{what}{one.name:{width}s}  {one.revision[:12]}  {one.kind:10s}  {one.nbytes / 1e6:10,.1f} MB")
    total = freed if remove else sum(one.nbytes for one in shown)
    click.echo(f"{total / 1e6:,.1f} MB {'are free by that' if remove else 'in all; revisions may share files'}")
