"""A server of the demo model in a thread of this process, for the tests of serving."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from bincompress.inference.generate import Model
from bincompress.inference.load import load
from bincompress.inference.scheduler import Limits
from bincompress.serving.loading import facts_of
from bincompress.serving.run import Server, _listen
from bincompress.serving.service import Service
from bincompress.serving.settings import ServeSettings

BOUND = 60.0


class Running:
    """A server that runs."""

    def __init__(self, store: Path, model: Model | None, limits: Limits, **settings: Any) -> None:
        self.settings = ServeSettings(port=0, model_name="tiny", **settings)
        self.service = Service(self.settings, limits)
        self.go = threading.Event()  # the model is "loaded" when this is set
        listening = _listen(self.settings)
        self.port = int(listening.getsockname()[1])
        self.server = Server(self.service)

        def loaded() -> Model:
            self.go.wait(BOUND)
            found = model or load(str(store), threads=1)
            self.service.facts = facts_of(str(store), found)
            return found

        self.service.load(loaded, lambda: None)
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()

    def ready(self) -> "Running":
        """Let the model be loaded, and return once it is."""
        self.go.set()
        until(lambda: self.service.scheduler is not None)
        return self

    def end(self) -> None:
        """End it."""
        self.go.set()
        self.server.should_exit = True
        self.thread.join(BOUND)
        assert not self.thread.is_alive()

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Return the status and the JSON of an answer; a body makes it a POST."""
        status, _, content = self.raw(path, None if body is None else json.dumps(body).encode(), headers)
        return status, json.loads(content)

    def raw(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=BOUND)
        kind = {} if body is None else {"content-type": "application/json"}
        with contextlib.closing(connection):
            connection.request(method or ("GET" if body is None else "POST"), path, body, {**kind, **(headers or {})})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def connect(self, sent: bytes = b"") -> socket.socket:
        """Return a connection on which something was sent."""
        made = socket.create_connection(("127.0.0.1", self.port), BOUND)
        made.sendall(sent)
        return made


def posted(path: str, body: dict[str, Any]) -> bytes:
    """Return the bytes of a POST."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def until(fulfilled: Any) -> None:
    """Return once a condition holds, which something other than this thread brings about."""
    end = time.monotonic() + BOUND
    while not fulfilled():
        assert time.monotonic() < end
        threading.Event().wait(0.002)


def openai_client(server: Running) -> openai.OpenAI:
    """The real client of a server; to be closed."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=BOUND)


@contextlib.contextmanager
def running(
    store: Path, model: Model | None = None, limits: Limits | None = None, **settings: Any
) -> Iterator[Running]:
    """Run a server whose model is loaded."""
    made = Running(store, model, limits or Limits(parallel=3, waiting=8, context=512), **settings)
    try:
        yield made.ready()
    finally:
        made.end()
