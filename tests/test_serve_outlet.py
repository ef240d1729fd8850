"""A stream's bytes come in their order, whoever writes them: the thread that makes them, or the event loop."""

import asyncio
import errno
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bincompress.serving.outlet import CONNECTION, Outlet
from tests.serving import Running, posted, running, until

ASKED = {"prompt": "A page", "max_tokens": 24, "temperature": 0, "stream": True}


class Transport:
    """What asyncio's transport is to an outlet, over one end of a pair of sockets; what it cannot send waits."""

    def __init__(self, own: socket.socket) -> None:
        self.own = own
        self.left = b""
        self.wrote = 0  # times

    def get_extra_info(self, name: str) -> socket.socket:
        assert name == "socket"
        return self.own

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return len(self.left)

    def write(self, data: bytes) -> None:
        self.wrote += 1
        self.left += data

    async def drain(self) -> None:
        while self.left:
            try:
                self.left = self.left[self.own.send(self.left) :]
            except BlockingIOError:
                await asyncio.sleep(0)


def chunks_of(body: bytes) -> bytes:
    """Return the content of a body in chunks, which has to end with an empty one."""
    found = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            assert body == b"\r\n"
            return found
        found, body = found + body[: int(size, 16)], body[int(size, 16) :]
        assert body.startswith(b"\r\n")
        body = body[2:]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("size", [10, 3000])
def test_bytes_come_in_their_order_from_a_client_that_reads_slowly(version: str, size: int) -> None:
    """Larger parts do not fit the small buffer: what it does not take is left to the event loop."""
    client, own = socket.socketpair()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096 if size > 10 else 1 << 20)
    own.setblocking(False)
    transport, read = Transport(own), bytearray()
    parts = [bytes([65 + number % 26]) * size for number in range(200)]

    def receive() -> None:
        while data := client.recv(1000):
            read.extend(data)

    async def serve() -> None:
        outlet = Outlet()

        async def send(message: Any) -> None:
            body = message["body"]
            transport.write(b"%x\r\n%b\r\n" % (len(body), body) if body else b"")
            if not message["more_body"]:
                transport.write(b"0\r\n\r\n")
            await transport.drain()

        def make() -> None:
            for part in parts:
                outlet.put(part)
            outlet.put(b"", last=True)
            outlet.put(b"late")

        making = threading.Thread(target=make)
        sending = asyncio.ensure_future(outlet.send_to({"http_version": version, CONNECTION: transport}, send))
        await asyncio.sleep(0)  # it waits for the first part
        making.start()
        await sending
        making.join()
        outlet.close()

    reading = threading.Thread(target=receive)
    reading.start()
    asyncio.run(serve())
    own.close()
    reading.join()
    client.close()
    assert chunks_of(bytes(read)) == b"".join(parts)
    if version == "1.1":  # the thread that makes them sends all that the socket takes
        assert transport.wrote == 2 if size == 10 else transport.wrote > 2  # 2: the end of the body


def test_the_event_loop_is_told_of_a_client_that_is_gone() -> None:
    """It may not read, where a next request waits in the connection: then it learns of the end by writing alone."""
    client, own = socket.socketpair()
    own.setblocking(False)
    transport = Transport(own)
    client.close()

    async def serve() -> None:
        outlet = Outlet()
        told = asyncio.Event()

        async def send(message: Any) -> None:
            told.set()

        sending = asyncio.ensure_future(outlet.send_to({"http_version": "1.1", CONNECTION: transport}, send))
        await asyncio.sleep(0)
        outlet.put(b"x")
        outlet.put(b"y")
        await asyncio.wait_for(told.wait(), 10)
        sending.cancel()
        outlet.close()

    asyncio.run(serve())
    own.close()
    assert transport.left == b"1\r\nx\r\n"


def test_without_a_free_descriptor_the_event_loop_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_free(*given: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "fromfd", none_free)
    client, own = socket.socketpair()

    async def serve() -> bytes:
        outlet = Outlet()
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message["body"])

        sending = asyncio.ensure_future(outlet.send_to({"http_version": "1.1", CONNECTION: Transport(own)}, send))
        await asyncio.sleep(0)
        outlet.put(b"x")
        outlet.put(b"y", last=True)
        await sending
        return b"".join(sent)

    with client, own:
        assert asyncio.run(serve()) == b"xy"


@pytest.fixture(scope="module")
def server(chat_store: Path) -> Iterator[Running]:
    with running(chat_store) as made:
        yield made


def text_of(events: bytes) -> str:
    found = [json.loads(line[6:]) for line in events.split(b"\n\n") if line.startswith(b"data: {")]
    return "".join(event["choices"][0]["text"] for event in found)


def test_a_stream_over_each_version_of_http_is_the_whole_answer(server: Running) -> None:
    whole = server.ask("/v1/completions", {**ASKED, "stream": False})[1]["choices"][0]["text"]
    request = posted("/v1/completions", ASKED)
    for asked in (request.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nconnection: close\r\n"),
                  request.replace(b"HTTP/1.1", b"HTTP/1.0")):  # fmt: skip
        with server.connect(asked) as connection, connection.makefile("rb") as file:
            head, _, body = file.read().partition(b"\r\n\r\n")
        chunked = b"transfer-encoding: chunked" in head.lower()
        assert chunked == (b"HTTP/1.1\r\n" in asked)
        events = chunks_of(body) if chunked else body
        assert events.endswith(b"data: [DONE]\n\n")
        assert text_of(events) == whole


def test_two_streams_on_one_connection(server: Running) -> None:
    request = posted("/v1/completions", ASKED)
    with server.connect(request) as connection, connection.makefile("rb") as file:
        texts = []
        for turn in range(2):
            while file.readline() != b"\r\n":
                pass
            events = b""
            while size := int(file.readline(), 16):
                events += file.read(size)
                file.readline()
            file.readline()
            texts.append(text_of(events))
            if not turn:
                connection.sendall(request)
        assert texts[0] == texts[1] != ""


def test_a_client_that_has_asked_again_and_is_gone_is_noticed(server: Running) -> None:
    """uvicorn reads no more of a connection while a request waits in it; the stream's own writing finds out."""
    request = posted("/v1/completions", {**ASKED, "max_tokens": 400})
    connection = server.connect(request)
    assert connection.recv(100)
    connection.sendall(request)
    assert connection.recv(100)
    connection.close()  # with bytes unread: a reset
    until(lambda: not server.server.server_state.connections)
