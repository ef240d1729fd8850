"""bincompress inspect"""

import json

import click

from bincompress.commands.shared import print_json


@click.command()
@click.argument("store")
@click.argument("tensor", required=False)
@click.option("--experts", is_flag=True, help="A line for each expert's matrices, not one for all of a layer.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON: every tensor.")
def command(store: str, tensor: str | None, experts: bool, as_json: bool) -> None:
    """Show what is in STORE, or everything about one TENSOR.

    \b
    Examples:
      bincompress inspect ./store
      bincompress inspect ./store model.layers.0.mlp.up_proj.weight
      bincompress inspect ./store --json
    """
    from bincompress.reporting.inspection import inspect, table
    from bincompress.store.store import open_store

    opened = open_store(store)
    if tensor is None:
        found = inspect(opened)
        print_json(found) if as_json else click.echo(table(found, experts))
        return
    attributes = {**opened.complete_attributes(tensor), **opened.read_log(tensor)}
    if as_json:
        print_json(attributes)
        return
    click.echo(tensor)
    for key, value in attributes.items():
        click.echo(f"  {key:14s} {value if isinstance(value, str) else json.dumps(value)}")
