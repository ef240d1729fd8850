"""The body of a request, read within the server's bounds of size and time."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from bincompress.inference.request_fields import Fields, shown
from bincompress.serving.reading import RequestError, parse
from bincompress.serving.service import Service

Found = TypeVar("Found")


async def read_json(request: Request, service: Service) -> Fields:
    """Return a request's body, a JSON object; raise RequestError where it is too large, too slow or something else."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other sites may send plain text without asking; JSON they may not.
        raise RequestError(415, f"content-type: expected application/json, found {shown(kind)}")
    _check_encoding(request)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 12 or int(length) > service.most_body):
        raise _too_large(service)
    body = bytearray()
    try:
        async with asyncio.timeout(service.settings.body_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise RequestError(499, "the client is gone")
                part = message.get("body", b"")
                body += part
                service.body_bytes += len(part)
                if len(body) > service.most_body:
                    raise _too_large(service)
                if service.body_bytes > service.settings.most_bodies:
                    raise RequestError(503, "too many large requests at once; try again later", retry_after=1)
                if not message.get("more_body"):
                    break
        return Fields(await in_thread(service, parse, bytes(body)))
    except TimeoutError:
        seconds = service.settings.body_seconds
        raise RequestError(408, f"the request's body did not arrive within {seconds:g} s") from None
    finally:
        service.body_bytes -= len(body)


def _check_encoding(request: Request) -> None:
    """Refuse a body that says it is compressed, or of other characters than UTF-8."""
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed != "identity":
        raise RequestError(415, f"content-encoding: expected a body as it is, found {shown(packed)}")
    for part in request.headers.get("content-type", "").split(";")[1:]:
        name, _, value = part.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8"):
            raise RequestError(415, f"content-type: expected charset=utf-8, found {shown(value.strip())}")


async def in_thread(service: Service, work: Callable[..., Found], *arguments: Any) -> Found:
    """Run what takes a while, such as tokenizing, beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(service.readers, work, *arguments)


def _too_large(service: Service) -> RequestError:
    return RequestError(413, f"the request is too large: expected at most {service.most_body:,} bytes")
