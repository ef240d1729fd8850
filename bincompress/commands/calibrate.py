"""bincompress calibrate"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from bincompress.commands.shared import address_option, kernels_announced, print_json


@click.command()
@click.argument("source")
@click.argument("stats")
@click.option(
    "--text",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Text like that which the model will see; not the text you will evaluate on.",
)
@click.option("--samples", type=int, default=64, show_default=True, help="Windows, spread evenly over the text.")
@click.option("--context", type=int, help="Tokens per window.  [default: 512, or the model's limit]")
@click.option("--threads", type=click.IntRange(min=1), help="local: threads.  [default: all usable CPUs]")
@click.option(
    "--runner",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where the samples run: on this machine or on a Ray cluster.",
)
@address_option
@click.option("--text-only", is_flag=True, help="For a `bincompress compress` with --text-only.")
@click.option("--overwrite", is_flag=True, help="Replace statistics made with other settings: they are removed first.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: str, stats: str, text: Path, samples: int, context: int | None, threads: int | None,
    runner: Literal["local", "ray"], address: str | None, text_only: bool, overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Run SOURCE over a text and collect the statistics of its linear layers' inputs into STATS.

    SOURCE is a checkpoint folder or a Hub id; STATS is a path or an fsspec URL. The checkpoint is read one decoder
    layer at a time. The same command resumes after the last completed layer of an interrupted one.

    \b
    Examples:
      bincompress calibrate ./Llama-3.2-1B ./stats --text wiki.txt
      bincompress calibrate ./Llama-3.2-1B s3://bucket/stats --text wiki.txt --samples 256 --runner ray --address auto
    """
    from tqdm import tqdm

    from bincompress import api

    with kernels_announced(), tqdm(desc="calibrate", unit="part", disable=True if as_json else None) as bar:

        def on_part(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = api.calibrate(
            source, stats, text, samples=samples, context=context, runner=runner, threads=threads, address=address,
            text_only=text_only, overwrite=overwrite, progress=on_part,
        )  # fmt: skip
    if as_json:
        record = {"stats": stats, "tokens": found.tokens, "tensors": len(found.inputs), "inputs": found.inputs}
        print_json({**record, "experts": found.experts} if found.experts else record)
        return
    click.echo(
        f"{stats}: inputs of {len(found.inputs)} matrices ({len(set(found.inputs.values()))} distinct) over "
        f"{found.tokens:,} tokens"
    )
    for line in found.remarks:
        click.echo(line)
