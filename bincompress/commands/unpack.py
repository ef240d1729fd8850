"""bincompress unpack"""

from dataclasses import asdict

import click

from bincompress.commands.shared import print_json, stage_bars


@click.command()
@click.argument("file")
@click.argument("store")
@click.option("--overwrite", is_flag=True, help="Replace a store that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(file: str, store: str, overwrite: bool, as_json: bool) -> None:
    """Write a packed FILE as the folder STORE again. FILE and STORE are paths or fsspec URLs.

    The same command finishes what an interrupted one began.

    \b
    Example:
      bincompress unpack ./model.bincompress.zip ./store
    """
    from bincompress.store.pack import unpack

    with stage_bars(quiet=as_json) as on_stage:
        done = unpack(file, store, overwrite=overwrite, on_stage=on_stage)
    if as_json:
        print_json(asdict(done))
        return
    click.echo(f"{done.store}: written and read back, {done.entries:,} files of {done.nbytes:,} bytes")
    if done.laid_out:
        click.echo(
            f"note: {done.file}: the matrices that it holds laid out for {', '.join(done.laid_out)} are no part of the "
            "store; `bincompress pack --layout` makes them again",
            err=True,
        )
