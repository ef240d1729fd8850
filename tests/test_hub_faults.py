"""What if the Hub lets one wait, sends one in circles, or sends other bytes? One line, in time, and nothing is kept."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RunWithHub
from tests.test_hub import COMMIT, FakeHub, Handler

# The client's own waits take no time, and are told.
TIMED = (
    "import sys, time; from bincompress import cli; waits = []; time.sleep = waits.append\n"
    "import atexit; atexit.register(lambda: print('waits', max(waits, default=0)))\n"
    "sys.argv = ['bincompress', *sys.argv[1:]]; cli.main()"
)


class FaultyHub(FakeHub):
    """Answers questions about models well, and those for files as its fault says."""

    fault = ""


class FaultyHandler(Handler):
    """Answers the requests of a FaultyHub."""

    server: FaultyHub

    def do_GET(self) -> None:  # noqa: N802
        mode, path = self.server.fault, self.path.split("?")[0]
        if "/resolve/" not in path or not mode:
            super().do_GET()
            return
        self.server.asked.append(path)
        file = self.server.folder / path.split("/")[-1]
        content = file.read_bytes() if file.is_file() else b""
        weights = file.suffix == ".safetensors"
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if mode == "waits":
            self.answer(429, b"{}", {"Retry-After": "3600", "ratelimit": '"api";r=0;t=3600'})
        elif mode == "circles":
            self.answer(302, b"", {**headers, "Location": self.path})
        elif mode == "damaged" and weights:
            self.answer(200, content[:-1] + b"\1", headers)
        elif mode == "shortened" and weights:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:100])
                self.close_connection = True
        elif mode == "page" and weights:
            self.answer(200, b"<html>Please sign in</html>", headers)
        elif not content:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "not there"})
        else:
            self.answer(200, content, headers)


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[FaultyHub]:
    server = FaultyHub(("127.0.0.1", 0), FaultyHandler)
    server.folder, server.asked, server.release = tiny_model, [], threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("waits", "too many requests"),
        ("circles", "redirect"),
        ("shortened", "the download broke off: "),
        ("damaged", "came damaged, and was removed from the cache"),
        ("page", "came damaged"),
    ],
)
def test_a_hub_that_does_not_give_the_weights(
    hub: FaultyHub, run_with_hub: RunWithHub, tmp_path: Path, mode: str, words: str
) -> None:
    hub.fault = mode
    done = run_with_hub(hub.server_port, "compress", "team/tiny", tmp_path / "store", code=TIMED)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert len(told) == 1
    assert told[0].startswith("error: team/tiny: ")
    assert words in told[0]
    assert "Traceback" not in done.stderr
    assert float(done.stdout.split("waits ")[1]) <= 8
    assert not (tmp_path / "store").exists()
    hub.fault = ""
    done = run_with_hub(hub.server_port, "compress", "team/tiny", tmp_path / "store", code=TIMED)
    assert done.returncode == 0, done.stderr


def test_a_store_is_asked_for_once(run_with_hub: RunWithHub, hub: FaultyHub) -> None:
    for port, mode, words in ((9, "", "could not be reached"), (hub.server_port, "waits", "too many requests")):
        hub.fault = mode
        done = run_with_hub(port, "inspect", "team/tiny", code=TIMED)
        assert (done.returncode, done.stdout) == (2, "waits 0\n")
        assert words in done.stderr
        assert done.stderr.startswith("error: team/tiny: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("models",), ("compress", "team/tiny", "store")])
def test_a_user_without_a_home(run_with_hub: RunWithHub, hub: FaultyHub, command: tuple[str, ...]) -> None:
    # As of a container whose user has no entry in /etc/passwd.
    code = (
        "import os, sys; from bincompress import cli; os.getuid = lambda: 54321\n"
        "for name in ('HOME', 'HF_HOME', 'XDG_CACHE_HOME'): os.environ.pop(name, None)\n"
        "sys.argv = ['bincompress', *sys.argv[1:]]; cli.main()"
    )
    done = run_with_hub(hub.server_port, *command, code=code)
    assert done.returncode == 2
    assert "this user has no home folder; set HOME" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
