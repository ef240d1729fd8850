"""What do the prompts of a file ask of this model? Messages, the form of the answers, tools that these may call."""

from dataclasses import dataclass
from typing import Any

from bincompress.errors import BincompressError
from bincompress.inference.constraint import Grammar, Grammars
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.messages import messages_of
from bincompress.inference.offered_tools import Tools, tools_of
from bincompress.inference.prompts import Prompt, PromptFileError
from bincompress.inference.request_fields import Fields
from bincompress.inference.response_format import response_format
from bincompress.inference.sequence import Request
from bincompress.model.errors import TemplateError


@dataclass(frozen=True)
class PromptRequest:
    """One prompt, as this model is asked it."""

    messages: list[dict[str, Any]] | None
    tools: Tools | None
    form: str | None  # a grammar


class PromptRequests:
    """What each prompt asks, by its line; a grammar is compiled once for all that have it."""

    def __init__(self, model: Model, prompts: list[Prompt]) -> None:
        """Read them all. Raises PromptFileError naming the line that asks what this model or program cannot do."""
        self._model = model
        self._grammars = Grammars(model.tokenizer, model.decoder.config.vocab)
        self._asked: dict[int, PromptRequest] = {}
        for prompt in prompts:
            try:
                self._asked[prompt.line] = _asked(model, prompt)
            except BincompressError as error:
                raise _refused(prompt, error) from None

    def compile(self, prompts: list[Prompt]) -> None:
        """Compile the grammars of these prompts; raises PromptFileError naming the first line whose cannot be."""
        compiled: set[str] = set()
        for prompt in prompts:
            form = self._asked[prompt.line].form
            if form is None or form in compiled:
                continue
            compiled.add(form)
            try:
                self._grammars.compiled(form)
            except BincompressError as error:
                raise _refused(prompt, error) from None

    def request(self, prompt: Prompt, settings: GenerationSettings) -> Request:
        """Return the text to be written for a prompt; raises BincompressError where it cannot be made tokens."""
        asked = self._asked[prompt.line]
        grammar: Grammar | None = None if asked.form is None else self._grammars.compiled(asked.form)
        shown = frozenset() if asked.tools is None else asked.tools.marks
        return Request(tuple(_tokens(self._model, prompt, asked)), settings, grammar=grammar, shown=shown)

    def answer(self, prompt: Prompt, text: str, reason: str | None) -> dict[str, Any]:
        """Return a text as an answer: without its calls, which stand beside it, and why it ended."""
        tools = self._asked[prompt.line].tools
        if tools is None:
            return {"text": text, "finish_reason": reason}
        given, calls = tools.reader().whole(text)
        if not calls:
            return {"text": given, "finish_reason": reason}
        found = [call.as_object() for call in calls]
        return {"text": given, "tool_calls": found, "finish_reason": "tool_calls" if reason == "stop" else reason}


def _asked(model: Model, prompt: Prompt) -> PromptRequest:
    fields = Fields({**prompt.form, "messages": prompt.messages})
    messages = None if prompt.messages is None else messages_of(fields, model.template)
    tools, form = tools_of(fields, model), response_format(fields)
    if form is not None and tools is not None:
        fields.refuse("response_format", "a form and tools cannot be asked for together; expected one of the two")
    fields.finish()
    return PromptRequest(messages, tools, form if tools is None else tools.grammar)


def _refused(prompt: Prompt, error: BincompressError) -> PromptFileError:
    return PromptFileError(f"line {prompt.line} of the prompts: {error}")


def _tokens(model: Model, prompt: Prompt, asked: PromptRequest) -> list[int]:
    if asked.messages is None:
        ids = model.tokenizer.encode(prompt.text or "")
        return ids or ([] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id])
    if model.template is None:
        raise TemplateError("the model has no chat template; give a prompt in place of messages")
    tools = None if asked.tools is None else asked.tools.given
    return model.tokenizer.encode(model.template.render(asked.messages, tools), special=False)
