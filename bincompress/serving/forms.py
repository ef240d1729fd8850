"""What form is an answer to have? JSON by a schema, compiled beside everything else that is asked."""

import asyncio
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest

from bincompress.errors import BincompressError
from bincompress.inference.json_schema import json_grammar
from bincompress.inference.sequence import Request
from bincompress.serving.reading import Fields, RequestError, shown
from bincompress.serving.service import Service
from bincompress.serving.texts import while_connected

_ANY_OBJECT = {"type": "object"}


def response_format(fields: Fields) -> str | None:
    """Return the grammar that OpenAI's `response_format` asks for, if any."""
    given = fields.take("response_format", dict)
    if given is None:
        return None
    own = Fields(given, "response_format.")
    kind = own.take("type", str)
    schema: Any = _ANY_OBJECT if kind == "json_object" else None
    if kind == "json_schema":
        within = Fields(own.take("json_schema", dict) or {}, "response_format.json_schema.")
        schema = within.take("schema", dict)
        # Whatever `strict` says, the answer is held to the schema.
        for name, wanted in (("name", str), ("description", str), ("strict", bool)):
            within.take(name, wanted)
        within.finish()
        if schema is None:
            within.refuse("schema", "expected a JSON schema")
    elif kind not in ("text", "json_object"):
        own.refuse("type", f"expected text, json_object or json_schema, found {shown(kind)}")
    own.finish()
    return None if schema is None else schema_grammar(schema, "response_format")


def ollama_format(fields: Fields) -> str | None:
    """Return the grammar that Ollama's `format` asks for, if any: "json", or a schema."""
    given = fields.take("format", str, dict)
    if given in (None, ""):
        return None
    if isinstance(given, str) and given != "json":
        fields.refuse("format", f"expected 'json' or a JSON schema, found {shown(given)}")
    return schema_grammar(_ANY_OBJECT if given == "json" else given, "format")


def schema_grammar(schema: Any, name: str) -> str:
    """Return a schema's grammar; raise RequestError where it is not supported."""
    try:
        return json_grammar(schema)
    except BincompressError as error:
        raise RequestError(400, str(error), name) from None


async def in_form(http: HttpRequest, service: Service, requests: list[Request], form: str | None) -> list[Request]:
    """Return requests whose texts are held to a grammar; raise RequestError where it cannot be compiled in time.

    One grammar is compiled at a time, in a thread of its own, so that a complex one holds up those after it alone.
    """
    if form is None:
        return requests
    if service.compiling > service.limits.waiting:
        raise RequestError(429, "too many schemas are being compiled; try again later", retry_after=1)
    service.compiling += 1
    try:
        async with asyncio.timeout(service.settings.request_seconds):
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(service.compilers, service.grammars.compiled, form)
            grammar = await while_connected(http.receive, work)
    except TimeoutError:
        raise RequestError(504, "the schema was not compiled in time; try again when the server is less busy") from None
    finally:
        service.compiling -= 1
    return [replace(request, grammar=grammar) for request in requests]
