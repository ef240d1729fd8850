"""bincompress chat"""

import sys
from typing import Any

import click

from bincompress.commands.options import engine_options, load_with, sampling_options, settings_from
from bincompress.commands.shared import decoding_announced


@click.command()
@click.argument("store")
@click.option("--system", help="System message at the start of the conversation.")
@sampling_options
@engine_options
def command(store: str, system: str | None, **options: Any) -> None:
    """Chat with the model in STORE, using its own chat template. An empty line or Ctrl-D ends the chat.

    \b
    Example:
      bincompress chat ./store --temperature 0.7
    """
    from bincompress.model.errors import TemplateError

    with decoding_announced():
        model = load_with(store, options)
        if model.template is None:
            raise TemplateError(
                f"{store}: the model has no chat template; `bincompress generate` continues a text instead"
            )
        settings = settings_from(model, options)
        messages = [{"role": "system", "content": system}] if system else []
        while True:
            asked = _ask()
            if not asked:
                return
            messages.append({"role": "user", "content": asked})
            answer = []
            for piece in model.chat(messages, settings):
                answer.append(piece)
                click.echo(piece, nl=False)
            click.echo()
            messages.append({"role": "assistant", "content": "".join(answer)})


def _ask() -> str:
    if sys.stdin.isatty():
        click.echo("> ", nl=False)
    return sys.stdin.readline().strip()
