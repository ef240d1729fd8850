"""The routes of the server, who may use them, and how errors are told."""

import base64
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bincompress.errors import BincompressError
from bincompress.inference.request_fields import Fields
from bincompress.serving import ollama
from bincompress.serving.asking import Asked
from bincompress.serving.bodies import in_thread, read_json
from bincompress.serving.embeddings import embeddings
from bincompress.serving.forms import in_form
from bincompress.serving.openai_answering import Answer, Chat, Completion, error_body
from bincompress.serving.openai_asking import chat, completion
from bincompress.serving.openapi import openapi
from bincompress.serving.reading import RequestError
from bincompress.serving.responses import responses
from bincompress.serving.service import Service, log
from bincompress.serving.texts import Streamed, of_request, refused, respond
from bincompress.serving.tokenizing import detokenize, tokenize, tokenizer_info

Handler = Callable[[Request], Awaitable[Response]]
_OPEN = ("/", "/health")  # for whom has no key
_LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


def application(service: Service) -> Starlette:
    """Return the application that serves a model."""
    routes = [
        ("/", "GET", page), ("/health", "GET", health), ("/metrics", "GET", metrics), ("/facts", "GET", facts),
        ("/v1/models", "GET", models), ("/v1/models/{name:path}", "GET", one_model),
        ("/v1/completions", "POST", completions),
        ("/v1/chat/completions", "POST", chat_completions), ("/v1/responses", "POST", responses),
        ("/v1/embeddings", "POST", embeddings),
        ("/tokenize", "POST", tokenize),
        ("/detokenize", "POST", detokenize), ("/tokenizer_info", "GET", tokenizer_info),
        ("/api/chat", "POST", ollama.chat),
        ("/api/generate", "POST", ollama.generate), ("/api/tags", "GET", ollama.tags),
        ("/api/version", "GET", ollama.version), ("/openapi.json", "GET", openapi),
    ]  # fmt: skip
    made = Starlette(
        routes=[Route(path, guarded(path, handler), methods=[method]) for path, method, handler in routes],
        exception_handlers={HTTPException: _unknown},
    )
    made.state.service = service
    return made


def guarded(path: str, handler: Handler) -> Handler:
    """Return a route's handler behind what holds for all: who may ask, how errors are told, and a line in the log."""

    async def handle(request: Request) -> Response:
        service: Service = of_request(request)
        begin = time.monotonic()
        try:
            check_host(request, service)
            if path not in _OPEN:
                check_key(request, service)
            response = await handler(request)
        except RequestError as error:
            response = told(path, error)
        except Exception as error:
            if not isinstance(error, BincompressError):
                logging.getLogger("bincompress.serve").exception("a request to %s failed", path)
            response = told(path, refused(error))
        answer = getattr(request.state, "answer", None)
        if isinstance(response, Streamed):
            response.ended = lambda: _log(service, path, response.status_code, begin, answer)
        else:
            _log(service, path, response.status_code, begin, answer)
        return response

    return handle


def _log(service: Service, path: str, status: int, begin: float, answer: Any) -> None:
    service.metrics.requests.labels(path, str(status)).inc()
    if path in ("/health", "/metrics"):
        return
    seconds = time.monotonic() - begin
    if answer is None:
        log.info("%s %d, %.3f s", path, status, seconds)
        return
    read = answer.usage["prompt_tokens"]
    log.info("%s %d, %d + %d tokens, %.3f s", path, status, read, answer.sampled, seconds)
    if service.settings.log_prompts:
        written = ["".join(pieces) for pieces in answer.written]
        log.info("prompt and answer: %s", json.dumps([answer.prompt, written], ensure_ascii=True))


def told(path: str, error: RequestError) -> Response:
    """Return an error in the form of the interface that was asked."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body: dict[str, Any] = {"error": error.message} if path.startswith("/api/") else error_body(error)
    return JSONResponse(body, error.status, headers)


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("allow", "") or (error.headers or {}).get("Allow", "")
    if allowed:
        message = f"{error.detail}: expected {allowed} here, found {request.method[:10]}"
    else:
        message = f"{error.detail}: this server has no such route"
    response = told(request.url.path, RequestError(error.status_code, message))
    if allowed:
        response.headers["allow"] = allowed
    return response


def check_key(request: Request, service: Service) -> None:
    """Refuse a request without one of the keys, where there are any."""
    keys = service.settings.api_keys
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # All are compared, so that the time tells nothing.
    fits = [hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode()) for key in keys]
    if keys and not (kind.lower() == "bearer" and any(fits)):
        raise RequestError(401, "expected an API key: Authorization: Bearer KEY")


def check_host(request: Request, service: Service) -> None:
    """Refuse a request by another name where only this machine is served: a page could have its own name lead here."""
    settings = service.settings
    if not settings.is_local:
        return
    host = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
    if host not in (*_LOCAL, settings.host.lower(), *(name.lower() for name in settings.allowed_hosts)):
        raise RequestError(403, "the Host header is not a name of this machine; --allowed-host NAME lets it in")


async def health(request: Request) -> Response:
    """Say whether the model is loaded."""
    of_request(request).ready()
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Answer Prometheus."""
    return Response(of_request(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def facts(request: Request) -> Response:
    """Say what the page shows of the model."""
    service: Service = of_request(request)
    scheduler, sampling = service.ready(), service.model.defaults.sampling
    return JSONResponse(
        {
            **service.facts,
            "model": service.settings.model_name,
            "context": scheduler.limits.context,
            "chat": service.model.template is not None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
    )


async def models(request: Request) -> Response:
    """List the one model."""
    service: Service = of_request(request)
    service.ready()
    return JSONResponse({"object": "list", "data": [_entry(service)]})


async def one_model(request: Request) -> Response:
    """Say of the one model what the list says; another one is not found."""
    service: Service = of_request(request)
    service.ready()
    name = request.path_params["name"]
    if name != service.settings.model_name:
        service.unknown_model(name)
    return JSONResponse(_entry(service))


def _entry(service: Service) -> dict[str, Any]:
    name = service.settings.model_name
    return {"id": name, "object": "model", "created": service.created, "owned_by": "bincompress"}


async def completions(request: Request) -> Response:
    """Continue texts."""
    return await _answered(request, completion, Completion)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _answered(request, chat, Chat)


async def _answered(
    request: Request, ask: Callable[[Fields, Service], Asked], form: type[Chat] | type[Completion]
) -> Response:
    service: Service = of_request(request)
    scheduler = service.ready()
    fields = await read_json(request, service)
    asked = await in_thread(service, ask, fields, service)
    requests = await in_form(request, service, asked.requests, asked.form)
    answer = Answer(form(service, asked), service, asked)
    return await respond(request, scheduler, requests, answer, "text/event-stream" if asked.stream else None)


def _page() -> tuple[bytes, dict[str, str]]:
    content = files("bincompress.serving").joinpath("page.html").read_bytes()

    def hashed(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), content, re.S)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)

    policy = (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return content, headers


async def page(request: Request) -> Response:
    """Return the page to chat on."""
    content, headers = _page()
    return Response(content, headers=headers, media_type="text/html; charset=utf-8")
