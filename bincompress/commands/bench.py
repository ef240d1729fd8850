"""bincompress bench"""

from collections import Counter
from typing import Any

import click

from bincompress.commands.benched import FORMATS, Bench, print_bench
from bincompress.commands.options import engine_options
from bincompress.commands.shared import decoding_announced

# Bytes of the read test: more than a CPU's caches hold, and not more than a small board can spare.
_LEAST_READ, _MOST_READ = 64 << 20, 256 << 20


@click.command()
@click.argument("store")
@click.option("--prompt", type=click.IntRange(min=0), default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", type=click.IntRange(min=0), default=64, show_default=True, help="Tokens to write.")
@click.option("--depth", type=click.IntRange(min=0), default=0, show_default=True, help="Tokens that come before both.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each test.")
@engine_options
@click.option("--verbose", "-v", is_flag=True, help="Show which kernel multiplies each tensor.")
@click.option("--format", "form", type=click.Choice(FORMATS), help="What is printed.  [default: md]")
@click.option("--json", "as_json", is_flag=True, help="As --format json.")
def command(
    store: str, prompt: int, tokens: int, depth: int, repeats: int, verbose: bool, form: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Time the model in STORE: reading a prompt (pp) and writing tokens (tg), tokens per second, mean and spread.

    Of writing also the bytes of weights that are read a second, and what share of this machine's read bandwidth weights
    and cache together are; the bandwidth is measured with the same threads.

    \b
    Examples:
      bincompress bench ./store --threads 2 --prompt 512
      bincompress bench ./store --depth 4096 --format jsonl
    """
    from tqdm import tqdm

    from bincompress.errors import BincompressError
    from bincompress.inference.benchmark import measure
    from bincompress.inference.load import load_decoder
    from bincompress.model.cache import cache_type
    from bincompress.model.packed_linear import ActivationSettings
    from cpu_kernels.reading import read_bandwidth

    if as_json and form not in (None, "json"):
        raise BincompressError(f"--json is --format json, and --format {form} is given; leave out one of them")
    form = "json" if as_json else form or "md"
    settings = ActivationSettings(int(options["activation_bits"]), options["activation_scale"])
    kind = cache_type(int(options["kv_bits"]))
    with decoding_announced():
        loaded = load_decoder(store, options["threads"], settings, options["kernel"], options["memory"])
        tests = bool(prompt) + bool(tokens)
        hidden = True if form != "md" else None
        with tqdm(total=tests * (repeats + 1), desc="bench", unit="run", disable=hidden) as bar:

            def on_test(test: str) -> None:
                bar.set_postfix_str(test)
                bar.update()

            speeds = measure(loaded.decoder, prompt, tokens, repeats, on_test, kind, depth)
        # As much as a token reads.
        size = min(max(loaded.nbytes, _LEAST_READ), _MOST_READ)
        bandwidth = read_bandwidth(loaded.decoder.workers, size) if tokens else None
    activations = "float32" if settings.bits == 16 else f"{settings.bits} bits per {settings.per}"
    print_bench(Bench(store, loaded, activations, kind, bandwidth, speeds), form)
    if form != "md":
        return
    for path, count in Counter(loaded.paths.values()).most_common():
        click.echo(f"{count} tensors: {path}")
    if verbose:
        for name, path in loaded.paths.items():
            click.echo(f"  {name}: {path}")
