"""Runs the server: a socket, the model loaded beside it, and an end within seconds."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn

from bincompress.errors import BincompressError
from bincompress.inference.generate import Model
from bincompress.inference.scheduler import Limits
from bincompress.process.systems import bind_alone
from bincompress.serving.app import application
from bincompress.serving.connections import bounded_protocol
from bincompress.serving.service import Service
from bincompress.serving.settings import ServeSettings

_LONGEST_HEADERS = 32 * 1024
_BACKLOG = 512
_KEPT_ALIVE = 5  # seconds that a connection may wait for its next request
_FORCED_END = 4  # seconds from being told to end until answers are cut off
_SWITCH_SECONDS = 0.0005  # that one thread keeps Python from another


class Server(uvicorn.Server):
    """uvicorn, which at the end has texts finished or cancelled."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        self.service = service
        super().__init__(
            uvicorn.Config(
                application(service), http=bounded_protocol(settings.stalled_seconds), ws="none", lifespan="off",
                log_config=None, access_log=False, server_header=False, date_header=True, proxy_headers=False,
                limit_concurrency=settings.most_connections, backlog=_BACKLOG,
                h11_max_incomplete_event_size=_LONGEST_HEADERS,
                timeout_keep_alive=max(1, int(min(_KEPT_ALIVE, settings.stalled_seconds))),
                timeout_graceful_shutdown=_FORCED_END,
            )
        )  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: no new requests, and those at hand within seconds."""
        with ThreadPoolExecutor(1, "close") as closing:
            closed = asyncio.get_running_loop().run_in_executor(closing, self.service.close)
            await super().shutdown(sockets)
            await closed


def serve(
    settings: ServeSettings,
    limits: Limits,
    load: Callable[[Service], Model],
    told: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve a model until the process is told to end.

    load: returns the model, in a thread of its own; the server answers 503 meanwhile. told: is given the address once
    it listens. Raises BincompressError where the address is taken, and what `load` raises.
    """
    # The thread that writes waits for that which answers at each kernel's end: for half a millisecond at most, not 5.
    sys.setswitchinterval(_SWITCH_SECONDS)
    service = Service(settings, limits)
    listening = _listen(settings)
    server = Server(service)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

    def failed() -> None:
        server.should_exit = True

    service.load(lambda: load(service), failed)
    name = f"[{settings.host}]" if ":" in settings.host else settings.host
    told(f"http://{name}:{listening.getsockname()[1]}")
    server.run([listening])
    if service.failure is not None:
        raise service.failure


def _listen(settings: ServeSettings) -> socket.socket:
    try:
        found: list[Any] = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, number, _, address = found[0]
        with contextlib.ExitStack() as closing:
            made = closing.enter_context(socket.socket(family, kind, number))
            bind_alone(made, address)
            made.listen(_BACKLOG)
            closing.pop_all()
    except OSError as error:
        raise BincompressError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; choose another --port"
        ) from None
    return made
