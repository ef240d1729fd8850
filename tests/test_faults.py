"""Is every failure one true line with the right exit code: object stores, streams, packages, drawing, NaN?"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import bincompress.inference.load  # noqa: F401 (before tests that put something else in the place of its imports)
from bincompress import cli
from tests.conftest import DEMO_MODEL, Run
from tests.forked import Forked
from tests.s3 import s3_environment, s3_server
from tests.served import served

ROOT = Path(__file__).parents[1]
BOUND = 120


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command in which $BC is the command line."""
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, check=False, timeout=BOUND, cwd=ROOT, stdin=subprocess.DEVNULL,
        env={**os.environ, "BC": f"{sys.executable} -m bincompress", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def one_line(done: subprocess.CompletedProcess[bytes] | subprocess.CompletedProcess[str]) -> str:
    errors = done.stderr if isinstance(done.stderr, str) else done.stderr.decode()
    assert errors.count("\n") == 1, errors
    return errors


# Streams


def test_a_full_standard_output(demo: Path) -> None:
    done = shell(f"$BC inspect {demo} > /dev/full")
    assert (done.returncode, "standard output or error cannot be written" in one_line(done)) == (2, True)


def test_a_reader_that_ends(demo: Path) -> None:
    done = shell(f"set -o pipefail 2>/dev/null; $BC inspect {demo} --json | head -c 1; true")
    assert done.stderr == b""
    done = shell(f"($BC verify {demo}; echo $? >&2) | true")
    assert done.stderr.split()[-1:] in ([b"141"], [b"0"])  # 0 where the reader ended later


@pytest.mark.slow
def test_closed_streams(demo: Path, tmp_path: Path) -> None:
    assert shell(f"$BC verify {demo} 2>&-").returncode == 0
    assert shell(f"$BC verify {demo} >&-").returncode == 0
    assert shell(f"$BC verify {demo} >&- 2>&- <&-").returncode == 0
    done = shell(f"$BC compress {DEMO_MODEL} {tmp_path / 'store'} 2>&-")
    assert (done.returncode, (tmp_path / "store").is_dir()) == (0, True)
    assert shell(f"$BC verify {tmp_path / 'store'}").returncode == 0
    done = shell(f"$BC generate {demo} - --max-tokens 2 <&-")
    assert (done.returncode, "standard input, which is closed" in one_line(done)) == (2, True)
    done = shell(f"$BC inspect {tmp_path / 'nowhere'} 2>&-")
    assert done.returncode == 2


def test_a_prompt_that_is_not_utf8(demo: Path) -> None:
    done = shell(f"printf 'Gr\\374\\337e' | $BC generate {demo} - --max-tokens 2")
    assert (done.returncode, "not UTF-8 text: byte 0xfc at place 2" in one_line(done)) == (2, True)
    done = shell(f"$BC generate {demo} \"$(printf 'Gr\\374')\" --max-tokens 2")
    assert (done.returncode, "text: not UTF-8: '\\udcfc' at place 2" in one_line(done)) == (2, True)


def test_a_terminal_of_another_encoding(demo: Path, tmp_path: Path) -> None:
    place = tmp_path / "界"
    place.symlink_to(demo)
    done = shell(f"$BC verify {place}", PYTHONIOENCODING="latin-1")
    assert (done.returncode, b"\\u754c: every tensor is as it was written" in done.stdout) == (0, True)
    assert "standard output is latin-1" in one_line(done) or "iso8859-1" in one_line(done)


# Exit codes


def test_a_fault_of_the_program_is_one_line(run: Run, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(url: str) -> Any:
        raise KeyError("surprise")

    monkeypatch.setattr("bincompress.store.store.open_store", broken)
    code, _, errors = run("verify", demo)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: this is a fault of bincompress: KeyError: 'surprise'; ")
    code, _, errors = run("--debug", "verify", demo)
    assert "Traceback" in errors
    assert code == 2


class CodedError(Exception):
    """As botocore's ClientError, with the code of an answer."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (ModuleNotFoundError("No module named 's3fs'", name="s3fs"), "pip install 'bincompress[s3]'"),
        (ImportError("Install gcsfs to access Google Storage"), "pip install 'gcsfs'"),
        (RuntimeError("can't start new thread"), "no more threads can be started"),
        (ValueError("Protocol not known: ftpx"), "not a kind of URL"),
        (OSError(28, "No space left on device", "x"), "x: No space left on device; free some space"),
        (TimeoutError("slow"), "no answer in time"),
        (RuntimeError("Could not determine home directory."), "this user has no home folder; set HOME"),
        (CodedError("PreconditionFailed"), "an object was changed while it was read"),
    ],
)
def test_known_failures(run: Run, demo: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def broken(url: str) -> Any:
        raise error

    monkeypatch.setattr("bincompress.store.store.open_store", broken)
    for arguments in (("verify", demo), ("inspect", demo), ("export", demo, "x"), ("generate", demo, "x")):
        monkeypatch.setattr("bincompress.inference.load.open_store", broken)
        code, _, errors = run(*arguments)
        assert (code, errors.count("\n")) == (2, 1)
        assert words in errors


@pytest.mark.parametrize(
    ("command", "kept"), [("compress", True), ("calibrate", True), ("batch", True), ("export", False), ("bench", False)]
)
def test_an_interrupts_words_are_true(run: Run, monkeypatch: pytest.MonkeyPatch, command: str, kept: bool) -> None:
    import click

    @click.command()
    @click.argument("words", nargs=-1)
    def interrupted(words: tuple[str, ...]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._Commands, "get_command", lambda self, context, name: interrupted)
    code, _, errors = run(command, "a", "b")
    assert code == 130
    assert errors.strip() == "interrupted" + (
        "; completed work is kept: run the same command again to resume" if kept else ""
    )


# Object stores


class Faulty(ThreadingHTTPServer):
    """S3 that says no."""

    status, code, asked = 403, "AccessDenied", 0
    daemon_threads = True


class Refusal(BaseHTTPRequestHandler):
    server: Faulty
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked += 1
        body = f'<?xml version="1.0"?><Error><Code>{self.server.code}</Code><Message>No.</Message></Error>'.encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


for _method in ("HEAD", "PUT", "POST", "DELETE"):
    setattr(Refusal, f"do_{_method}", Refusal.do_GET)


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with served(Faulty(("127.0.0.1", 0), Refusal)) as server:
        yield server


def keys(url: str) -> dict[str, str]:
    return {
        **s3_environment(url), "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


COMMANDS = (
    "inspect s3://bucket/st",
    "verify s3://bucket/st",
    "generate s3://bucket/st x",
    "compress MODEL s3://bucket/st",
)


def with_model(command: str, model: Path) -> list[str]:
    return command.replace("MODEL", str(model)).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_access_is_denied(forked: Forked, faulty: Faulty, tiny_model: Path, command: str) -> None:
    pytest.importorskip("s3fs")
    done = forked(*with_model(command, tiny_model), environment=keys(f"http://127.0.0.1:{faulty.server_port}"))
    assert done.returncode == 2
    assert "denied" in one_line(done).lower() or "Forbidden" in one_line(done)


@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_is_at_the_endpoint(forked: Forked, tiny_model: Path, command: str) -> None:
    pytest.importorskip("s3fs")
    done = forked(*with_model(command, tiny_model), environment=keys("http://127.0.0.1:9"))
    assert done.returncode == 2
    assert "the object store cannot be reached" in one_line(done)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_credentials(forked: Forked, tiny_model: Path, tmp_path: Path, command: str) -> None:
    pytest.importorskip("s3fs")
    nothing = {
        **keys("http://127.0.0.1:9"), "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": str(tmp_path),
        "BINCOMPRESS_CACHE": os.environ.get("BINCOMPRESS_CACHE") or str(Path.home() / ".cache" / "bincompress"),
    }  # fmt: skip
    done = forked(*with_model(command, tiny_model), environment=nothing)
    assert done.returncode == 2
    assert "no usable credentials for the object store" in one_line(done)


@pytest.mark.slow
@pytest.mark.parametrize("url", ["s3://bucket/st", "gs://bucket/st", "nonsense://bucket/st"])
def test_a_missing_package(forked: Forked, tiny_model: Path, tmp_path: Path, url: str) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("s3fs", "gcsfs"):
        (hidden / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n")
    code = "import sys; sys.modules.pop('s3fs', None); sys.path.insert(0, sys.argv.pop(1))\n"
    code += "from bincompress.cli import main; main()"
    for command in (f"inspect {url}", f"verify {url}", f"compress {tiny_model} {url}", f"generate {url} x"):
        done = forked(hidden, *command.split(), code=code)
        assert done.returncode == 2
        assert ("is not installed: pip install" if "nonsense" not in url else "Protocol not known") in one_line(done)


def test_a_token_that_expires_stops_the_run_at_once(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    from bincompress.store.store import Store

    tried: list[str] = []

    def expired(self: Store, name: str, *rest: Any) -> Any:
        tried.append(name)
        from botocore.exceptions import ClientError

        answer = {"Error": {"Code": "400", "Message": "Bad Request"}}
        raise OSError(22, "Bad Request") from ClientError(answer, "HeadObject")  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "write_packed", expired)
    code, _, errors = run("compress", tiny_model, tiny_model.parent / "store")
    assert (code, len(tried), errors.count("\n")) == (2, 1, 1)
    assert "Bad Request" in errors
    assert "run the same command again to resume" in errors


@pytest.mark.slow
def test_verify_finds_no_damage_where_it_may_not_read(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    with s3_server() as (host, port):
        url = f"http://{host}:{port}"
        for name, value in keys(url).items():
            monkeypatch.setenv(name, value)
        assert run("compress", tiny_model, "s3://bucket/store")[0] == 0
        assert run("verify", "s3://bucket/store")[0] == 0
        from bincompress.store import reading

        def denied(*given: Any) -> Any:
            raise PermissionError("Access Denied")

        monkeypatch.setattr(reading, "read_array", denied)
        code, _, errors = run("verify", "s3://bucket/store")
        assert (code, "access is denied" in errors) == (2, True)


# Reports


def test_a_report_of_a_store_without_its_log(run: Run, demo: Path, tmp_path: Path) -> None:
    store, page = tmp_path / "store", tmp_path / "report.html"
    shutil.copytree(demo, store)
    shutil.rmtree(store / "log")
    assert run("report", store, "--out", page)[0] == 0
    assert "no times" in page.read_text()


def test_a_report_from_a_notebooks_shell(forked: Forked, demo: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = forked(
        "report", demo, "--out", page, environment={"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    )
    told = [line for line in done.stderr.splitlines() if not line.startswith("compiling kernels")]
    assert (done.returncode, told, page.is_file()) == (0, [], True)


def test_a_report_that_fails_leaves_the_old_page(
    run: Run, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "report.html"
    old = "<!doctype html><title>bincompress: old</title>"
    page.write_text(old)

    def full(self: Path, text: str, *rest: Any) -> int:
        with open(self, "w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, errors = run("report", demo, "--out", page)
    assert (code, page.read_text(), list(tmp_path.iterdir())) == (2, old, [page])
    assert "No space left on device" in errors


# Numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.input_layernorm.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_no_text_and_no_figure_from_nan(run: Run, demo: Path, tmp_path: Path, name: str, value: float) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    changed = tensors[name].astype(np.float32)
    changed.reshape(-1)[5::997] = value
    tensors[name] = changed.astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(tensors, file)
    text = tmp_path / "text.txt"
    text.write_text("The scheduler decides which process runs next. " * 30)
    # What compressing says of such a tensor is tested elsewhere; here the model runs from its checkpoint.
    code, out, errors = run("evaluate", folder, "--text", text, "--context", 64, "--windows", 1)
    assert (code, out) == (2, "")
    assert "NaN or infinity" in errors
    assert errors.strip().splitlines()[-1].startswith("error: ")


def test_generate_prints_nothing_from_nan(run: Run, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bincompress.store.store import Store

    read = Store.read_plain

    def damaged(self: Store, name: str, **options: Any) -> Any:
        weight, shape = read(self, name, **options)
        if name == "model.layers.1.input_layernorm.weight":
            object.__setattr__(weight, "bits", weight.bits.copy())
            weight.bits.reshape(-1)[5] = 0x7FC0  # NaN
        return weight, shape

    monkeypatch.setattr(Store, "read_plain", damaged)
    for options in ((), ("--temperature", 0), ("--activation-bits", 16), ("--json",)):
        code, out, errors = run("generate", demo, "The scheduler", "--max-tokens", 4, *options)
        assert (code, out) == (2, "")
        assert "model.layers.1.input_layernorm.weight holds NaN or infinity" in errors


def test_json_is_still_json(run: Run, demo: Path) -> None:
    assert json.loads(run("generate", demo, "A", "--max-tokens", 2, "--json")[1])["completion_tokens"] == 2
