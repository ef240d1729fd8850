"""Does a server stay as it began? Clients that ask, read and go away at random; its texts and its memory are looked at.

python -m benchmarks.serving STORE [--seconds 600] [--clients 16] [--parallel 4] [--texts 24] [--tokens 48]

Runs `bincompress serve STORE` in a process of its own. Each of some prompts is first asked alone, at temperature 0, by
one client. Then all clients ask for these at random, as streams or as a whole, and go away within many of them: while
they wait, while the prompt is read, or after some of the text. What comes has to be the text that came alone, or its
beginning. Prints memory, open files and threads. Exit code 1 where a text was another, an answer was
an error, a text went on without its client, or memory grew by more than 20 MB from the time when a tenth of the time
had passed. Needs /proc (Linux).
"""

import argparse
import contextlib
import http.client
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_MOST_GROWTH = 20_000_000  # bytes
_TOLD = 30  # seconds from one line to the next
_BOUND = 300.0  # seconds for one answer
_BEGINNINGS = (
    "The scheduler of an operating system", "In Python, a generator", "Once upon a time", "def sort(values):",
    "A binary weight is", "The process that", "1, 2, 3, 4,", "The largest city of",
)  # fmt: skip


@dataclass
class Found:
    """What the clients saw."""

    alone: dict[int, str] = field(default_factory=dict)  # texts by the numbers of their prompts
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, wrong: str = "") -> None:
        """Count an answer; wrong: what is wrong with it."""
        with self.lock:
            self.counts[what] += 1
            if wrong:
                self.wrong.append(wrong)


class Server:
    """The server's process."""

    def __init__(self, store: str, parallel: int, clients: int, options: list[str]) -> None:
        command = [sys.executable, "-m", "bincompress", "serve", store, "--port", "0", "--parallel", str(parallel)]
        self.process = subprocess.Popen(
            [*command, "--queue", str(clients), "--context", "1024", *options], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.port = 0
        for line in self.process.stderr:
            if listening := re.search(r"listening on \S+:(\d+)", line):
                self.port = int(listening[1])
            if "the model is loaded" in line:
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if " 200, " not in line and " 499, " not in line:
                print(f"server: {line.rstrip()}", flush=True)

    def memory(self) -> int:
        """Return its resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024

    def handles(self) -> tuple[int, int]:
        """Return how many files it has open, and how many threads."""
        folder = Path(f"/proc/{self.process.pid}")
        return len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))

    def gauge(self, name: str) -> float:
        """Return one of its metrics."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=_BOUND)) as connection:
            connection.request("GET", "/metrics")
            return float(re.findall(rf"^{name} (\S+)$", connection.getresponse().read().decode(), re.M)[0])


def body_of(number: int, tokens: int, stream: bool) -> bytes:
    """Return the request for a text: prompts differ in length, and some begin alike."""
    words = " ".join(_BEGINNINGS[(number * 3 + at) % len(_BEGINNINGS)] for at in range(1 + number % 5))
    prompt = f"{words} {number // 2}"
    asked = {"prompt": prompt, "max_tokens": tokens - number % 7, "temperature": 0, "stream": stream}
    return json.dumps(asked).encode()


@contextlib.contextmanager
def asked(port: int, body: bytes) -> Iterator[http.client.HTTPConnection]:
    """Ask for a text; at the end of the block the connection is closed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_BOUND)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        yield connection


def pieces(response: http.client.HTTPResponse) -> Iterator[str]:
    """Yield the texts of a stream; ValueError where an error comes in place of one, or the end is missing."""
    for line in response:
        if line == b"data: [DONE]\n":
            return
        if line.startswith(b"data: "):
            found = json.loads(line[6:])
            if "error" in found:
                raise ValueError(found["error"]["message"])
            yield found["choices"][0]["text"]
    raise ValueError("the stream broke off")


def whole(port: int, number: int, tokens: int) -> str:
    """Return a text that is asked for as a whole."""
    with asked(port, body_of(number, tokens, False)) as connection:
        response = connection.getresponse()
        found = json.loads(response.read())
    if response.status != 200:
        raise ValueError(f"{response.status}: {found['error']['message']}")
    text: str = found["choices"][0]["text"]
    return text


def client(port: int, tokens: int, found: Found, seed: int, end: float) -> None:
    """Ask until the time is over; each third text is cancelled."""
    chance = random.Random(seed)
    while time.monotonic() < end:
        number = chance.choice(list(found.alone))
        try:
            kind, text = one(port, number, tokens, chance)
        except (OSError, ValueError, http.client.HTTPException) as error:
            found.note("error", f"prompt {number}: {type(error).__name__}: {error}")
            continue
        expected = found.alone[number]
        right = text == expected if kind in ("whole", "stream") else expected.startswith(text)
        found.note(kind, "" if right else f"prompt {number}, {kind}: expected {expected!r}, found {text!r}")


def one(port: int, number: int, tokens: int, chance: random.Random) -> tuple[str, str]:
    """Ask for one text in one of the ways; return which, and what came."""
    way = chance.random()
    if way < 0.15:
        return "whole", whole(port, number, tokens)
    with asked(port, body_of(number, tokens, way < 0.85)) as connection:
        if way >= 0.7:  # gone before the answer begins, or soon after
            connection.sock.settimeout(chance.random() * 2)
            with contextlib.suppress(socket.timeout):
                connection.getresponse()
            return "cancelled early", ""
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status}: {response.read()!r}")
        most = chance.randrange(1, tokens) if way < 0.4 else None
        text = ""
        for read, piece in enumerate(pieces(response)):
            text += piece
            if read == most:
                return "cancelled", text
    return "stream", text


def watched(server: Server, end: float) -> list[int]:
    """Return the server's memory, each second until the end."""
    memory: list[int] = []
    begin = time.monotonic()
    while time.monotonic() < end:
        memory.append(server.memory())
        if len(memory) % _TOLD == 1:
            files, threads = server.handles()
            print(
                f"{time.monotonic() - begin:5.0f} s: {memory[-1] / 1e6:,.1f} MB, {files} files, {threads} threads, "
                f"{server.gauge('bincompress_prefix_bytes') / 1e6:,.1f} MB of earlier texts",
                flush=True,
            )
        time.sleep(1)
    return memory


def main() -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("options", nargs="*", help="of bincompress serve, behind --")
    given = parser.parse_args()
    server = Server(given.store, given.parallel, given.clients, given.options)
    found = Found()
    try:
        for number in range(given.texts):
            found.alone[number] = whole(server.port, number, given.tokens)
        print(f"{given.texts} texts alone, {server.memory() / 1e6:,.1f} MB", flush=True)
        end = time.monotonic() + given.seconds
        clients = [
            threading.Thread(target=client, args=(server.port, given.tokens, found, seed, end), daemon=True)
            for seed in range(given.clients)
        ]
        for each in clients:
            each.start()
        memory = watched(server, end)
        for each in clients:
            each.join(_BOUND)
        return told(server, found, memory)
    finally:
        server.process.terminate()
        server.process.wait()


def told(server: Server, found: Found, memory: list[int]) -> int:
    """Print what was found; return the exit code."""
    time.sleep(2)
    left = server.gauge("bincompress_texts_written_now") + server.gauge("bincompress_texts_waiting")
    tenth = max(len(memory) // 10, 1)
    growth = int(statistics.median(memory[-tenth:]) - statistics.median(memory[tenth : 2 * tenth] or memory[:1]))
    counted = ", ".join(f"{count:,} {what}" for what, count in sorted(found.counts.items()))
    print(f"answers: {counted}; {len(found.wrong)} wrong; {left:g} texts left without a client")
    print(
        f"memory from the second tenth of the time to the last: {growth / 1e6:+.1f} MB; at most {max(memory):,} bytes"
    )
    print("\n".join(found.wrong[:20]))
    return int(bool(found.wrong) or bool(left) or growth > _MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
