"""bincompress run"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bincompress.commands.options import engine_options, load_with, lookup_option, sampling_options, settings_from
from bincompress.commands.out_file import OutFile
from bincompress.commands.shared import decoding_announced


@click.command()
@click.argument("store")
@click.argument("prompts", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True))
@click.option("--out", required=True, type=OutFile(), help="File of answers, JSON lines.")
@click.option(
    "--parallel", type=click.IntRange(1, 256), default=4, show_default=True, help="Texts that are written at once."
)
@click.option("--context", type=click.IntRange(min=2), default=8192, show_default=True, help="Most tokens of a text.")
@sampling_options
@lookup_option
@engine_options
def command(store: str, prompts: Path, out: Path, parallel: int, context: int, **options: Any) -> None:
    """Answer every line of PROMPTS (- is standard input) with the model in STORE, several at once.

    A line is a JSON object with "prompt" (a text) or "messages" (a chat), and may have "id", "max_tokens",
    "temperature", "top_p", "top_k", "min_p", "seed", "stop" and the penalties for itself, "response_format" for an
    answer in JSON, and with messages "tools" and "tool_choice". Run again, it writes what is left. With --seed each
    line's seed is that plus its number.

    \b
    Example:
      bincompress run ./store prompts.jsonl --out answers.jsonl --max-tokens 200 --temperature 0
    """
    from tqdm import tqdm

    from bincompress.inference.engine import engine_of
    from bincompress.inference.offline import write_answers
    from bincompress.inference.prompts import read_prompts
    from bincompress.inference.scheduler import Limits

    with decoding_announced():
        from bincompress.errors import BincompressError

        if str(out) == "-":
            raise BincompressError("--out -: expected a file, as a run that is interrupted resumes from its answers")
        asked = read_prompts(prompts)
        if str(prompts) != "-" and out.exists() and out.samefile(prompts):
            raise BincompressError(f"--out {out}: is the file of prompts; give another one")
        model = load_with(store, options)
        engine = engine_of(store, int(options["activation_bits"]), options["activation_scale"], int(options["kv_bits"]))
        limits = Limits(parallel, 2 * parallel, context)
        settings = replace(settings_from(model, options), context=min(context, model.decoder.config.context))
        with tqdm(desc="run", unit="answer", total=len(asked), disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.update(done - bar.n)

            written, failed = write_answers(model, asked, out, settings, limits, engine, progress)
    click.echo(f"{out}: {written} answers written, {len(asked) - written} were there, {failed} failed", err=True)
    if failed:
        sys.exit(1)
