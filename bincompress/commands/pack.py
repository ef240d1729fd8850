"""bincompress pack"""

from dataclasses import asdict

import click

from bincompress.commands.shared import kernels_announced, print_json, stage_bars


@click.command()
@click.argument("store")
@click.argument("file")
@click.option(
    "--layout",
    multiple=True,
    metavar="CPU",
    help="Also hold matrices laid out for avx512, avx2, ssse3, neon, portable, or auto (this CPU). Loading maps "
    "them; the file takes about twice the bytes. Repeatable; STORE may be a packed file then.",
)
@click.option("--overwrite", is_flag=True, help="Replace another packed store of this name; nothing else is replaced.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(store: str, file: str, layout: tuple[str, ...], overwrite: bool, as_json: bool) -> None:
    """Write STORE as one FILE, which every command reads like the store: a zip file, whose name ends in .zip.

    STORE and FILE are paths or fsspec URLs. Everything is checked before and after. Equal stores give equal bytes.

    \b
    Examples:
      bincompress pack ./store ./model.bincompress.zip
      bincompress pack ./store ./model.bincompress.zip --layout auto
      bincompress generate ./model.bincompress.zip "The scheduler"
      bincompress inspect https://example.org/model.bincompress.zip
    """
    from bincompress.api import pack

    with kernels_announced(), stage_bars(quiet=as_json) as on_stage:
        done = pack(store, file, layout=layout, overwrite=overwrite, progress=on_stage)
    say_packed(done) if not as_json else print_json(asdict(done))


def say_packed(done: object) -> None:
    """Say what came of packing a store."""
    from bincompress.store.pack import Packed

    assert isinstance(done, Packed)
    if done.left_out:
        shown = ", ".join(done.left_out[:5]) + (f" and {len(done.left_out) - 5} more" if done.left_out[5:] else "")
        click.echo(f"note: {done.store}: not packed, as it is no part of the store: {shown}", err=True)
    what = "holds this store already, and is sound" if done.unchanged else "written and read back"
    click.echo(f"{done.file}: {what}, {done.entries:,} entries of {done.nbytes:,} bytes")
    if done.laid_out:
        from cpu_kernels.matmul.prepacking import described

        click.echo(f"{done.file}: holds matrices laid out for {', '.join(map(described, done.laid_out))}, too")
