"""A real S3 server on loopback, and a proxy before it that drops connections in the middle of a write."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """Run moto's server with an empty bucket named "bucket"; yields its host and port."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    s3fs.S3FileSystem.clear_instance_cache()  # those of a server before, at another port

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys).create_bucket(Bucket="bucket")
        yield host, port
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def s3_environment(url: str) -> dict[str, str]:
    """Return the environment variables with which programs find a server."""
    return {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip


class CuttingProxy:
    """Passes TCP on to a server, and resets connections half-way through the bodies of chosen PUT requests."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.cuts = 0
        self._chosen, self._left = b"", 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://{}:{}".format(*self._listener.getsockname())

    def cut(self, path: str, times: int) -> None:
        """Reset the next connections that write to a path which contains `path`."""
        with self._lock:
            self._chosen, self._left, self.cuts = path.encode(), times, 0

    def __enter__(self) -> "CuttingProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self.upstream)
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
                threading.Thread(target=_pump, args=(server, client), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), client, server:
            doomed = False
            while data := client.recv(1 << 16):
                doomed = doomed or self._choose(data)
                body = data.partition(b"\r\n\r\n")[2] if data.startswith(b"PUT ") else data
                if doomed and body:
                    server.sendall(data[: -(len(body) + 1) // 2])
                    # Lingering for no time at all makes closing a reset.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                server.sendall(data)

    def _choose(self, data: bytes) -> bool:
        with self._lock:
            found = data.startswith(b"PUT ") and self._chosen in data.partition(b"\r\n")[0] and self._left > 0
            self._left -= found
            self.cuts += found
            return found


def _pump(source: socket.socket, target: Any) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
