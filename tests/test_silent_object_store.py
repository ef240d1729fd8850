"""An object store that takes connections and never answers: named in one line, after a stated time."""

import socket

import pytest

from bincompress.errors import StoreError
from bincompress.store import objects
from tests.s3 import s3_environment


def test_a_silent_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.5)
    s3fs.S3FileSystem.clear_instance_cache()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        host, port = listener.getsockname()
        for name, value in s3_environment(f"http://{host}:{port}").items():
            monkeypatch.setenv(name, value)
        # One that is equal, with another endpoint, says nothing of this one.
        before = s3fs.S3FileSystem()
        setattr(before, objects._ANSWERED, True)
        s3fs.S3FileSystem.clear_instance_cache()
        assert before == s3fs.S3FileSystem()
        with pytest.raises(StoreError, match=r"^s3://bucket/store: no answer within 0.5 s; check the network and"):
            objects.ObjectFiles("s3://bucket/store")
    s3fs.S3FileSystem.clear_instance_cache()
