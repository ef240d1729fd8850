"""bincompress export"""

from pathlib import Path
from typing import Any

import click

from bincompress.commands.shared import byte_bar, kernels_announced


@click.command()
@click.argument("store")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--gguf-type", type=click.Choice(["f16", "q8_0"]), help="Of what GGUF has no exact type for.  [default: f16]"
)
@click.option("--ternary", type=click.Choice(["tq2_0", "tq1_0"]), help="Of ternary matrices in GGUF.  [default: tq2_0]")
@click.option("--overwrite", is_flag=True, help="Replace a GGUF file of this name.")
def command(store: str, target: Path, gguf_type: str | None, ternary: str | None, overwrite: bool) -> None:
    """Write STORE for other programs: a Hugging Face checkpoint, or a GGUF file where TARGET ends in .gguf.

    The checkpoint is dequantized bfloat16 in a new folder. The GGUF file holds one-bit matrices (Q1_0) and ternary ones
    exactly, tensors that were kept in their own dtype, and the rest as --gguf-type. Tokenizer and chat template are in
    it.

    \b
    Examples:
      bincompress export ./store ./dequantized
      bincompress export ./store ./model.gguf
      bincompress export ./store ./model.gguf --gguf-type q8_0
    """
    from bincompress.errors import BincompressError
    from bincompress.exporting.gguf import names_gguf
    from bincompress.reporting.inspection import inspect
    from bincompress.store.store import open_store

    opened = open_store(store)
    if names_gguf(target):
        _gguf(opened, target, {"gguf_type": gguf_type or "f16", "ternary": ternary or "tq2_0", "overwrite": overwrite})
        return
    if gguf_type or ternary or overwrite:
        given = "--gguf-type" if gguf_type else "--ternary" if ternary else "--overwrite"
        raise BincompressError(f"{given} is for GGUF files; {target} does not end in .gguf")
    from bincompress.store.export import export

    total = 2 * inspect(opened)["total"]["weights"]
    with byte_bar(total, "export", hidden=False) as bar, kernels_announced(bar.write):
        export(opened, target, lambda name, size: bar.update(size))
    click.echo(f"{target}: written; load it with AutoModelForCausalLM.from_pretrained({str(target)!r})")


def _gguf(store: Any, target: Path, options: dict[str, Any]) -> None:
    from bincompress.exporting.gguf import export_gguf

    with byte_bar(0, "export", hidden=False) as bar, kernels_announced(bar.write):
        done = export_gguf(store, target, on_tensor=lambda name, size: bar.update(size), **options)
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    types = ", ".join(f"{count} {kind}" for kind, count in done.types.items())
    click.echo(
        f"{target}: written, {done.nbytes:,} bytes: {types}; {done.exact} of {done.matrices} matrices hold the store's "
        "weights exactly"
    )
