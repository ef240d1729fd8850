"""A web server on loopback that answers requests for parts of files, and counts what it is asked for."""

import contextlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.served import served


class RangeServer(ThreadingHTTPServer):
    """Serves the files of a folder; `asked` has the (start, end) of each GET."""

    folder: Path
    asked: list[tuple[int, int]]
    ranges = True  # whether it answers with parts
    daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: RangeServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together: apart, each answer takes 40 ms more

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        start, end = 0, len(content)
        asked = self.headers.get("Range") if self.server.ranges else None
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1, len(content))
        self.send_response(206 if asked else 200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if body:
            self.server.asked.append((start, end))
            with contextlib.suppress(OSError):
                self.wfile.write(content[start:end])


@contextlib.contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder."""
    server = RangeServer(("127.0.0.1", 0), _Handler)
    server.folder, server.asked = folder, []
    with served(server):
        yield server
