"""bincompress train"""

import sys
from pathlib import Path
from typing import Any

import click

from bincompress.commands.options import rounded_inputs_option
from bincompress.commands.out_file import OutFolder
from bincompress.commands.shared import address_option, kernels_announced, print_json

_BLOCKS = ["64", "128", "256", "row"]
_LAYERS = {"windows": "windows", "layer_context": "context", "passes": "passes", "layer_batch": "batch",
           "layer_lr": "lr", "layer_lr_planes": "lr_planes", "layer_inputs": "inputs", "finish_passes": "finish_passes",
           "seed": "seed"}  # fmt: skip
_MODEL = ("steps", "batch", "accumulate", "context", "lr", "lr_planes", "written_tokens", "evaluate_every", "patience",
          "seed")  # fmt: skip
_PLACES = ("device", "threads", "checkpoint_every", "work", "runner", "address")


@click.command()
@click.argument("source")
@click.argument("store")
@click.option("--text", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Text to train on, UTF-8.")
@click.option("--start", metavar="STORE0", help="Begin with this store's planes.  [default: made from SOURCE]")
@click.option("--planes", type=click.IntRange(1, 2), default=2, show_default=True, help="Planes, without --start.")
@click.option(
    "--block", type=click.Choice(_BLOCKS), default="128", show_default=True,
    help="Columns of a row that share scales, without --start.",
)  # fmt: skip
@click.option(
    "--embeddings", type=click.Choice(["keep", "4bit", "8bit"]), default="keep", show_default=True,
    help="Embeddings and output head, without --start; they are not trained.",
)  # fmt: skip
@click.option("--scale-bits", type=click.Choice(["8", "16"]), help="Bits of each scale.  [default: the start's, 16]")
@click.option(
    "--by", type=click.Choice(["layer", "model", "layer+model"]), default="layer", show_default=True,
    help="Train layers one after the other, the whole model, or both in this order.",
)  # fmt: skip
@click.option("--windows", type=int, default=512, show_default=True, help="layer: windows of the text.")
@click.option("--layer-context", type=int, default=256, show_default=True, help="layer: tokens per window.")
@click.option("--passes", type=int, default=4, show_default=True, help="layer: passes over the windows.")
@click.option("--layer-batch", type=int, default=4, show_default=True, help="layer: windows per step.")
@click.option(
    "--layer-lr", type=float, default=0.01, show_default=True,
    help="layer: learning rate of scales, relative to a row's typical scale.",
)  # fmt: skip
@click.option(
    "--layer-lr-planes", type=float, default=0.01, show_default=True,
    help="layer: learning rate of latents, relative to a matrix's standard deviation.",
)  # fmt: skip
@click.option(
    "--layer-inputs", type=click.Choice(["trained", "unquantized"]), default="trained", show_default=True,
    help="layer: what a layer reads. unquantized: layers are independent of each other.",
)  # fmt: skip
@click.option(
    "--finish-passes", type=int, default=1, show_default=True,
    help="layer: with --layer-inputs unquantized, passes layer after layer, to end with.",
)  # fmt: skip
@click.option("--steps", type=int, default=1000, show_default=True, help="model: optimizer steps.")
@click.option("--batch", type=int, default=16, show_default=True, help="model: windows per step.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="model: split each batch into parts.")
@click.option("--context", type=int, default=512, show_default=True, help="model: tokens per window.")
@click.option("--lr", type=float, default=0.003, show_default=True, help="model: learning rate of scales.")
@click.option("--lr-planes", type=float, default=0.003, show_default=True, help="model: learning rate of latents.")
@click.option(
    "--written-tokens", type=int, default=0, show_default=True,
    help="model: tokens of training text that the unquantized model generates.",
)  # fmt: skip
@click.option("--evaluate-every", type=int, default=100, show_default=True, help="model: steps between validations.")
@click.option("--patience", type=int, default=5, show_default=True, help="model: validations without improvement.")
@rounded_inputs_option
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bf16"]), default="auto", show_default=True,
    help="Type of the matrix products; auto: bf16 where the processor multiplies it.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to train."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: PyTorch's; ray: 1 a layer]")
@click.option(
    "--runner", type=click.Choice(["local", "ray"]), default="local", show_default=True,
    help="Who trains independent layers: this process or a Ray cluster.",
)  # fmt: skip
@address_option
@click.option(
    "--checkpoint-every", type=click.IntRange(min=0),
    help="model: steps between checkpoints. 0: none.  [default: by time, at most 1/20 of the run's]",
)  # fmt: skip
@click.option(
    "--work", type=OutFolder(),
    help="Folder of completed layers and checkpoints.  [default: beside STORE]",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the windows and their order.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and the memory that it takes.")
@click.option("--overwrite", is_flag=True, help="Begin anew, and replace STORE.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: str, store: str, text: Path, start: str | None, planes: int, block: str, embeddings: str,
    scale_bits: str | None, by: str, dtype: str, activation_bits: str, dry_run: bool, overwrite: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Train the planes and scales of SOURCE's layers, and write them to STORE.

    Every weight keeps a number while it is trained; what is multiplied, and in the end stored, are its signs. By layer,
    each decoder layer learns to give what the unquantized layer gives, and only one layer is in memory; by model, all
    learn the unquantized model's predictions. STORE has the format, size and speed of a store without training. The
    same command resumes an interrupted run. Needs PyTorch: pip install 'bincompress[distill]'.

    \b
    Examples:
      bincompress train ./Qwen2.5-0.5B ./store --text train.txt
      bincompress train ./Qwen2.5-0.5B ./store --text train.txt --planes 1 --by layer+model --device cuda
      bincompress train ./Qwen2.5-0.5B ./store --text train.txt --layer-inputs unquantized --runner ray
      bincompress train ./Qwen2.5-0.5B ./better --text train.txt --start ./store --by model --steps 500
    """
    from tqdm import tqdm

    from bincompress import api
    from bincompress.distillation.settings import DistillSettings, LayerSettings
    from bincompress.errors import BincompressError

    if start is not None and (planes, block, embeddings) != (2, "128", "keep"):
        raise BincompressError("--planes, --block and --embeddings are those of the store given with --start")
    places = {key: options.pop(key) for key in _PLACES}
    shared: dict[str, Any] = {"dtype": _products(dtype, places["device"]), "activation_bits": int(activation_bits)}
    layers = LayerSettings(**shared, **{own: options[name] for name, own in _LAYERS.items()})
    model = DistillSettings(planes=True, **shared, **{name: options[name] for name in _MODEL})
    if dry_run:
        _say_memory(source, layers if "layer" in by else None, model if "model" in by else None, as_json)
        return
    with tqdm(desc="train", unit="step", disable=True if as_json else None, dynamic_ncols=True) as bar:

        def say(line: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(line, refresh=False)
            bar.update(done - bar.n)
            if bar.disable and not as_json and "held out" in line:  # a log has a line a layer
                click.echo(line, err=True)

        def on_step(progress: Any) -> None:
            at, held_out = progress.judged[-1]
            loss = progress.losses[-1]
            say(f"loss {loss:.4f}, held-out perplexity {held_out:.3f} at {at}", progress.step, model.steps)

        with kernels_announced(say=lambda line: bar.write(line, file=sys.stderr)):
            found = api.train(
                source, store, text, start=start, planes=1 if planes == 1 else 2,
                block=block if block == "row" else int(block),  # type: ignore[arg-type]
                scale_bits=None if scale_bits is None else int(scale_bits),  # type: ignore[arg-type]
                embeddings=embeddings,  # type: ignore[arg-type]
                layers=layers if "layer" in by else None, model=model if "model" in by else None,
                overwrite=overwrite, on_layers=lambda done, total, line: say(line, done, total), on_step=on_step,
                on_written=lambda done, total: say(f"the teacher writes {total:,} tokens", done, total), **places,
            )  # fmt: skip
    print_json(found.record()) if as_json else say_trained(found)


def _say_memory(source: str, layers: Any, model: Any, as_json: bool) -> None:
    """Show what would be trained, and the memory that it takes."""
    from bincompress.distillation import memory
    from bincompress.model.checkpoint_source import checkpoint_config
    from bincompress.sources.hub import open_source

    config = checkpoint_config(open_source(source, headers_only=True))
    found: dict[str, dict[str, Any]] = {}
    if layers is not None:
        streams = memory.of_streams(config, layers)
        found["layers"] = {
            "tokens": layers.windows * layers.context, "bytes": memory.of_layers(config, layers),
            "streams_bytes": streams, "streams_in_files": memory.on_disk(streams),
        }  # fmt: skip
    if model is not None:
        found["model"] = {"steps": model.steps, "bytes": memory.of_model(config, model)}
    if as_json:
        print_json(found)
        return
    if layers is not None:
        own = found["layers"]
        where = " (on a CPU, in files beside STORE)" if own["streams_in_files"] else ""
        click.echo(
            f"layer after layer: {config.layers} layers on {own['tokens']:,} tokens, each {layers.passes} times, about "
            f"{own['bytes'] / 1e9:.1f} GB, of which the layers' inputs take {own['streams_bytes'] / 1e9:.1f} GB{where}"
        )
    if model is not None:
        size = f"{model.steps} steps of {model.batch} x {model.context} tokens"
        click.echo(f"whole model: {size}, about {found['model']['bytes'] / 1e9:.1f} GB")


def say_trained(found: Any) -> None:
    """Show what came of a training."""
    same = 0
    for report in found.independent:
        click.echo(
            f"layer {report.layer}, by itself: held-out loss {report.held_out_start:.3f} -> {report.held_out:.3f}, "
            f"{report.seconds:.0f} s"
        )
    for report in found.layers:
        change = (
            f"{report.held_out_start:.3f} -> {report.held_out:.3f}, {report.flips:.1%} of the weights changed level"
        )
        if report.held_out == report.held_out_start:
            same += 1
            change = f"{report.held_out:.3f} did not fall: the layer stays as it was"
        click.echo(f"layer {report.layer}: held-out loss {change}, {report.seconds:.0f} s")
    if same:
        click.echo(f"{same} of {len(found.layers)} layers gained nothing; more --windows help, or a smaller --layer-lr")
    if found.model:
        line = "held-out perplexity {start:.4f} -> {best:.4f} (unquantized {teacher:.4f}), best at step {best_step}"
        click.echo(line.format(**found.model) + f" of {found.model['steps']}")
        if found.model["stopped"]:
            click.echo(f"stopped: {found.model['stopped']}")
    click.echo(f"{found.store}: trained in {found.seconds:.0f} s")


def _products(dtype: str, device: str) -> Any:
    """Return the type of matrix products; auto: the fastest that the hardware multiplies."""
    if dtype != "auto":
        return dtype
    try:
        from bincompress.distillation.places import fastest_products
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return "float32"  # the API says what is missing
    return fastest_products(device)
