"""bincompress generate"""

import time
from pathlib import Path
from typing import Any

import click

from bincompress.commands.options import engine_options, load_with, lookup_option, sampling_options, settings_from
from bincompress.commands.prompt_cache import PromptCacheFile, prefixes_of, prompt_cache_option
from bincompress.commands.shared import decoding_announced, print_json
from bincompress.process.streams import read_input


@click.command()
@click.argument("store")
@click.argument("prompt")
@sampling_options
@lookup_option
@engine_options
@click.option(
    "--json-schema",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with a JSON schema, which the text is held to.",
)
@prompt_cache_option
@click.option("--json", "as_json", is_flag=True, help="Print text, token counts and times as JSON.")
def command(
    store: str, prompt: str, json_schema: Path | None, prompt_cache: Path | None, as_json: bool, **options: Any
) -> None:
    """Continue PROMPT with the model in STORE, token by token. PROMPT "-" reads standard input.

    \b
    Examples:
      bincompress generate ./store "The scheduler" --max-tokens 60
      bincompress generate ./store "The scheduler" --temperature 0 --threads 1 --json
      bincompress generate ./store "A process as JSON: " --json-schema process.schema.json
    """
    text = read_input("the prompt") if prompt == "-" else prompt
    schema = None
    if json_schema is not None:
        from bincompress.inference.json_schema import read_schema

        schema = read_schema(json_schema)
    begin = time.perf_counter()
    with decoding_announced():
        model = load_with(store, options)
        loaded = time.perf_counter()
        grammar = None if schema is None else model.json_grammar(schema)
        settings = settings_from(model, options)
        prefixes = None if prompt_cache is None else prefixes_of(model)
        kept = PromptCacheFile(prompt_cache, store, model, prefixes, options)
        generation = model.stream(text, settings, grammar, prefixes)
        pieces, first = [], None
        for piece in generation:
            first = first or time.perf_counter()
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
        end = time.perf_counter()
        kept.save()
    if not as_json:
        click.echo()
        return
    sampled = len(generation.tokens)
    print_json(
        {
            "text": "".join(pieces),
            "finish_reason": generation.finish_reason,
            **generation.usage,
            "load_seconds": loaded - begin,
            "first_token_seconds": (first or end) - loaded,
            "tokens_per_second": (sampled - 1) / (end - first) if first and sampled > 1 else None,
            "activation_bits": int(options["activation_bits"]),
            "threads": model.decoder.workers.threads,
        }
    )
