"""Compiles the grammars that answers are held to, beside everything else that is asked."""

import asyncio
from dataclasses import replace

from starlette.requests import Request as HttpRequest

from bincompress.inference.sequence import Request
from bincompress.serving.reading import RequestError
from bincompress.serving.service import Service
from bincompress.serving.texts import while_connected


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
