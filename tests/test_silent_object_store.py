"""Servers that take connections and never answer: named in one line, after a stated time, for every kind of URL."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bincompress.errors import StoreError
from bincompress.store import objects
from bincompress.store.new_file import _upload
from bincompress.store.pack_files import RemoteRanges
from tests.s3 import s3_environment

s3fs = pytest.importorskip("s3fs")


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of such a server, which is also S3's."""
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.5)
    s3fs.S3FileSystem.clear_instance_cache()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        host, port = listener.getsockname()
        for name, value in s3_environment(f"http://{host}:{port}").items():
            monkeypatch.setenv(name, value)
        yield f"http://{host}:{port}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "ask"),
    [
        ("s3://bucket/store", objects.ObjectFiles),
        ("s3://bucket/m.bincompress.zip", RemoteRanges.there),
        ("{}/m.bincompress.zip", RemoteRanges.there),
        ("s3://bucket/m.bincompress.zip", lambda url: _upload(Path(__file__), url)),
    ],
)
def test_a_silent_server_is_named(url: str, ask: Callable[[str], object], silent: str) -> None:
    if url.startswith("{}"):
        pytest.importorskip("aiohttp")
    # One that is equal, with another endpoint, says nothing of this one.
    before = s3fs.S3FileSystem()
    setattr(before, objects._ANSWERED, {"bucket"})
    s3fs.S3FileSystem.clear_instance_cache()
    assert before == s3fs.S3FileSystem()
    with pytest.raises(StoreError, match=r"^(s3|http)://.*: no answer within 0.5 s; check the network and"):
        ask(url.format(silent))
