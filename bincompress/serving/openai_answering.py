"""Answers in OpenAI's form, whole or in chunks of server-sent events."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from bincompress.inference.logprobs import TokenLogprob
from bincompress.inference.sequence import Ended, Piece, PromptRead
from bincompress.inference.tool_calls import CallReader, ToolCall
from bincompress.model.tokenizer import Tokenizer
from bincompress.serving.asking import Asked
from bincompress.serving.reading import RequestError
from bincompress.serving.service import Service
from bincompress.serving.text_offsets import TextOffsets


class Chat:
    """The form of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, asked: Asked) -> None:
        self._tokenizer = service.model.tokenizer
        self._tools = asked.tools
        self._readers: dict[int, CallReader] = {}

    def logprobs(self, number: int, tokens: Sequence[TokenLogprob], prompt: bool = False) -> Any:
        """Return the log probabilities of tokens."""
        content = [
            {**self._token(each.token, each.logprob), "top_logprobs": [self._token(*other) for other in each.top]}
            for each in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        written = self._tokenizer.token_bytes(token)
        return {"token": written.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(written)}

    def end_tokens(self, ended: Ended) -> tuple[TokenLogprob, ...]:
        """Return none: the tokens of a message are those of its text."""
        return ()

    def opening(self, number: int) -> dict[str, Any]:
        """Return what a stream begins a choice with."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, number: int, text: str) -> dict[str, Any]:
        """Return a choice's part of a chunk."""
        return self._delta(number, *self._reader(number).push(text)) if self._tools else _delta(text)

    def last(self, number: int) -> dict[str, Any]:
        """Return what a choice holds back until its end."""
        return self._delta(number, *self._reader(number).finish()) if self._tools else _delta("")

    def reason(self, number: int, reason: str | None) -> str | None:
        """Return why a choice ended."""
        called = self._tools is not None and self._reader(number).count > 0
        return "tool_calls" if called and reason == "stop" else reason

    def complete(self, number: int, text: str) -> dict[str, Any]:
        """Return a choice as a whole."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._tools is not None:
            given, calls = self._reader(number).whole(text)
            message["content"] = given or (None if calls else "")
            if calls:
                message["tool_calls"] = [call.as_object() for call in calls]
        return {"message": message}

    def _delta(self, number: int, text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        found = _delta(text)
        if calls:
            first = self._reader(number).count - len(calls)
            found["delta"]["tool_calls"] = [{"index": first + at, **call.as_object()} for at, call in enumerate(calls)]
        return found

    def _reader(self, number: int) -> CallReader:
        assert self._tools is not None
        if number not in self._readers:
            self._readers[number] = self._tools.reader()
        return self._readers[number]


def _delta(text: str) -> dict[str, Any]:
    return {"delta": {"content": text} if text else {}}


class Completion:
    """The form of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, asked: Asked) -> None:
        self._tokenizer = service.model.tokenizer
        self._asked = asked
        self._offsets: dict[int, TextOffsets] = {}

    def logprobs(self, number: int, tokens: Sequence[TokenLogprob], prompt: bool = False) -> Any:
        """Return the log probabilities of tokens; with a prompt's come its first token, which has none."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        listed: list[tuple[int, float | None, dict[str, float] | None]] = []
        if prompt:
            listed.append((self._asked.requests[number].prompt[0], None, None))
        for each in tokens:
            top = {_name(self._tokenizer, token): share for token, share in (*each.top, (each.token, each.logprob))}
            listed.append((each.token, each.logprob, top))
        if number not in self._offsets:
            prompt_ids = self._asked.requests[number].prompt
            echoed = self._echoed(number) if self._asked.echo else None
            self._offsets[number] = TextOffsets(self._tokenizer, prompt_ids, echoed)
        for token, logprob, likeliest in listed:
            found["tokens"].append(_name(self._tokenizer, token))
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(likeliest)
            found["text_offset"].append(self._offsets[number].next(token))
        return found

    def end_tokens(self, ended: Ended) -> tuple[TokenLogprob, ...]:
        """Return the end token, which is listed as in OpenAI's interface.

        Clients that score a prompt leave out the last token that is listed: else that would be one of the prompt's.
        """
        return () if ended.end_token is None else (ended.end_token,)

    def opening(self, number: int) -> dict[str, Any]:
        """Return what a stream begins a choice with: the prompt, where it is echoed."""
        return {"text": self._echoed(number)}

    def piece(self, number: int, text: str) -> dict[str, Any]:
        """Return a choice's part of a chunk."""
        return {"text": text}

    def last(self, number: int) -> dict[str, Any]:
        """Return what a choice holds back until its end: nothing."""
        return {"text": ""}

    def reason(self, number: int, reason: str | None) -> str | None:
        """Return why a choice ended."""
        return reason

    def complete(self, number: int, text: str) -> dict[str, Any]:
        """Return a choice as a whole."""
        return {"text": self._echoed(number) + text}

    def _echoed(self, number: int) -> str:
        return self._asked.prompts[number // self._asked.choices] if self._asked.echo else ""


def _name(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text, in OpenAI's notation where it is part of a character."""
    written = tokenizer.token_bytes(token)
    try:
        return written.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


class Answer:
    """One answer that is being made."""

    def __init__(self, form: Chat | Completion, service: Service, asked: Asked) -> None:
        self._form = form
        self._service = service
        self._asked = asked
        self._begin = time.monotonic()
        self._head = {
            "id": f"{form.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        self._reused = 0
        self.sampled = 0
        self.written: list[list[str]] = [[] for _ in asked.requests]  # for the log
        self._first = True
        self._tokens: list[list[TokenLogprob]] = [[] for _ in asked.requests]  # of an answer as a whole
        self._reasons: list[str | None] = [None] * len(asked.requests)

    @property
    def prompt(self) -> str:
        """The prompts, as the model reads them, for the log."""
        tokenizer = self._service.model.tokenizer
        read = [tokenizer.decode(request.prompt, False) for request in self._asked.requests[:: self._asked.choices]]
        return "\n\n".join(read)

    def note(self, number: int, event: PromptRead | Piece | Ended) -> None:
        """Note what is told of one of the texts."""
        metrics = self._service.metrics
        if isinstance(event, PromptRead):
            self._reused += event.reused if number % self._asked.choices == 0 else 0
        elif isinstance(event, Piece):
            if self._first:
                metrics.first_token.observe(time.monotonic() - self._begin)
                self._first = False
            self.written[number].append(event.text)
        else:
            self.sampled += event.sampled
            metrics.seconds.observe(time.monotonic() - self._begin)
            self._reasons[number] = event.reason
        if not self._asked.stream:
            self._tokens[number] += self._form.end_tokens(event) if isinstance(event, Ended) else event.tokens

    def complete(self) -> dict[str, Any]:
        """Return the answer as a whole."""
        choices = [
            {
                "index": number,
                **self._form.complete(number, "".join(self.written[number])),
                "logprobs": self._logprobs(number, tokens, self._asked.echo),
                "finish_reason": self._form.reason(number, self._reasons[number]),
            }
            for number, tokens in enumerate(self._tokens)
        ]
        return {**self._head, "object": self._form.whole, "choices": choices, "usage": self.usage}

    def begin(self) -> bytes:
        """Return what a stream begins with: nothing."""
        return b""

    def chunk(self, number: int, event: PromptRead | Piece | Ended) -> bytes:
        """Return a server-sent event, if there is anything to say."""
        if isinstance(event, PromptRead):
            opening = self._form.opening(number)
            if opening.get("text") == "" and not event.tokens:
                return b""
            return self._chunk(number, opening, event.tokens if self._asked.echo else None, None, prompt=True)
        if isinstance(event, Piece):
            part = self._form.piece(number, event.text)
            if not event.tokens and self._asked.tools and not part.get("delta"):
                return b""
            return self._chunk(number, part, event.tokens, None)
        part, ends = self._form.last(number), self._form.end_tokens(event) or None
        return self._chunk(number, part, ends, self._form.reason(number, event.reason))

    def end(self) -> bytes:
        """Return the end of a stream."""
        counted = b""
        if self._asked.include_usage:
            counted = _event({**self._head, "object": self._form.part, "choices": [], "usage": self.usage})
        return counted + _DONE

    def failed(self, error: RequestError) -> bytes:
        """Return the end of a stream that tells of an error."""
        return _event(error_body(error)) + _DONE

    def _logprobs(self, number: int, tokens: Sequence[TokenLogprob] | None, prompt: bool = False) -> Any:
        if self._asked.logprobs is None or tokens is None:
            return None
        return self._form.logprobs(number, tokens, prompt)

    def _chunk(
        self, number: int, part: dict[str, Any], tokens: Sequence[TokenLogprob] | None, reason: str | None,
        prompt: bool = False,
    ) -> bytes:  # fmt: skip
        logprobs = self._logprobs(number, tokens, prompt)
        choice = {"index": number, **part, "logprobs": logprobs, "finish_reason": reason}
        usage: dict[str, None] = {"usage": None} if self._asked.include_usage else {}
        return _event({**self._head, "object": self._form.part, "choices": [choice], **usage})

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts, of the answers, and of both."""
        read = sum(len(request.prompt) for request in self._asked.requests[:: self._asked.choices])
        return {
            "prompt_tokens": read,
            "completion_tokens": self.sampled,
            "total_tokens": read + self.sampled,
            "prompt_tokens_details": {"cached_tokens": self._reused},
        }


_DONE = b"data: [DONE]\n\n"


def _event(found: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n\n"


_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: RequestError) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.status}}
