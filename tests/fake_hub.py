"""Servers on loopback that answer as the Hugging Face Hub does: one with a model, and one to upload to."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = "team/base"


class _Handler(BaseHTTPRequestHandler):
    """What both have in common: one answer with its headers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, found: Any = None, headers: dict[str, str] | None = None) -> None:
        """Send bytes as they are, or anything else as JSON."""
        body = found if isinstance(found, bytes) else json.dumps(found or {}).encode()
        kind = {} if isinstance(found, bytes) else {"Content-Type": "application/json"}
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **kind, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        """Say that a model ("RepoNotFound") or a file ("EntryNotFound") is not there."""
        self.answer(404, {}, {"X-Error-Code": code, "X-Error-Message": "not there"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError


class FakeHub(ThreadingHTTPServer):
    """Serves one folder as the model `team/tiny`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _ModelHandler)
        self.folder = folder
        self.asked: list[str] = []
        self.mode = ""  # how it answers everything: a status, "portal", "silent"
        self.fault = ""  # how it answers questions for files alone
        self.release = threading.Event()

    def server_close(self) -> None:
        self.release.set()
        super().server_close()


class _ModelHandler(_Handler):
    server: FakeHub

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if self.server.mode:
            self._misbehave(self.server.mode)
        elif path in (
            "/api/models/team/tiny",
            *(f"/api/models/team/tiny/revision/{name}" for name in ("main", "v1", COMMIT)),
        ):
            files = [{"rfilename": file.name} for file in self.server.folder.iterdir()]
            model = {"id": "team/tiny", "modelId": "team/tiny", "sha": COMMIT, "tags": [], "private": False}
            self.answer(200, {**model, "siblings": files})
        elif path == f"/api/models/team/tiny/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"}
                for file in self.server.folder.iterdir()
            ]
            self.answer(200, entries)
        elif self.server.fault and "/resolve/" in path:
            self._send_faulty(self.server.folder / path.split("/")[-1], self.server.fault)
        else:
            file = self.server.folder / path.split("/")[-1]
            if path.startswith(f"/team/tiny/resolve/{COMMIT}/") and file.is_file():
                self._send(file.read_bytes())
            else:
                self.missing("RepoNotFound" if "team/tiny" not in path else "EntryNotFound")

    def _misbehave(self, mode: str) -> None:
        if mode == "silent":
            self.server.release.wait(120)
        elif mode == "portal":
            self.answer(200, b"<html>Please sign in</html>", {"Content-Type": "text/html"})
        else:
            self.answer(int(mode), {}, {"X-Error-Message": "no"})

    def _send(self, content: bytes) -> None:
        headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "Range" not in self.headers:
            self.answer(200, content, headers)
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        end = min(int(last or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
        self.answer(206, content[int(first) : end + 1], headers)

    def _send_faulty(self, file: Path, fault: str) -> None:
        content = file.read_bytes() if file.is_file() else b""
        weights = file.suffix == ".safetensors"
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if fault == "waits":
            self.answer(429, {}, {"Retry-After": "3600", "ratelimit": '"api";r=0;t=3600'})
        elif fault == "circles":
            self.answer(302, b"", {**headers, "Location": self.path})
        elif fault == "damaged" and weights:
            self.answer(200, content[:-1] + b"\1", headers)
        elif fault == "shortened" and weights:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:100])
                self.close_connection = True
        elif fault == "page" and weights:
            self.answer(200, b"<html>Please sign in</html>", headers)
        elif not content:
            self.missing("EntryNotFound")
        else:
            self.answer(200, content, headers)


class UploadHub(ThreadingHTTPServer):
    """Keeps repositories in memory: files by name, commits by number."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _UploadHandler)
        self.repos: dict[str, dict[str, bytes]] = {BASE: {}}
        self.private: dict[str, bool] = {}
        self.branches: list[str] = []
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.asked: list[str] = []
        self.fails = 0  # so many uploads are cut off

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


class _UploadHandler(_Handler):
    server: UploadHub

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo in self.server.repos:
                files = self.server.repos[repo]
                card = {"license": "apache-2.0"} if repo == BASE else None
                found = {"id": repo, "sha": self.server.sha(repo), "private": self.server.private.get(repo, False)}
                self.answer(
                    200, {**found, "siblings": [{"rfilename": name} for name in files], "tags": [], "cardData": card}
                )
                return
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.server.repos.get(repo, {}).get(name)
        if content is None:
            self.missing("EntryNotFound" if repo in self.server.repos else "RepoNotFound")
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.server.sha(repo)}
        self.answer(200, content, headers)

    def do_PUT(self) -> None:
        content = self.body()
        if self.server.fails:
            self.server.fails -= 1
            self.answer(400, {"error": "cut off"})
            return
        self.server.asked.append("PUT")
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200)

    def do_POST(self) -> None:
        path, content = self.path.split("?")[0], self.body()
        self.server.asked.append(f"POST {path}")
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.server.repos:
                self.answer(409, {"url": f"{self.server.url}/{repo}"})
                return
            self.server.repos[repo] = {}
            self.server.private[repo] = asked.get("visibility") == "private"
            self.answer(200, {"url": f"{self.server.url}/{repo}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "preupload" in parts:
            here = self.server.repos["/".join(parts[2:4])]
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".zip") else "regular",
                 "shouldIgnore": False, "oid": oid(file["path"], here.get(file["path"]))}
                for file in json.loads(content)["files"]
            ]  # fmt: skip
            self.answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            for each in objects:
                if each["oid"] not in self.server.large:
                    each["actions"] = {"upload": {"href": f"{self.server.url}/put"}}
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "branch" in parts:
            self.server.branches.append(parts[-1])
            self.answer(200)
        elif "commit" in parts:
            repo = "/".join(parts[2:4])
            for line in content.splitlines():
                found = json.loads(line)
                value = found["value"]
                if found["key"] == "file":
                    self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif found["key"] == "lfsFile":
                    self.server.repos[repo][value["path"]] = self.server.large[value["oid"]]
            sha = self.server.sha(repo)
            self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})


def oid(path: str, content: bytes | None) -> str | None:
    if content is None:
        return None
    if path.endswith(".zip"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
