"""bincompress chat"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bincompress.commands.options import engine_options, load_with, lookup_option, sampling_options, settings_from
from bincompress.commands.prompt_cache import PromptCacheFile, prompt_cache_option
from bincompress.commands.shared import decoding_announced
from bincompress.errors import BincompressError
from bincompress.process.interrupts import Terminated
from bincompress.process.streams import read_line

if TYPE_CHECKING:
    from bincompress.inference.conversation import Conversation

_TERMINAL_LINE = 4095  # bytes, after which a terminal drops what is typed or pasted into a line


@click.command()
@click.argument("store")
@click.option("--system", help="System message at the start of the conversation.")
@prompt_cache_option
@sampling_options
@lookup_option
@engine_options
def command(store: str, system: str | None, prompt_cache: Path | None, **options: Any) -> None:
    """Chat with the model in STORE, using its own chat template. An empty line or Ctrl-D ends it, Ctrl-C an answer.

    When the conversation outgrows the model's context, its oldest turns are left out.

    \b
    Example:
      bincompress chat ./store --temperature 0.7
    """
    from bincompress.model.errors import TemplateError

    with decoding_announced():
        from bincompress.inference.conversation import Conversation

        model = load_with(store, options)
        if model.template is None:
            raise TemplateError(
                f"{store}: the model has no chat template; `bincompress generate` continues a text instead"
            )
        talk = Conversation(model, settings_from(model, options), system)
        kept = PromptCacheFile(prompt_cache, store, model, talk.prefixes, options)
        while True:
            try:
                asked = _ask()
            except BincompressError as error:  # of this line alone
                if sys.stdin is None:
                    raise
                _note(str(error))
                continue
            if not asked:
                break
            _answer(talk, asked)
        kept.save()


def _ask() -> str:
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        click.echo("> ", nl=False)
    line = read_line("the question")
    if terminal and len(line.encode("utf-8", "replace")) >= _TERMINAL_LINE:
        _note(f"the terminal cuts lines at {_TERMINAL_LINE:,} bytes; longer ones can be piped in (chat STORE < file)")
    return line.strip()


def _answer(talk: Conversation, asked: str) -> None:
    """Write the answer as it comes; a question that cannot be asked, or an interrupt, does not end the chat."""
    from bincompress.model.errors import PromptError

    pieces: list[str] = []
    left_out = talk.left_out
    try:
        generation = talk.ask(asked)
        if talk.left_out and not left_out:
            _note(f"the conversation outgrows the context of {talk.context:,} tokens: its oldest turns are left out")
        for piece in generation:
            pieces.append(piece)
            click.echo(piece, nl=False)
        click.echo()
        if generation.finish_reason == "length" and generation.prompt_tokens + generation.limit >= talk.context:
            _note(f"the context of {talk.context:,} tokens is full; the answer ends here")
    except PromptError as error:
        _note(f"{error}; this question is left out")
    except KeyboardInterrupt as error:
        if isinstance(error, Terminated) or not sys.stdin.isatty():
            raise
        click.echo()
        _note("the answer was stopped; Ctrl-C again, Ctrl-D or an empty line ends the chat")
    talk.answered("".join(pieces))


def _note(text: str) -> None:
    click.echo(f"note: {text}", err=True)
