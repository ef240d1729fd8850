"""What can go wrong at a server is brought about: clients that stall or leave, too many at once, keys, signals."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bincompress.errors import BincompressError
from bincompress.inference.generate import Model
from bincompress.inference.load import load
from bincompress.inference.scheduler import Limits
from bincompress.serving.loading import check_fits
from bincompress.serving.settings import ServeSettings, read_keys
from tests.conftest import Run
from tests.serving import BOUND, Running, posted, running, until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ENDLESS = {"prompt": "In Python,", "max_tokens": 500, "logit_bias": {"0": -100, "1": -100}}


@pytest.fixture(scope="module")
def model(chat_store: Path) -> Model:
    return load(str(chat_store), threads=1)


@pytest.fixture
def server(chat_store: Path, model: Model) -> Iterator[Running]:
    with running(
        chat_store, model, Limits(parallel=1, waiting=1, context=512), stalled_seconds=0.3, body_seconds=0.3
    ) as made:
        yield made


class Slowed:
    """Holds the scheduler before each pass until it is let go on, so that a text lasts as long as a test wants."""

    def __init__(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = 0
        self.go = threading.Semaphore(0)
        scheduler = server.service.ready()
        own = scheduler._run

        def run(shares: Any) -> None:
            self.passes += 1
            self.go.acquire(timeout=BOUND)
            own(shares)

        monkeypatch.setattr(scheduler, "_run", run)

    def open(self) -> None:
        self.go.release(5000)


def ended(server: Running) -> bool:
    scheduler = server.service.ready()
    return not scheduler.active and not scheduler.waiting


def test_while_the_model_is_loaded(chat_store: Path, model: Model) -> None:
    server = Running(chat_store, model, Limits(context=512))
    try:
        for path, body in (("/health", None), ("/v1/models", None), ("/v1/completions", {"prompt": "x"})):
            status, headers, content = server.raw(path, None if body is None else json.dumps(body).encode())
            assert (status, headers["retry-after"]) == (503, "1")
            assert "the model is being loaded" in json.loads(content)["error"]["message"]
        assert b"bincompress_model_loaded 0.0" in server.raw("/metrics")[2]
        assert server.raw("/")[0] == 200
        server.ready()
        assert server.ask("/health") == (200, {"status": "ok"})
    finally:
        server.end()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_text(server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    slowed = Slowed(server, monkeypatch)
    connection = server.connect(posted("/v1/completions", {**ENDLESS, "stream": stream}))
    until(lambda: slowed.passes)
    slowed.go.release(3)
    until(lambda: slowed.passes == 4)
    connection.close()
    (text,) = server.service.ready()._active
    until(lambda: text.cancelled)
    slowed.open()
    until(lambda: ended(server))
    assert text.sampled <= 4
    assert server.ask("/health")[0] == 200


def test_a_client_that_never_reads_ends_its_text(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    # An answer longer than what the kernel buffers: each chunk carries the log probabilities of many tokens.
    texts: Any = {**ENDLESS, "stream": True, "logprobs": 20, "max_tokens": 500}
    slowed = Slowed(server, monkeypatch)
    connection.sendall(posted("/v1/completions", texts))
    until(lambda: slowed.passes)
    protocol = next(iter(server.server.server_state.connections))
    # What lies between the two is made small, too, so that little is needed to fill it.
    protocol.transport.set_write_buffer_limits(1024)  # type: ignore[union-attr]
    own = protocol.transport.get_extra_info("socket")  # type: ignore[union-attr]
    own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    (text,) = server.service.ready()._active
    slowed.go.release(200)
    until(lambda: text.cancelled or text.sampled >= 199)
    until(lambda: text.cancelled)  # within `stalled_seconds`
    slowed.open()
    until(lambda: ended(server))
    assert text.sampled < 500
    connection.close()


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /v1/completions HTTP/1.1\r\nhost: local", b""),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea", b"HTTP/1.1 200 OK"),
    ],
)
def test_a_connection_that_does_not_ask_is_ended(server: Running, sent: bytes, answer: bytes) -> None:
    """By the server, after `stalled_seconds`; what was asked before is answered."""
    begin = time.monotonic()
    with server.connect(sent) as connection:
        until(lambda: server.server.server_state.connections)
        got = everything_sent(connection)  # TimeoutError where the server keeps the connection
        seconds = time.monotonic() - begin
    assert got.partition(b"\r\n")[0] == answer
    assert seconds >= server.settings.stalled_seconds
    until(lambda: not server.server.server_state.connections)
    assert server.ask("/health") == (200, {"status": "ok"})


def everything_sent(connection: socket.socket) -> bytes:
    """Return what comes until the other end closes or resets the connection."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(4096):
            got += more
    return got


def test_a_body_that_does_not_arrive(server: Running) -> None:
    whole = posted("/v1/completions", ENDLESS)
    connection = server.connect(whole[:-5])
    assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    connection.close()


def test_beyond_the_queue_comes_429(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed = Slowed(server, monkeypatch)
    connections = []
    for number in range(2):
        connections.append(server.connect(posted("/v1/completions", {**ENDLESS, "max_tokens": 2})))
        until(lambda wanted=number: server.service.ready().active + server.service.ready().waiting == wanted + 1)
    status, headers, content = server.raw("/v1/completions", json.dumps(ENDLESS).encode())
    assert (status, int(headers["retry-after"]) >= 1) == (429, True)
    assert json.loads(content)["error"]["type"] == "rate_limit_error"
    # So many choices would not fit even when nobody else asks.
    assert server.ask("/v1/completions", {**ENDLESS, "n": 3})[0] == 429
    slowed.open()
    for connection in connections:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        connection.close()


def test_a_text_that_takes_too_long(chat_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(chat_store, model, Limits(parallel=1, context=512), request_seconds=0.2) as server:
        slowed = Slowed(server, monkeypatch)
        connection = server.connect(posted("/v1/completions", ENDLESS))
        until(lambda: slowed.passes)
        (text,) = server.service.ready()._active
        until(lambda: time.monotonic() > text.request.deadline)
        slowed.open()
        assert connection.recv(4096).startswith(b"HTTP/1.1 504 ")
        connection.close()
        streamed = server.raw("/v1/completions", json.dumps({**ENDLESS, "stream": True}).encode())[2]
        assert b'"error"' in streamed or b'"finish_reason": "length"' in streamed
        assert streamed.endswith(b"data: [DONE]\n\n")


def test_a_fault_of_ours_is_told_and_logged(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(shares: Any) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(server.service.ready(), "_run", failing)
    status, found = server.ask("/v1/completions", {"prompt": "In Python,", "max_tokens": 2})
    assert (status, "this is a fault of bincompress: ZeroDivisionError" in found["error"]["message"]) == (500, True)
    assert "ZeroDivisionError: a fault" in caplog.text
    assert "In Python" not in caplog.text
    monkeypatch.undo()
    assert server.ask("/v1/completions", {"prompt": "In Python,", "max_tokens": 2})[0] == 200


def test_two_hundred_connections(chat_store: Path, model: Model) -> None:
    with running(chat_store, model, Limits(parallel=4, waiting=200, context=512)) as server:
        body = posted("/v1/completions", {"prompt": "In Python,", "max_tokens": 3, "temperature": 0})
        connections = [server.connect(body) for _ in range(200)]
        texts = set()
        for connection in connections:
            with connection, connection.makefile("rb") as answer:
                assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
                length = 0
                while (line := answer.readline().lower()) != b"\r\n":
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                texts.add(json.loads(answer.read(length))["choices"][0]["text"])
        assert len(texts) == 1


def test_connections_are_bounded(chat_store: Path, model: Model) -> None:
    with running(chat_store, model, most_connections=4) as server:
        open_ones = [server.connect() for _ in range(4)]
        until(lambda: len(server.server.server_state.connections) == 4)
        assert server.raw("/health")[0] == 503
        for connection in open_ones:
            connection.close()
        until(lambda: not server.server.server_state.connections)
        assert server.raw("/health")[0] == 200


def test_keys(chat_store: Path, model: Model) -> None:
    with running(chat_store, model, api_keys=("first", "second")) as server:
        for key, status in (("first", 200), ("second", 200), ("third", 401), ("", 401)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            for path in ("/v1/models", "/metrics", "/api/tags", "/facts"):
                assert server.raw(path, headers=headers)[0] == status
            assert server.ask("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers)[0] == status
        assert server.raw("/health")[0] == server.raw("/")[0] == 200


def test_another_host_needs_a_key(tmp_path: Path, run: Run) -> None:
    with pytest.raises(BincompressError, match=r"--host 0\.0\.0\.0 can be reached from other machines: give --api-key"):
        ServeSettings(host="0.0.0.0")
    for host in ("127.0.0.1", "::1", "localhost", "127.3.4.5"):
        assert ServeSettings(host=host).is_local
    for host in ("::", "192.168.0.1", "example.com", "127.0.0.1.example.com"):
        with pytest.raises(BincompressError, match="can be reached from other machines: give --api-key"):
            ServeSettings(host=host)
    assert not ServeSettings(host="0.0.0.0", insecure=True).is_local
    assert not ServeSettings(host="0.0.0.0", api_keys=("k",)).is_local
    code, _, errors = run("serve", tmp_path, "--host", "0.0.0.0")
    assert (code, "--api-key-file" in errors) == (2, True)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_timeout_is_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(BincompressError, match="--timeout: expected seconds above 0"):
        ServeSettings(request_seconds=seconds)


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nabc\n\n  def  \n")
    assert read_keys(file) == ("abc", "def")
    for content, message in (("\n# none\n", "holds no API key"), ("a b\n", "a header cannot carry"), ("é\n", "header")):
        file.write_text(content)
        with pytest.raises(BincompressError, match=message):
            read_keys(file)
    with pytest.raises(BincompressError, match="cannot be read"):
        read_keys(tmp_path / "absent")


def test_more_texts_than_memory_are_refused(chat_store: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bincompress.serving.loading.free_memory", lambda: (10_000_000, "this machine"))
    check_fits(str(chat_store), model, Limits(parallel=1, context=512), 512)
    with pytest.raises(BincompressError, match=r"64 texts of 2,048 tokens need .* MB for their keys and values, 10"):
        check_fits(str(chat_store), model, Limits(parallel=64, context=8192), None)
    with pytest.raises(BincompressError, match="--context 4,096: expected at most 2,048, the model's limit"):
        check_fits(str(chat_store), model, Limits(context=4096), 4096)


class Process:
    """`bincompress serve` in a process of its own."""

    def __init__(self, store: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bincompress", "serve", str(store), "--port", "0", *options],
            cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self.port = int(re.findall(r":(\d+)", self.until("listening on"))[-1])
        self.until("the model is loaded")

    def until(self, text: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError("".join(self.lines))

    def end(self, number: int) -> tuple[int, str]:
        """Return the exit code and what was said last."""
        self.process.send_signal(number)
        assert self.process.stderr is not None
        rest = self.process.stderr.read()
        self.process.stderr.close()
        return self.process.wait(BOUND), rest


def test_sigterm_ends_a_server_whose_texts_would_go_on(chat_store: Path) -> None:
    """Within five seconds, by the clock that the process keeps itself to; the client is told."""
    served = Process(chat_store, "--threads", "1", "--context", "2048")
    with socket.create_connection(("127.0.0.1", served.port), BOUND) as client:
        # Many long texts, which take longer than the server waits for.
        body = {**ENDLESS, "stream": True, "n": 16, "max_tokens": 2000, "logprobs": 20}
        client.sendall(posted("/v1/completions", body))
        assert client.recv(12) == b"HTTP/1.1 200"
        begin = time.monotonic()
        reading = threading.Thread(target=lambda: everything_sent(client))
        reading.start()
        code, rest = served.end(signal.SIGTERM)
        seconds = time.monotonic() - begin
        reading.join(BOUND)
    assert (code, "ended by SIGTERM" in rest) == (143, True), rest
    assert seconds < 10  # five, and what a machine takes that does much else
    assert "In Python" not in "".join(served.lines) + rest  # prompts are not logged


def test_prompts_are_logged_where_asked_and_ctrl_c_ends_it(chat_store: Path) -> None:
    served = Process(chat_store, "--threads", "1", "--log-prompts")
    with socket.create_connection(("127.0.0.1", served.port), BOUND) as client:
        client.sendall(posted("/v1/completions", {"prompt": "In Python,", "max_tokens": 2}))
        assert client.recv(12) == b"HTTP/1.1 200"
        served.until("In Python,")
    code, rest = served.end(signal.SIGINT)
    assert (code, "interrupted" in rest) == (130, True)


def test_a_model_that_cannot_be_loaded_and_a_port_that_is_taken(tmp_path: Path, chat_store: Path, run: Run) -> None:
    code, _, errors = run("serve", tmp_path / "nowhere", "--port", 0)
    assert (code, errors.count("\n")) == (2, 2), errors
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, errors = run("serve", chat_store, "--port", taken.getsockname()[1])
    assert code == 2
    assert "cannot listen on 127.0.0.1 port" in errors
