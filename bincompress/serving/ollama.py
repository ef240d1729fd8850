"""Ollama's interface: what its clients need to chat with the model, to continue a text, and to see its model."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from bincompress import __version__
from bincompress.errors import BincompressError
from bincompress.inference.messages import messages_of
from bincompress.inference.offered_tools import Tools, tools_of
from bincompress.inference.request_fields import Fields, shown
from bincompress.inference.response_format import ollama_format
from bincompress.inference.sequence import Ended, Piece, PromptRead, Request
from bincompress.inference.tool_calls import ToolCall
from bincompress.serving.asking import check_model, lengths_of, request_for, sampling_of, stops_of
from bincompress.serving.bodies import in_thread, read_json
from bincompress.serving.forms import in_form
from bincompress.serving.openai_asking import rendered
from bincompress.serving.reading import RequestError
from bincompress.serving.service import Service
from bincompress.serving.texts import of_request, refused, respond

_DURATION = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?(ns|us|µs|ms|s|m|h)){1,8}|[+-]?[0-9]{1,18}")
_NAMES = {"repetition_penalty": "repeat_penalty"}


@dataclass(frozen=True)
class _Asked:
    request: Request
    stream: bool
    is_chat: bool
    began: int  # time.monotonic_ns()
    form: str | None = None  # a grammar, which the text is held to
    tools: Tools | None = None


async def chat(request: HttpRequest) -> Response:
    """Answer POST /api/chat."""
    return await _answer(request, True)


async def generate(request: HttpRequest) -> Response:
    """Answer POST /api/generate."""
    return await _answer(request, False)


async def tags(request: HttpRequest) -> Response:
    """Answer GET /api/tags: the one model that is served."""
    service: Service = of_request(request)
    modified = datetime.fromtimestamp(service.created, UTC).isoformat()
    name = _tagged(service)
    entry = {"name": name, "model": name, "modified_at": modified, "size": service.facts.get("bytes", 0), "digest": ""}
    details = {"format": "bincompress", "family": service.facts.get("family", ""), "parameter_size": "",
               "quantization_level": service.facts.get("bits", "")}  # fmt: skip
    return JSONResponse({"models": [{**entry, "details": details}]})


async def version(request: HttpRequest) -> Response:
    """Answer GET /api/version."""
    return JSONResponse({"version": __version__})


def _tagged(service: Service) -> str:
    name = service.settings.model_name
    return name if ":" in name else f"{name}:latest"


async def _answer(http: HttpRequest, is_chat: bool) -> Response:
    service: Service = of_request(http)
    scheduler = service.ready()
    began = time.monotonic_ns()
    fields = await read_json(http, service)
    asked = await in_thread(service, _asked, fields, service, is_chat, began)
    requests = await in_form(http, service, [asked.request], asked.form)
    return await respond(
        http, scheduler, requests, _Answer(service, asked), "application/x-ndjson" if asked.stream else None
    )


def _asked(fields: Fields, service: Service, is_chat: bool, began: int) -> _Asked:
    check_model(fields, service, _tagged(service))
    stream = fields.take("stream", bool)
    options = Fields(fields.take("options", dict) or {}, "options.")
    sampling = sampling_of(options, service.model.defaults.sampling, _NAMES)
    stop = stops_of(options)
    most = lengths_of(options, "num_predict", least=-2)
    context = options.number("num_ctx", 1, service.ready().limits.context, whole=True)
    options.finish()
    tools = tools_of(fields, service.model) if is_chat else None
    ids = _chat_ids(fields, service, tools) if is_chat else _prompt_ids(fields, service)
    form = ollama_format(fields)
    if form is not None and tools is not None:
        fields.refuse("format", "a form and tools cannot be asked for together; expected one of the two")
    fields.neutral("images", [])
    _check_kept(fields)
    fields.neutral("logprobs", False)
    fields.neutral("top_logprobs", 0)
    fields.finish()
    if most == 0:
        options.refuse("num_predict", "expected at least 1, or -1 for as many as fit")
    request = request_for(service, ids, sampling, stop, most if most is not None and most > 0 else None,
                          shown=frozenset() if tools is None else tools.marks)  # fmt: skip
    if context is not None and context <= len(ids):
        options.refuse("num_ctx", f"the prompt has {len(ids):,} tokens; expected more than that")
    if context is not None:
        request = replace(request, settings=replace(request.settings, context=context))
    return _Asked(request, stream is not False, is_chat, began, form if tools is None else tools.grammar, tools)


def _check_kept(fields: Fields) -> None:
    """Refuse that the model is dropped at once; another time says what its clients always send, and changes nothing."""
    kept = fields.take("keep_alive", str, int, float)
    if isinstance(kept, str) and not _DURATION.fullmatch(kept):
        fields.refuse("keep_alive", f"expected a time such as '5m', found {shown(kept)}")
    if kept == 0 or (isinstance(kept, str) and not re.search("[1-9]", kept)):
        fields.refuse("keep_alive", f"{shown(kept)}: the model stays loaded as long as the server runs")


def _variables(fields: Fields, service: Service, raw: bool = False) -> dict[str, Any]:
    think, template = fields.take("think", bool), service.model.template
    if think and (raw or template is None or not template.takes("enable_thinking")):
        fields.refuse("think", "true is not supported: no template with enable_thinking is used; expected false")
    return {} if think is None else {"enable_thinking": think}


def _chat_ids(fields: Fields, service: Service, tools: Tools | None) -> list[int]:
    messages = messages_of(_without_empty(fields), service.model.template)
    return rendered(service, messages, _variables(fields, service), tools)


def _without_empty(fields: Fields) -> Fields:
    """Return the messages without what Ollama's clients send to say that there is nothing of a kind."""
    messages = fields.take("messages", list) or []
    found = []
    for message in messages:
        kept = message
        if isinstance(message, dict):
            kept = {name: value for name, value in message.items() if value not in ([], None)}
            if "thinking" in kept and "reasoning_content" not in kept:
                kept["reasoning_content"] = kept.pop("thinking")
        found.append(kept)
    return Fields({"messages": found})


def _prompt_ids(fields: Fields, service: Service) -> list[int]:
    prompt, system, raw = fields.take("prompt", str), fields.take("system", str), fields.take("raw", bool)
    variables = _variables(fields, service, bool(raw))
    fields.neutral("suffix", "")
    fields.neutral("template", "")
    fields.neutral("context", [])
    if not prompt:
        fields.refuse("prompt", "expected a text")
    if raw or service.model.template is None:
        if system:
            fields.refuse("system", "expected none with a raw prompt or a model without a chat template")
        try:
            return service.model.tokenizer.encode(prompt)
        except BincompressError as error:
            raise refused(error) from error
    messages = [{"role": "system", "content": system}] if system else []
    return rendered(service, [*messages, {"role": "user", "content": prompt}], variables)


class _Answer:
    """One answer that is being made."""

    def __init__(self, service: Service, asked: _Asked) -> None:
        self._service = service
        self._asked = asked
        self._read = asked.began
        self.sampled = 0
        self.written: list[list[str]] = [[]]  # for the log
        self._reader = None if asked.tools is None else asked.tools.reader()
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._last: dict[str, Any] | None = None  # line

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt."""
        return {"prompt_tokens": len(self._asked.request.prompt)}

    @property
    def prompt(self) -> str:
        """The prompt, as the model reads it, for the log."""
        return self._service.model.tokenizer.decode(self._asked.request.prompt, False)

    def note(self, number: int, event: PromptRead | Piece | Ended) -> None:
        """Note what is told of the text, as the line that says it."""
        self._last = self._line(event)

    def chunk(self, number: int, event: PromptRead | Piece | Ended) -> bytes:
        """Return a line of JSON, if there is anything to say."""
        return b"" if self._last is None else _encoded(self._last)

    def begin(self) -> bytes:
        """Return what a stream begins with: nothing."""
        return b""

    def end(self) -> bytes:
        """Return what a stream ends with: nothing more than its last line."""
        return b""

    def failed(self, error: RequestError) -> bytes:
        """Return the line that tells of an error."""
        return _encoded({"error": error.message})

    def complete(self) -> dict[str, Any]:
        """Return the answer as a whole."""
        return {**(self._last or {}), **self._part("".join(self._content), self._calls)}

    def _part(self, text: str, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        if not self._asked.is_chat:
            return {"response": text}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            made = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
            message["tool_calls"] = [{"function": function} for function in made]
        return {"message": message}

    def _told(self, text: str, is_last: bool) -> dict[str, Any]:
        """Return a line's part for text that has come, and for what was held back until the end."""
        calls: list[ToolCall] = []
        if self._reader is not None:
            text, calls = self._reader.finish() if is_last else self._reader.push(text)
        self._content.append(text)
        self._calls += calls
        return self._part(text, calls)

    def _line(self, event: PromptRead | Piece | Ended) -> dict[str, Any] | None:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        head = {"model": _tagged(self._service), "created_at": now}
        if isinstance(event, PromptRead):
            self._read = time.monotonic_ns()
            return None
        if isinstance(event, Piece):
            if not self.written[0]:
                self._service.metrics.first_token.observe((time.monotonic_ns() - self._asked.began) / 1e9)
            self.written[0].append(event.text)
            return {**head, **self._told(event.text, False), "done": False}
        end = time.monotonic_ns()
        self._service.metrics.seconds.observe((end - self._asked.began) / 1e9)
        self.sampled = event.sampled
        times = {
            "total_duration": end - self._asked.began,
            "load_duration": 0,
            "prompt_eval_count": len(self._asked.request.prompt),
            "prompt_eval_duration": self._read - self._asked.began,
            "eval_count": event.sampled,
            "eval_duration": end - self._read,
        }
        return {**head, **self._told("", True), "done": True, "done_reason": event.reason, **times}


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
