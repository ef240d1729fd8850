"""Processes of their own, begun as copies of one that has imported everything: a fiftieth of a second in place of one.

Exit codes, streams, signals and environment are those of a real process. What tests of a beginning are about (imports,
PYTHONPATH, settings of Numba, the encoding of streams, main modules) takes a new interpreter instead.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
_SECONDS = 120  # that a process may take
_LONGEST = 1 << 17  # bytes of a request
# With what s3fs and huggingface_hub import, but not huggingface_hub, which reads the environment as it is imported.
_IMPORTED_LATE = ("zarr", "httpx", "httpx2", "truststore", "s3fs", "bincompress.inference.load", "tests.runs")
# Of commands that import PyTorch, Ray or a server.
_HEAVY = ("train", "distill", "serve")


@dataclass(frozen=True)
class Request:
    """What a process is to do."""

    arguments: list[str]
    code: str  # in place of the command line
    cwd: str
    environment: dict[str, str]


class Forked:
    """Begins processes that run the command line, or some code, and waits for each."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_SECONDS)
        self._socket = ours
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT,
                stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def __call__(
        self, *arguments: object, code: str = "", cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line, or this code, with arguments; environment: beside that of the tests."""
        words = [*map(str, arguments)]
        request = Request(words, code, str(cwd or Path.cwd()), {**os.environ, **(environment or {})})
        message = json.dumps(asdict(request)).encode()
        assert len(message) < _LONGEST
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as nothing:
            socket.send_fds(self._socket, [message], [nothing.fileno(), out.fileno(), err.fileno()])
            ended = int(self._socket.recv(64))
            written = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
        return subprocess.CompletedProcess(words, ended, *written)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._server.kill()
        self._server.wait()


def _import_all() -> None:
    import bincompress.commands

    for module in pkgutil.iter_modules(bincompress.commands.__path__):
        if module.name not in _HEAVY:
            importlib.import_module(f"bincompress.commands.{module.name}")
    for name in _IMPORTED_LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _wait_for_request(connection: socket.socket) -> tuple[Request, list[int]] | None:
    """Fork for each request, and return it in the new process; returns None in this one when there are no more."""
    while True:
        message, streams, _, _ = socket.recv_fds(connection, _LONGEST, 3)
        if not message:
            return None
        process = os.fork()
        if process == 0:
            connection.close()
            return Request(**json.loads(message)), streams
        for stream in streams:
            os.close(stream)
        connection.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


def _become(request: Request, streams: list[int]) -> None:
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = ["-c" if request.code else "bincompress", *request.arguments]
    if request.code:
        exec(compile(request.code, "<code>", "exec"), {"__name__": "__main__"})
        return
    from bincompress.cli import main

    main()


if __name__ == "__main__":
    _import_all()
    gc.freeze()
    _found = _wait_for_request(socket.socket(fileno=int(sys.argv[1])))
    if _found is not None:
        _become(*_found)
