"""Are Hub ids resolved with real huggingface_hub calls? Against a local server that answers as the Hub does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bincompress.store.store import open_store
from tests.conftest import RunWithHub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves one folder as the model `team/tiny`."""

    folder: Path
    asked: list[str]
    mode = ""  # how it misbehaves
    daemon_threads = True
    release: threading.Event


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if self.server.mode == "silent":
            self.server.release.wait(120)
            return
        if self.server.mode == "portal":
            self.answer(200, b"<html>Please sign in</html>", {"Content-Type": "text/html"})
            return
        if self.server.mode:
            self.answer(int(self.server.mode), b"{}", {"X-Error-Message": "no"})
            return
        if path in ("/api/models/team/tiny", *(f"/api/models/team/tiny/revision/{r}" for r in ("main", "v1", COMMIT))):
            files = [{"rfilename": file.name} for file in self.server.folder.iterdir()]
            body = {
                "id": "team/tiny",
                "modelId": "team/tiny",
                "sha": COMMIT,
                "siblings": files,
                "tags": [],
                "private": False,
            }
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            return
        if path == f"/api/models/team/tiny/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"}
                for file in self.server.folder.iterdir()
            ]
            self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            return
        file = self.server.folder / path.split("/")[-1]
        if not path.startswith(f"/team/tiny/resolve/{COMMIT}/") or not file.is_file():
            code = "RepoNotFound" if "team/tiny" not in path else "EntryNotFound"
            self.answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not there"})
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            end = min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            self.answer(206, content[int(first) : end + 1], headers)
        else:
            self.answer(200, content, headers)


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[FakeHub]:
    server = FakeHub(("127.0.0.1", 0), Handler)
    server.folder, server.asked, server.release = tiny_model, [], threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("source", ["team/tiny", "team/tiny@v1"])
def test_a_hub_model_is_downloaded_and_compressed(
    hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path, source: str
) -> None:
    done = run_with_hub(hub.server_port, "compress", source, str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    inspected = run_with_hub(hub.server_port, "inspect", str(tmp_path / "store"), "--json")
    total = json.loads(inspected.stdout)["total"]
    assert (total["source"]["id"], total["source"]["revision"], total["complete"]) == ("team/tiny", COMMIT, 21)


def test_a_dry_run_fetches_headers_alone(hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(hub.server_port, "compress", "team/tiny", str(tmp_path / "store"), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["tensors"]["model.layers.0.mlp.up_proj.weight"]["method"] == "wgm"
    assert not (tmp_path / "store").exists()
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_a_name_that_the_hub_does_not_know(hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(hub.server_port, "compress", "team/other", str(tmp_path / "store"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: team/other: no such folder here, and the Hub says:")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_hub_that_cannot_be_reached(run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(9, "compress", "team/tiny", str(tmp_path / "store"))
    assert done.returncode == 2
    assert "could not be reached" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_source_that_is_neither_folder_nor_id(run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(9, "compress", "./no/such/folder", str(tmp_path / "store"))
    assert done.returncode == 2
    assert "neither a folder nor a Hub id" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", ["team/tiny", "team/tiny@v1", f"team/tiny@{COMMIT}"])
def test_what_is_cached_is_used_without_the_hub(
    hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path, source: str
) -> None:
    def compress(port: int = hub.server_port, **more: str) -> None:
        store = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        done = run_with_hub(port, "compress", source, str(store), **more)
        assert done.returncode == 0, done.stderr
        assert open_store(str(store)).attributes["source"]["revision"] == COMMIT  # type: ignore[index]

    compress()
    compress(HF_HUB_OFFLINE="1")
    compress(port=9)
    for mode in ("500", "429", "portal"):
        hub.mode = mode
        compress()
    done = run_with_hub(9, "compress", source, str(tmp_path / "dry"), "--dry-run", "--rate", "1GB")
    assert done.returncode == 0, done.stderr
    for weights in (tmp_path / "hub").rglob("*-00002-of-*.safetensors"):
        weights.unlink()
    done = run_with_hub(9, "compress", source, str(tmp_path / "part"))
    assert (done.returncode, "could not be reached" in done.stderr, done.stderr.count("\n")) == (2, True, 1)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("401", "log in (hf auth login)"),
        ("403", "ask for access on the model's page"),
        ("404", "check the name"),
        ("429", "too many requests"),
        ("500", "out of order (status 500)"),
        ("portal", "what answers is not the Hub"),
        ("silent", "gave no answer within 1 s"),
    ],
)
def test_what_the_hub_answers_is_one_true_line(
    hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path, mode: str, words: str
) -> None:
    hub.mode = mode
    code = (
        "import sys; from bincompress.sources import hub; from bincompress import cli; hub.ANSWER_SECONDS = 1.0\n"
        "sys.argv = ['bincompress', 'compress', 'team/tiny', sys.argv[1]]; cli.main()"
    )
    done = run_with_hub(hub.server_port, tmp_path / "store", code=code)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("error: team/tiny: ")
    assert done.stderr.count("\n") == 1


def test_a_cache_that_cannot_be_written(hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path) -> None:
    done = run_with_hub(hub.server_port, "compress", "team/tiny", str(tmp_path / "s"), HF_HOME="/dev/null/x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the Hub's cache cannot be written: /dev/null/x" in done.stderr


def test_only_the_weights_that_are_needed_are_fetched(hub: FakeHub, run_with_hub: RunWithHub, tmp_path: Path) -> None:
    for name in ("consolidated.safetensors", "pytorch_model.bin"):
        (hub.folder / name).write_bytes(b"a second set of weights")
    done = run_with_hub(hub.server_port, "compress", "team/tiny", str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    fetched = {path.split("/")[-1] for path in hub.asked if "/resolve/" in path}
    assert {name for name in fetched if name.endswith((".safetensors", ".bin"))} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
