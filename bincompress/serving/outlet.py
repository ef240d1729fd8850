"""A stream's way to its client: straight to the socket while that takes all of it, else by the event loop.

The scheduler's thread hands the bytes over. To wake the event loop for each token costs more than to send it: the loop
runs Python while the scheduler waits, between kernels, for its turn.
"""

import asyncio
import contextlib
import socket
import threading
from typing import Any

from starlette.types import Scope, Send

CONNECTION = "bincompress.connection"  # of a request's scope: the transport that its answer is written to


class Outlet:
    """The bytes of one answer, in their order, from another thread to the client."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._changed = asyncio.Event()
        self._waiting: list[bytes] = []  # for the event loop
        self._cut = b""  # what the socket did not take of a part
        self._told = False  # the event loop will look
        self._ended = False
        self._socket: socket.socket | None = None  # while the event loop has nothing to write

    def put(self, data: bytes, last: bool = False) -> None:
        """Hand over the next bytes, from any one thread; last: nothing comes after them."""
        with self._lock:
            if self._ended:
                return
            self._ended = last
            if self._socket is None:
                self._waiting.append(data)
            else:
                self._cut = self._sent(self._socket, b"%x\r\n%b\r\n" % (len(data), data)) if data else b""
                if not self._cut and not last:
                    return
                self._by_loop()
            if not self._told:
                self._told = True
                with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would be told
                    self._loop.call_soon_threadsafe(self._changed.set)

    def _sent(self, to: socket.socket, data: bytes) -> bytes:
        """Send a part as it stands on the wire; return what is left of it."""
        try:
            return data[to.send(data) :]
        except OSError:  # it is full; or the client is gone, which the event loop finds out when it writes
            return data

    def _by_loop(self) -> None:
        """Leave the writing to the event loop."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Take nothing more."""
        with self._lock:
            self._ended = True
            self._by_loop()

    async def send_to(self, scope: Scope, send: Send) -> None:
        """Send all that is put, as the body of an answer whose head was sent, and the body's end."""
        transport = scope.get(CONNECTION) if scope["http_version"] == "1.1" else None
        while True:
            with self._lock:
                data, self._waiting = b"".join(self._waiting), []
                cut, self._cut = self._cut, b""
                self._told, ended = False, self._ended
                self._changed.clear()
            if cut and transport is not None:
                transport.write(cut)
            if data or ended:
                await send({"type": "http.response.body", "body": data, "more_body": not ended})
            if ended:
                return
            self._open(transport)
            await self._changed.wait()

    def _open(self, transport: Any) -> None:
        """Let the socket be written to by the thread that puts, where the event loop has nothing left to write."""
        with self._lock:
            if transport is None or self._waiting or self._ended or self._socket is not None:
                return
            if not transport.is_closing() and not transport.get_write_buffer_size():
                own = transport.get_extra_info("socket")
                with contextlib.suppress(OSError):  # no descriptor is free: the event loop writes
                    self._socket = socket.fromfd(own.fileno(), own.family, own.type)  # a descriptor of its own
                    self._socket.setblocking(False)
