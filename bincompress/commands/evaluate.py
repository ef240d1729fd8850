"""bincompress evaluate"""

from pathlib import Path
from typing import Any

import click

from bincompress.commands.options import engine_options
from bincompress.commands.shared import kernels_announced, print_json


@click.command()
@click.argument("store")
@click.option(
    "--text",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Text that the model was not trained or calibrated on.",
)
@click.option("--context", type=int, help="Tokens per window.  [default: 1024, or the model's limit]")
@click.option("--windows", type=int, help="Use at most this many windows, from the start.  [default: the whole text]")
@click.option(
    "--baseline", metavar="SOURCE", help="The unquantized checkpoint (folder, .gguf file or Hub id) to compare with."
)
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    store: str,
    text: Path,
    context: int | None,
    windows: int | None,
    baseline: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the perplexity of the model in STORE on a text, and compare it with the unquantized model.

    The whole text is tokenized once; consecutive windows are scored, each from its second token. STORE may also be an
    unquantized checkpoint folder or a .gguf file, which runs in float32.

    \b
    Examples:
      bincompress evaluate ./store --text held_out.txt --windows 16
      bincompress evaluate ./store --text held_out.txt --baseline ./Llama-3.2-1B --json
    """
    import numpy as np
    from tqdm import tqdm

    from bincompress.inference.evaluate import evaluate
    from bincompress.inference.load import load_baseline, load_decoder
    from bincompress.model.packed_linear import ActivationSettings
    from bincompress.model.tokenizer import load_tokenizer
    from bincompress.sources.hub import is_checkpoint, open_source
    from bincompress.sources.text import read_text

    content = read_text(text)
    settings = ActivationSettings(int(options["activation_bits"]), options["activation_scale"])
    with kernels_announced():
        if is_checkpoint(store):
            source = open_source(store)
            decoder, assets, activations = load_baseline(source, options["threads"]), source.assets(), "float32"
        else:
            loaded = load_decoder(store, options["threads"], settings, options["kernel"], options["memory"])
            decoder, assets = loaded.decoder, loaded.assets
            activations = "float32" if settings.bits == 16 else f"{settings.bits} bits per {settings.per}"
        other = load_baseline(open_source(baseline), options["threads"]) if baseline else None
        tokens = np.array(load_tokenizer(assets).encode(content), np.int64)
        with tqdm(desc="evaluate", unit="window", disable=True if as_json else None) as bar:

            def on_window(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found = evaluate(decoder, tokens, context, windows, other, on_window)
    if as_json:
        print_json(
            {"store": store, "text": str(text), "activations": activations, "baseline": baseline, **found.as_dict()}
        )
        return
    click.echo(
        f"perplexity {found.perplexity:.4f}  "
        f"({found.tokens:,} tokens scored, {found.windows} windows of {found.context})"
    )
    click.echo(f"activations {activations}")
    if found.baseline_perplexity is not None:
        ratio = found.perplexity / found.baseline_perplexity
        click.echo(f"baseline perplexity {found.baseline_perplexity:.4f}, ratio {ratio:.4f}")
        click.echo(
            f"mean KL divergence {found.kl_divergence:.5f} nats, "
            f"top-1 agreement {100 * (found.top1_agreement or 0):.2f}%"
        )
