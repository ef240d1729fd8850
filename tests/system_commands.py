"""Commands in one process, as each would import Numba again; what they print is compared between systems.

python system_commands.py MODEL FOLDER      # prints a JSON list of [command, exit code, output]
"""

import contextlib
import http.client
import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def run_all(model: Path, folder: Path) -> list[Any]:
    """Run the commands; all that they write lies in `folder`."""
    text, prompts, more = folder / "text.txt", folder / "prompts.jsonl", folder / "more.jsonl"
    text.write_text("the kernel writes a page to the disk\n" * 9, "utf-8")
    prompts.write_text('{"prompt": "ab"}\n', "utf-8")
    more.write_text('{"prompt": "ab"}\n{"prompt": "cd"}\n', "utf-8")
    (folder / "schema.json").write_text(json.dumps(SCHEMA), "utf-8")
    store, answers, kept = folder / "store", folder / "answers.jsonl", folder / "kept.cache"
    generate: list[Any] = ["generate", store, "ab", "--max-tokens", "5", "--temperature", "0"]
    commands: list[list[Any]] = [
        ["compress", model, store, "--workers", "2"],
        ["compress", model, store, "--overwrite"],
        ["verify", store],
        ["evaluate", store, "--text", text, "--context", "32", "--json"],
        [*generate, "--prompt-cache", kept],
        [*generate, "--prompt-cache", kept],
        [*generate, "--json-schema", folder / "schema.json"],
        ["run", store, prompts, "--out", answers, "--max-tokens", "4", "--temperature", "0"],
        ["run", store, more, "--out", answers, "--max-tokens", "4", "--temperature", "0"],
        ["pack", store, folder / "packed.zip"],
        ["pack", store, folder / "packed.zip", "--overwrite"],
        ["verify", folder / "packed.zip"],
        ["unpack", folder / "packed.zip", folder / "back"],
        ["export", store, folder / "exported"],
        ["export", store, folder / "model.gguf"],
        ["report", store, "--out", folder / "report.html"],
    ]
    return [*map(_run, commands), ["serve", 0, _served(store)]]


def _run(command: list[Any]) -> list[Any]:
    from bincompress import cli

    before, sys.argv = sys.argv, ["bincompress", "--debug", *map(str, command)]
    printed, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(printed):
            cli.main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv = before
    return [command[0], code, printed.getvalue()]


def _served(store: Path) -> str:
    """Return what a server answers; its address is nobody else's meanwhile."""
    from bincompress.errors import BincompressError
    from bincompress.inference.load import load
    from bincompress.inference.scheduler import Limits
    from bincompress.serving import run
    from bincompress.serving.service import Service
    from bincompress.serving.settings import ServeSettings

    service = Service(ServeSettings(port=0, model_name="tiny"), Limits(context=64))
    listening = run._listen(service.settings)
    port = int(listening.getsockname()[1])
    with contextlib.suppress(BincompressError):
        run._listen(ServeSettings(port=port)).close()
        raise AssertionError("two servers have one address")
    server, loaded = run.Server(service), threading.Event()
    service.load(lambda: load(str(store), threads=1), loaded.set)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while service.scheduler is None:
            assert service.failure is None
            loaded.wait(0.01)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            asked = {"model": "tiny", "prompt": "ab", "max_tokens": 4, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps(asked), {"content-type": "application/json"})
            return str(json.loads(connection.getresponse().read())["choices"][0]["text"])
    finally:
        server.should_exit = True
        thread.join(60)


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]), Path(sys.argv[2]))))
