"""How many requests does a store in a bucket take, and is Zarr needed to read and write it?"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bincompress.inference.load import load_decoder
from bincompress.model.packed_linear import ActivationSettings
from bincompress.store.store import Store, open_store
from tests.runs import problems, run
from tests.s3 import s3_environment, s3_server


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Methods and paths of requests to an S3 server, as they are sent."""
    session = pytest.importorskip("aiobotocore.httpsession").AIOHTTPSession
    sent: list[str] = []
    real = session.send

    async def send(self: Any, request: Any) -> Any:
        sent.append(f"{request.method} {request.url}")
        return await real(self, request)

    monkeypatch.setattr(session, "send", send)
    with s3_server() as (host, port):
        for name, value in s3_environment(f"http://{host}:{port}").items():
            monkeypatch.setenv(name, value)
        yield sent


def counted(requests: list[str], what: Callable[[], Any]) -> tuple[int, Counter[str]]:
    """Return how many requests were sent, and how many for each tensor."""
    requests.clear()
    what()
    return len(requests), Counter(
        match[1] for line in requests if (match := re.search(r"(?:tensors|plain|log)(?:/|%2F)([\w.]+)", line))
    )


@pytest.mark.slow
def test_requests_for_each_tensor(requests: list[str], tiny_model: Path, tmp_path: Path) -> None:
    url, count = "s3://bucket/requests", 21
    total, each = counted(requests, lambda: run(tiny_model, url))
    # A listing, two for each array, its attributes, its log and a look at them; the holder of the store is asked for.
    assert max(each.values()) <= 8
    assert total <= 10 * count
    total, each = counted(requests, lambda: load_decoder(url, 1, ActivationSettings()))
    assert max(each.values()) <= 2
    assert total <= 2 * count + 12
    total, _ = counted(requests, lambda: run(tiny_model, url))
    assert total <= 4 * count
    assert problems(url) == {}
    # A store that was uploaded has no object of all attributes, and loads all the same.
    import s3fs

    run(tiny_model, tmp_path / "local")
    s3fs.S3FileSystem().put(str(tmp_path / "local"), "bucket/uploaded", recursive=True)
    total, each = counted(requests, lambda: load_decoder("s3://bucket/uploaded", 1, ActivationSettings()))
    assert max(each.values()) <= 3
    assert total <= 3 * count + 12
    assert problems("s3://bucket/uploaded") == {}


def test_no_zarr_is_imported_to_load_write_or_compress(tiny_stores: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from bincompress.store.store import begin_store, open_store\n"
        "store = open_store(sys.argv[1])\n"
        "[store.read_packed(name) for name, kind in store.tensors().items() if kind == 'packed']\n"
        "begin_store(sys.argv[2], {'tensors': {}}, {'a': b'b'}, '', False)\n"
        "from bincompress import compress\n"
        "assert compress(sys.argv[3], sys.argv[4]).complete\n"
        "sys.exit('zarr' in sys.modules)\n"
    )
    places = [tiny_stores / "archive", tmp_path / "new", tiny_stores / "model", tmp_path / "made"]
    arguments = [sys.executable, "-c", script, *map(str, places)]
    assert subprocess.run(arguments, check=False).returncode == 0
    assert isinstance(open_store(str(tmp_path / "new")), Store)
