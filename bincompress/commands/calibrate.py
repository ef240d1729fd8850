"""bincompress calibrate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bincompress.commands.shared import kernels_announced, print_json

if TYPE_CHECKING:
    from bincompress.calibration.collect import LayerRunner


@click.command()
@click.argument("source")
@click.argument("stats")
@click.option(
    "--text",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="A text like those the model is for; not the one it will be evaluated on.",
)
@click.option("--samples", type=int, default=64, show_default=True, help="Windows, spread evenly over the text.")
@click.option("--context", type=int, default=512, show_default=True, help="Tokens of a window.")
@click.option("--threads", type=click.IntRange(min=1), help="local: threads.  [default: all usable CPUs]")
@click.option(
    "--runner",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Who runs the samples: this machine or a Ray cluster.",
)
@click.option("--address", help="ray: auto, HOST:PORT or ray://HOST:10001.  [default: RAY_ADDRESS, or this machine]")
@click.option("--overwrite", is_flag=True, help="Replace statistics made with other settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: str, stats: str, text: Path, samples: int, context: int, threads: int | None, runner: str,
    address: str | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run SOURCE over a text and collect into STATS what its linear layers read.

    SOURCE is a checkpoint folder or a Hub id; STATS is a path or an fsspec URL. The checkpoint is read one decoder
    layer at a time. The same command goes on where an interrupted one stopped.

    \b
    Examples:
      bincompress calibrate ./Llama-3.2-1B ./stats --text wiki.txt
      bincompress calibrate ./Llama-3.2-1B s3://bucket/stats --text wiki.txt --samples 256 --runner ray --address auto
    """
    from tqdm import tqdm

    from bincompress.calibration.collect import calibrate, choose_samples
    from bincompress.sources.hub import open_source
    from bincompress.sources.text import read_text

    run_layer = _runner(runner, threads, address, stats)
    checkpoint = open_source(source)
    chosen = choose_samples(checkpoint, read_text(text), samples, context)
    with kernels_announced(), tqdm(desc="calibrate", unit="part", disable=True if as_json else None) as bar:

        def on_part(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = calibrate(
            checkpoint, chosen, stats, runner=run_layer, overwrite=overwrite,
            progress=on_part,
        )  # fmt: skip
    inputs = found.attributes["inputs"]
    if as_json:
        print_json({"stats": stats, "tokens": int(chosen.size), "tensors": len(inputs), "inputs": inputs})
        return
    click.echo(
        f"{stats}: inputs of {len(inputs)} matrices ({len(set(inputs.values()))} distinct) over {chosen.size:,} tokens"
    )


def _runner(kind: str, threads: int | None, address: str | None, stats: str) -> LayerRunner:
    from bincompress.calibration.collect import run_in_threads
    from bincompress.errors import BincompressError
    from bincompress.inference.load import usable_threads

    if kind == "local":
        if address is not None:
            raise BincompressError("--address is for --runner ray; the local runner takes --threads")
        return run_in_threads(threads or usable_threads())
    if threads is not None:
        raise BincompressError("--threads is for --runner local; on a cluster every part is one core's work")
    from bincompress.own_jobs import own_jobs

    runner: LayerRunner = own_jobs("calibration").run_on_ray(address, stats)
    return runner
