"""bincompress export"""

from pathlib import Path

import click

from bincompress.commands.shared import byte_bar, kernels_announced


@click.command()
@click.argument("store")
@click.argument("folder", type=click.Path(path_type=Path))
def command(store: str, folder: Path) -> None:
    """Write STORE as a Hugging Face checkpoint in a new FOLDER: dequantized bfloat16, for any other program.

    \b
    Example:
      bincompress export ./store ./dequantized
    """
    from bincompress.reporting.inspection import inspect
    from bincompress.store.export import export
    from bincompress.store.store import open_store

    opened = open_store(store)
    total = 2 * inspect(opened)["total"]["weights"]
    with byte_bar(total, "export", hidden=False) as bar, kernels_announced(bar.write):
        export(opened, folder, lambda name, size: bar.update(size))
    click.echo(f"{folder}: written; load it with AutoModelForCausalLM.from_pretrained({str(folder)!r})")
