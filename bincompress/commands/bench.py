"""bincompress bench"""

from collections import Counter
from typing import Any

import click

from bincompress.commands.options import engine_options
from bincompress.commands.shared import decoding_announced, print_json


@click.command()
@click.argument("store")
@click.option("--prompt", type=click.IntRange(min=0), default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", type=click.IntRange(min=0), default=64, show_default=True, help="Tokens to write.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each test.")
@engine_options
@click.option("--verbose", "-v", is_flag=True, help="Show which kernel multiplies each tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(store: str, prompt: int, tokens: int, repeats: int, verbose: bool, as_json: bool, **options: Any) -> None:
    """Time the model in STORE: reading a prompt (pp) and writing tokens (tg), tokens per second, mean and spread.

    \b
    Example:
      bincompress bench ./store --threads 2 --prompt 512
    """
    from tqdm import tqdm

    from bincompress.inference.benchmark import measure
    from bincompress.inference.load import load_decoder
    from bincompress.model.cache import cache_type
    from bincompress.model.packed_linear import ActivationSettings

    settings = ActivationSettings(int(options["activation_bits"]), options["activation_scale"])
    with decoding_announced():
        loaded = load_decoder(store, options["threads"], settings, options["kernel"], options["memory"])
        tests = bool(prompt) + bool(tokens)
        with tqdm(total=tests * (repeats + 1), desc="bench", unit="run", disable=True if as_json else None) as bar:

            def on_test(test: str) -> None:
                bar.set_postfix_str(test)
                bar.update()

            speeds = measure(loaded.decoder, prompt, tokens, repeats, on_test, cache_type(int(options["kv_bits"])))
    threads, residents, config = loaded.decoder.workers.threads, loaded.decoder.residents, loaded.decoder.config
    activations = "float32" if settings.bits == 16 else f"{settings.bits} bits per {settings.per}"
    if as_json:
        print_json(
            {
                "store": store, "bytes": loaded.nbytes, "threads": threads, "activations": activations,
                "paths": loaded.paths, "tests": {s.test: {"mean": s.mean, "spread": s.spread} for s in speeds},
                **({} if residents is None else {"experts_chosen": residents.asked, "experts_read": residents.read}),
            }
        )  # fmt: skip
        return
    click.echo(f"| {'store':20s} | {'size':>10s} | threads | activations        | test   | {'t/s':>18s} |")
    click.echo(f"| {'-' * 20} | {'-' * 9}: | ------: | ------------------ | ------ | {'-' * 17}: |")
    for speed in speeds:
        click.echo(
            f"| {store[-20:]:20s} | {loaded.nbytes / 1e6:7.1f} MB | {threads:7d} | {activations:18s} "
            f"| {speed.test:6s} | {speed.mean:9.2f} +- {speed.spread:5.2f} |"
        )
    if residents is not None and config.experts is not None:
        click.echo(residents.line(config.experts.count * sum(config.experts.layers)))
    for path, count in Counter(loaded.paths.values()).most_common():
        click.echo(f"{count} tensors: {path}")
    if verbose:
        for name, path in loaded.paths.items():
            click.echo(f"  {name}: {path}")
