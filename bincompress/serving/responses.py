"""OpenAI's /v1/responses: asked and answered as a chat is; what the server would have to remember is refused."""

import json
import secrets
import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bincompress.inference.request_fields import FieldError, Fields, shown
from bincompress.inference.sequence import Ended, Piece, PromptRead
from bincompress.serving.asking import Asked
from bincompress.serving.bodies import in_thread, read_json
from bincompress.serving.forms import in_form
from bincompress.serving.openai_answering import error_body
from bincompress.serving.openai_asking import chat
from bincompress.serving.reading import RequestError
from bincompress.serving.service import Service
from bincompress.serving.texts import of_request, refused, respond

_PARTS = ("input_text", "output_text")
# What a chat calls alike.
_SAME = ("model", "stream", "temperature", "top_p", "user", "chat_template_kwargs")
# What is called differently there, the longest names first.
_NAMES = {
    "response_format.json_schema": "text.format", "response_format": "text.format", "messages": "input",
    "max_completion_tokens": "max_output_tokens", "max_tokens": "max_output_tokens",
}  # fmt: skip


async def responses(request: HttpRequest) -> Response:
    """Answer a conversation, in the form of /v1/responses."""
    service: Service = of_request(request)
    scheduler = service.ready()
    fields = await read_json(request, service)
    asked, echoed = await in_thread(service, _asked, fields, service)
    requests = await in_form(request, service, asked.requests, asked.form)
    answer = _Answer(service, asked, echoed)
    return await respond(request, scheduler, requests, answer, "text/event-stream" if asked.stream else None)


def _asked(fields: Fields, service: Service) -> tuple[Asked, dict[str, Any]]:
    """Return what is asked, and what the answer repeats of it."""
    instructions = fields.take("instructions", str)
    messages = _messages(fields)
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    told: dict[str, Any] = {"messages": messages}
    most = fields.number("max_output_tokens", 1, service.ready().limits.context, whole=True)
    if most is not None:
        told["max_completion_tokens"] = most
    form = _form(fields)
    if form is not None:
        told["response_format"] = form
    metadata = fields.take("metadata", dict) or {}  # says nothing to the model, and is given back
    # Nothing is kept, so that no later request can refer to this one; clients that do not say it do not ask for it.
    fields.neutral("store", False)
    for name, *neutral in (
        ("tools", []), ("tool_choice", "auto", "none"), ("parallel_tool_calls", True, False),
        ("truncation", "disabled"), ("background", False), ("include", []), ("service_tier", "auto", "default"),
    ):  # fmt: skip
        fields.neutral(str(name), *neutral)
    told |= {name: value for name in _SAME if (value := fields.take(name, str, bool, int, float, dict)) is not None}
    fields.finish()
    echoed = {"instructions": instructions, "max_output_tokens": most, "metadata": metadata}
    try:
        return chat(Fields(told), service), echoed
    except (FieldError, RequestError) as error:
        for name, own in _NAMES.items():
            if error.param is not None and error.message.startswith(name):
                found = refused(error)
                message, param = own + error.message[len(name) :], error.param.replace(name, own, 1)
                raise RequestError(found.status, message, param, found.retry_after) from None
        raise


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """Return the input as messages of a chat."""
    given = fields.take("input", str, list)
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given:
        fields.refuse("input", "expected a text, or at least one message")
    return [_message(each, f"input[{number}].") for number, each in enumerate(given)]


def _message(given: Any, place: str) -> dict[str, Any]:
    own = Fields(given if isinstance(given, dict) else {}, place)
    kind = own.take("type", str)
    if kind not in (None, "message") or not isinstance(given, dict):
        own.refuse("type", f"expected a message, found {shown(kind if isinstance(given, dict) else given)}")
    role, content = own.take("role", str), own.take("content", str, list)
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        own.refuse("role", f"expected system, developer, user or assistant, found {shown(role)}")
    own.take("id", str)  # of a message of an earlier answer: whose it is changes nothing
    own.neutral("status", "completed", "incomplete")
    own.finish()
    if content is None:
        own.refuse("content", "expected a text")
    if isinstance(content, str):
        return {"role": role, "content": content}
    return {"role": role, "content": "".join(_part(each, f"{place}content[{n}].") for n, each in enumerate(content))}


def _part(given: Any, place: str) -> str:
    own = Fields(given if isinstance(given, dict) else {}, place)
    kind, text = own.take("type", str), own.take("text", str)
    if kind not in _PARTS or text is None:
        own.refuse("type", f"expected {' or '.join(_PARTS)} with a text, found {shown(kind)}")
    own.neutral("annotations", [])
    own.neutral("logprobs", [])
    own.finish()
    return str(text)


def _form(fields: Fields) -> dict[str, Any] | None:
    """Return `text.format` as a chat's `response_format`."""
    text = Fields(fields.take("text", dict) or {}, "text.")
    form = text.take("format", dict)
    text.finish()
    if form is None or form.get("type") != "json_schema":
        return None if form is None else dict(form)
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


class _Answer:
    """One answer that is being made."""

    def __init__(self, service: Service, asked: Asked, echoed: dict[str, Any]) -> None:
        self._service, self._asked = service, asked
        self._id, self._item = f"resp_{secrets.token_hex(16)}", f"msg_{secrets.token_hex(16)}"
        sampling = asked.requests[0].settings.sampling
        self._head = {
            "id": self._id, "object": "response", "created_at": int(time.time()), "model": service.settings.model_name,
            **echoed, "temperature": sampling.temperature, "top_p": sampling.top_p, "tools": [], "tool_choice": "auto",
            "parallel_tool_calls": True, "store": False, "error": None,
        }  # fmt: skip
        self._place = {"output_index": 0, "content_index": 0, "item_id": self._item}
        self._begin = time.monotonic()
        self._reason: str | None = None
        self._reused = self.sampled = self._number = 0
        self.written: list[list[str]] = [[]]

    @property
    def prompt(self) -> str:
        """The prompt, as the model reads it, for the log."""
        return self._service.model.tokenizer.decode(self._asked.requests[0].prompt, False)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, for the log."""
        return {"prompt_tokens": len(self._asked.requests[0].prompt), "completion_tokens": self.sampled}

    def begin(self) -> bytes:
        """Return the events that a stream begins with."""
        begun = {**self._head, "status": "in_progress", "output": [], "incomplete_details": None, "usage": None}
        return b"".join((
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=self._message("in_progress")),
            self._event("response.content_part.added", **self._place, part=_text("")),
        ))  # fmt: skip

    def note(self, number: int, event: PromptRead | Piece | Ended) -> None:
        """Note what is told of the text."""
        metrics = self._service.metrics
        if isinstance(event, PromptRead):
            self._reused = event.reused
        elif isinstance(event, Piece):
            if not self.written[0]:
                metrics.first_token.observe(time.monotonic() - self._begin)
            self.written[0].append(event.text)
        else:
            self.sampled, self._reason = event.sampled, event.reason
            metrics.seconds.observe(time.monotonic() - self._begin)

    def chunk(self, number: int, event: PromptRead | Piece | Ended) -> bytes:
        """Return the event of a stream that gives text, if there is any."""
        if not isinstance(event, Piece) or not event.text:
            return b""
        return self._event("response.output_text.delta", **self._place, delta=event.text, logprobs=[])

    def end(self) -> bytes:
        """Return the events that a stream ends with."""
        ended = self.complete()
        text, status = "".join(self.written[0]), ended["status"]
        return b"".join((
            self._event("response.output_text.done", **self._place, text=text, logprobs=[]),
            self._event("response.content_part.done", **self._place, part=_text(text)),
            self._event("response.output_item.done", output_index=0, item=self._message(status, text)),
            self._event(f"response.{status}", response=ended),
        ))  # fmt: skip

    def failed(self, error: RequestError) -> bytes:
        """Return the event that tells of an error."""
        told = error_body(error)["error"]
        return self._event("error", code=told["type"], message=told["message"], param=told["param"])

    def complete(self) -> dict[str, Any]:
        """Return the answer as a whole."""
        status = "incomplete" if self._reason == "length" else "completed"
        read = len(self._asked.requests[0].prompt)
        return {
            **self._head, "status": status, "output": [self._message(status, "".join(self.written[0]))],
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": read, "input_tokens_details": {"cached_tokens": self._reused},
                "output_tokens": self.sampled, "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": read + self.sampled,
            },
        }  # fmt: skip

    def _message(self, status: str, text: str | None = None) -> dict[str, Any]:
        content = [] if text is None else [_text(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, kind: str, **told: Any) -> bytes:
        found = {"type": kind, "sequence_number": self._number, **told}
        self._number += 1
        written = json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        return f"event: {kind}\n".encode() + b"data: " + written + b"\n\n"


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
