"""What may be asked, as an OpenAPI description: bounds and names are those that requests are held to."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bincompress import __version__
from bincompress.inference.messages import ROLES
from bincompress.inference.offered_tools import MOST_TOOLS, NAME
from bincompress.serving.asking import (
    LARGEST,
    LONGEST_STOP,
    MOST_BIASED,
    MOST_STOPS,
    SAMPLING_NUMBERS,
    SAMPLING_WHOLE,
)
from bincompress.serving.openai_asking import MOST_ALTERNATIVES
from bincompress.serving.service import Service
from bincompress.serving.texts import of_request

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
ANY: Schema = {"type": "object"}


def whole(least: int, most: int = LARGEST) -> Schema:
    """Return the schema of whole numbers within bounds."""
    return {"type": "integer", "minimum": least, "maximum": most}


def listed(item: Schema, most: int | None = None, least: int = 0) -> Schema:
    """Return the schema of lists."""
    return {"type": "array", "items": item, "minItems": least, **({} if most is None else {"maxItems": most})}


def strict(properties: Mapping[str, Schema], *required: str) -> Schema:
    """Return the schema of objects of these fields and no others; null is as good as no field."""
    fields = {name: own if name in required else {"anyOf": [own, {"type": "null"}]} for name, own in properties.items()}
    found: Schema = {"type": "object", "properties": fields, "additionalProperties": {"type": "null"}}
    return {**found, "required": list(required)} if required else found


def _sampling(names: Mapping[str, str] | None = None) -> dict[str, Schema]:
    named = names or {}
    numbers: dict[str, Schema] = {
        named.get(name, name): {"type": "number", "minimum": least, "maximum": most}
        for name, least, most in SAMPLING_NUMBERS
    }
    texts = listed({"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}, MOST_STOPS)
    return {
        **numbers,
        **{name: whole(least) for name, least in SAMPLING_WHOLE},
        "seed": whole(0, LARGEST - 100),
        "stop": {"anyOf": [{"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}, texts]},
        "dry_sequence_breakers": texts,
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MOST_BIASED,
        },
    }


def _of_stream() -> dict[str, Schema]:
    return {"stream": BOOL, "stream_options": strict({"include_usage": BOOL}), "user": TEXT}


def _message() -> Schema:
    """Return the schema of one message of a conversation."""
    function = strict({"name": TEXT, "arguments": {"anyOf": [TEXT, ANY]}}, "name")
    call = strict({"id": TEXT, "type": {"enum": ["function"]}, "function": function}, "function")
    part = strict({"type": {"enum": ["text"]}, "text": TEXT}, "type", "text")
    content: dict[str, Schema] = {"content": {"anyOf": [TEXT, listed(part)]}}
    said = {**content, "reasoning_content": TEXT}
    roles = {role: {"role": {"type": "string", "enum": [role]}} for role in ROLES}
    return {
        "anyOf": [
            strict({**roles["system"], **content}, "role", "content"),
            strict({**roles["user"], **content}, "role", "content"),
            strict({**roles["assistant"], **said, "tool_calls": listed(call)}, "role", "content"),
            strict({**roles["assistant"], **said, "tool_calls": listed(call, None, 1)}, "role", "tool_calls"),
            strict({**roles["tool"], **content, "tool_call_id": TEXT, "name": TEXT}, "role", "content"),
        ]
    }


def _tools() -> Schema:
    """Return the schema of the tools that a request offers."""
    name: Schema = {"type": "string", "pattern": f"^{NAME.pattern}$"}
    function = strict({"name": name, "description": TEXT, "parameters": ANY, "strict": BOOL}, "name")
    return listed(strict({"type": {"enum": ["function"]}, "function": function}, "type", "function"), MOST_TOOLS)


def _chat(model: Schema, most: int, context: int) -> Schema:
    """Return the body of /v1/chat/completions."""
    kinds: Schema = {"enum": ["text", "json_object", "json_schema"]}
    form = strict({"name": TEXT, "description": TEXT, "schema": ANY, "strict": BOOL}, "schema")
    return strict(
        {
            "model": model, "messages": listed(_message(), least=1), "n": whole(1, most), **_sampling(),
            **_of_stream(), "tools": _tools(), "max_tokens": whole(1, context),
            "max_completion_tokens": whole(1, context), "logprobs": BOOL, "top_logprobs": whole(0, MOST_ALTERNATIVES),
            "chat_template_kwargs": ANY, "parallel_tool_calls": BOOL,
            "tool_choice": {"anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, ANY]},
            "response_format": strict({"type": kinds, "json_schema": form}, "type"),
        },
        "messages",
    )  # fmt: skip


def _response(model: Schema, context: int) -> Schema:
    """Return the body of /v1/responses."""
    part = strict({"type": {"enum": ["input_text", "output_text"]}, "text": TEXT}, "type", "text")
    roles: Schema = {"enum": ["system", "developer", "user", "assistant"]}
    message = strict({"role": roles, "content": {"anyOf": [TEXT, listed(part)]}}, "role", "content")
    form = strict({"type": {"enum": ["text", "json_object", "json_schema"]}, "name": TEXT, "schema": ANY,
                   "strict": BOOL, "description": TEXT}, "type")  # fmt: skip
    return strict(
        {
            "model": model, "input": {"anyOf": [TEXT, listed(message, least=1)]}, "instructions": TEXT,
            "max_output_tokens": whole(1, context), "temperature": {"type": "number", "minimum": 0, "maximum": 100},
            "top_p": {"type": "number", "minimum": 0, "maximum": 1}, "stream": BOOL, "metadata": ANY, "user": TEXT,
            "store": {"enum": [False]}, "text": strict({"format": form}), "chat_template_kwargs": ANY,
        },
        "input",
    )  # fmt: skip


def _schemas(service: Service) -> dict[str, Schema]:
    """Return the bodies by their routes."""
    model: Schema = {"type": "string", "enum": [service.settings.model_name]}
    most, context = service.settings.most_choices, service.limits.context
    config = service.model.decoder.config
    token = whole(0, config.vocab - 1)
    tokens = listed(token, least=1)
    texts: Schema = {"anyOf": [TEXT, tokens, listed(TEXT, most, 1), listed(tokens, most, 1)]}
    options = strict({**_sampling({"repetition_penalty": "repeat_penalty"}), "num_predict": whole(-2, context),
                      "num_ctx": whole(1, context)})  # fmt: skip
    ollama: dict[str, Schema] = {
        "model": model, "stream": BOOL, "options": options, "think": BOOL,
        "format": {"anyOf": [{"type": "string", "enum": ["", "json"]}, ANY]},
        "keep_alive": {"type": ["string", "number"]},
    }  # fmt: skip
    prompt: Schema = {"type": "string", "minLength": 1}
    messages = listed(_message(), least=1)
    return {
        "/v1/completions": strict(
            {
                "model": model, "prompt": texts, "n": whole(1, most), **_sampling(), **_of_stream(), "echo": BOOL,
                "max_tokens": whole(0, context), "logprobs": whole(0, MOST_ALTERNATIVES), "best_of": whole(1, most),
            },
            "prompt",
        ),
        "/v1/chat/completions": _chat(model, most, context),
        "/v1/responses": _response(model, context),
        "/v1/embeddings": strict(
            {"model": model, "input": texts, "encoding_format": {"enum": ["float", "base64"]},
             "dimensions": {"enum": [config.hidden]}, "user": TEXT},
            "input",
        ),
        "/tokenize": {
            "anyOf": [
                strict({"model": model, "prompt": TEXT, "add_special_tokens": BOOL}, "prompt"),
                strict({"model": model, "messages": messages, "chat_template_kwargs": ANY}, "messages"),
            ]
        },
        "/detokenize": strict({"model": model, "tokens": listed(token)}, "tokens"),
        "/api/chat": strict(
            {**ollama, "messages": listed(ANY, least=1), "tools": _tools(), "tool_choice": ANY,
             "parallel_tool_calls": BOOL},
            "messages",
        ),
        "/api/generate": strict({**ollama, "prompt": prompt, "system": TEXT, "raw": BOOL}, "prompt"),
    }  # fmt: skip


_READ = {
    "/health": "Whether the model is loaded", "/metrics": "Counts for Prometheus",
    "/facts": "What is known of the model", "/v1/models": "The one model", "/v1/models/{name}": "The one model",
    "/api/tags": "The one model, as Ollama lists it", "/api/version": "The version",
    "/openapi.json": "This description", "/tokenizer_info": "Special tokens and the chat template",
}  # fmt: skip
_WRITTEN = {
    "/v1/completions": "Continue texts", "/v1/chat/completions": "Answer a conversation",
    "/v1/responses": "Answer a conversation, in OpenAI's newer form",
    "/v1/embeddings": "Vectors of texts", "/tokenize": "Tokens of a text or a conversation",
    "/detokenize": "Text of tokens", "/api/chat": "Answer a conversation, as Ollama does",
    "/api/generate": "Continue a text, as Ollama does",
}  # fmt: skip
_STREAMS = {"/v1": "text/event-stream", "/api": "application/x-ndjson"}


def description(service: Service) -> dict[str, Any]:
    """Return the description of a server's routes."""
    paths: dict[str, Any] = {}
    for path, text in _READ.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        paths[path] = {"get": {"summary": text, "responses": _responses(path, kind)}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": {**TEXT, "enum": [service.settings.model_name]}}
    ]
    for path, body in _schemas(service).items():
        paths[path] = {
            "post": {
                "summary": _WRITTEN[path],
                "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
                "responses": _responses(path, "application/json"),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "bincompress", "version": __version__, "description": "A compressed model over HTTP"},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if service.settings.api_keys else [],
    }


def _responses(path: str, kind: str) -> dict[str, Any]:
    told = {"error": TEXT} if path.startswith("/api/") else {"error": {"type": "object", "required": ["message"]}}
    error = {"type": "object", "properties": told, "required": ["error"]}
    content: dict[str, Any] = {kind: {"schema": TEXT if kind == "text/plain" else ANY}}
    if path.split("/")[1] in ("v1", "api") and path in _WRITTEN and path != "/v1/embeddings":
        content[_STREAMS[f"/{path.split('/')[1]}"]] = {}
    return {
        "200": {"description": "As asked", "content": content},
        "default": {"description": "Refused, or failed", "content": {"application/json": {"schema": error}}},
    }


async def openapi(request: Request) -> Response:
    """Answer GET /openapi.json."""
    return JSONResponse(description(of_request(request)))
