"""bincompress serve"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bincompress.commands.options import engine_options, load_with, lookup_option
from bincompress.commands.running import Size
from bincompress.commands.shared import decoding_announced
from bincompress.errors import BincompressError

if TYPE_CHECKING:
    from bincompress.inference.generate import Model
    from bincompress.serving.service import Service

_CONTEXT = 8192
_PREFIX_BYTES = 10**9


@click.command()
@click.argument("store")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port. 0: any free one.")
@click.option("--api-key-file", type=click.Path(dir_okay=False, path_type=Path), help="File of API keys, one a line.")
@click.option("--insecure", is_flag=True, help="Let other machines in without an API key.")
@click.option("--allowed-host", multiple=True, help="Name by which this machine may be asked, beside localhost.")
@click.option("--model-name", help="Name of the model for clients.  [default: the store's]")
@click.option(
    "--parallel", type=click.IntRange(1, 256), default=4, show_default=True, help="Texts that are written at once."
)
@click.option(
    "--queue", type=click.IntRange(min=0), default=64, show_default=True, help="Texts that may wait beyond them."
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Most tokens of a prompt and its answer.  [default: 8192, or the model's limit where that is less]",
)
@click.option(
    "--prefix-cache",
    type=Size(),
    help="Memory for beginnings of earlier texts.  [default: 1GB, or a quarter of what is free where that is less]",
)
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=600, show_default=True, help="Most seconds of a request."
)
@click.option("--log-prompts", is_flag=True, help="Write prompts and answers to the log.")
@lookup_option
@engine_options
def command(store: str, **options: Any) -> None:
    """Serve the model in STORE over HTTP, in the forms of OpenAI and Ollama, with a page to chat on.

    \b
    Examples:
      bincompress serve ./store
      bincompress serve ./store --host 0.0.0.0 --api-key-file keys.txt --parallel 8
    """
    try:
        from bincompress.serving.run import serve
        from bincompress.serving.settings import ServeSettings, read_keys
    except ModuleNotFoundError as error:
        if error.name not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        raise BincompressError(
            f"serve needs {error.name}, which is not installed: pip install 'bincompress[serve]'"
        ) from None
    from bincompress.inference.scheduler import Limits
    from bincompress.process.machine import free_memory

    keys = read_keys(options["api_key_file"]) if options["api_key_file"] else ()
    settings = ServeSettings(
        options["host"], options["port"], options["model_name"] or store.rstrip("/").rsplit("/", 1)[-1] or "model",
        keys, options["insecure"], options["allowed_host"], options["timeout"], log_prompts=options["log_prompts"],
    )  # fmt: skip
    prefix_bytes = options["prefix_cache"]
    if prefix_bytes is None:
        prefix_bytes = min(_PREFIX_BYTES, free_memory()[0] // 4)
    limits = Limits(options["parallel"], options["queue"], options["context"] or _CONTEXT, prefix_bytes)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("bincompress.serve").setLevel(logging.INFO)
    with decoding_announced():
        serve(
            settings,
            limits,
            lambda service: _load(service, store, options),
            lambda address: click.echo(f"listening on {address}; Ctrl-C ends it", err=True),
        )


def _load(service: "Service", store: str, options: dict[str, Any]) -> "Model":
    from bincompress.serving.loading import check_fits, facts_of

    model: Model = load_with(store, options)
    check_fits(store, model, service.limits, options["context"])
    service.facts = facts_of(store, model)
    return model
