"""`bincompress run`: lines are answered as alone, resumed after an end at any moment, refused before the work."""

import io
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

import bincompress
from bincompress.inference.answers import Answers
from bincompress.inference.engine import engine_of
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.load import load
from bincompress.inference.offline import write_answers
from bincompress.inference.prompts import PromptFileError, read_prompts
from bincompress.inference.sampling import Sampling
from bincompress.inference.scheduler import Limits
from tests.chat_stores import make_store
from tests.conftest import Run

LIMITS = Limits(parallel=3, waiting=6, context=256)
DEFAULTS = GenerationSettings(8, Sampling(temperature=0.0), context=256)
LINES: list[dict[str, Any]] = [
    {"prompt": "In Python,", "id": "first"},
    {"messages": [{"role": "user", "content": "Hello"}]},
    {"prompt": "A page", "max_tokens": 3},
    {"prompt": "A table", "temperature": 1, "seed": 4},
    {"prompt": "In Python,", "stop": ["\n"]},
]


@pytest.fixture(scope="module")
def model(chat_store: Path) -> Model:
    return load(str(chat_store), threads=1)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_line_is_answered_as_alone(model: Model, tmp_path: Path) -> None:
    asked = read_prompts(write(tmp_path / "prompts", LINES))
    counts: list[tuple[int, int]] = []
    done = write_answers(model, asked, tmp_path / "out", DEFAULTS, LIMITS, "e", lambda *count: counts.append(count))
    assert done == (5, 0)
    assert (counts[0], counts[-1]) == ((0, 5), (5, 5))
    found = read(tmp_path / "out")
    assert [answer["line"] for answer in found] == [1, 2, 3, 4, 5]
    assert [answer["id"] for answer in found] == ["first", None, None, None, None]
    whole = "".join(model.stream("In Python,", DEFAULTS))
    assert found[0]["text"] == whole
    assert found[1]["text"] == "".join(model.chat(LINES[1]["messages"], DEFAULTS))
    assert found[2]["completion_tokens"] == 3
    drawn = GenerationSettings(8, Sampling(temperature=1.0, seed=4), context=256)
    assert found[3]["text"] == "".join(model.stream("A table", drawn))
    assert found[4]["text"] == whole.split("\n")[0]


def test_an_interrupted_run_is_resumed(model: Model, tmp_path: Path) -> None:
    """Interrupted after each number of answers, also in the midst of writing one down."""
    asked = read_prompts(write(tmp_path / "prompts", LINES))
    write_answers(model, asked, tmp_path / "whole", DEFAULTS, LIMITS, "e")
    expected = (tmp_path / "whole").read_bytes()
    for stop in range(5):
        out = tmp_path / f"out{stop}"

        def interrupt(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_answers(model, asked, out, DEFAULTS, LIMITS, "e", interrupt)
        assert len(read(out)) == stop
        with out.open("ab") as file:
            file.write(expected[:20])
        assert write_answers(model, asked, out, DEFAULTS, LIMITS, "e") == (5 - stop, 0)
        assert out.read_bytes() == expected
        assert write_answers(model, asked, out, DEFAULTS, LIMITS, "e") == (0, 0)
        assert out.read_bytes() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"prompts", "whole", *(f"out{stop}" for stop in range(5))}


def test_a_prompt_that_cannot_be_run_fails_alone_and_is_tried_again(run: Run, chat_store: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts", [{"prompt": "word " * 500}, {"prompt": "A page"}])
    for _ in range(2):
        code, _, errors = run(
            "run", chat_store, prompts, "--out", tmp_path / "out",
            "--max-tokens", 2, "--temperature", 0, "--context", 64,
        )  # fmt: skip
        assert code == 1
        assert "1 failed" in errors
        found = read(tmp_path / "out")
        assert "the context 64" in found[0]["error"]
        assert found[1]["completion_tokens"] == 2
    assert "1 answers written, 1 were there" in errors


def test_answers_to_something_else_are_refused(model: Model, tmp_path: Path) -> None:
    asked = read_prompts(write(tmp_path / "prompts", LINES[:2]))
    out = tmp_path / "out"
    write_answers(model, asked, out, DEFAULTS, LIMITS, "e")
    kept = out.read_bytes()
    others = read_prompts(write(tmp_path / "others", LINES[1:3]))
    with pytest.raises(
        PromptFileError, match="line 1: answers another prompt, or is of another store or other settings"
    ):
        write_answers(model, others, out, DEFAULTS, LIMITS, "e")
    with pytest.raises(
        PromptFileError, match="line 1: answers another prompt, or is of another store or other settings"
    ):
        write_answers(model, asked, out, GenerationSettings(9, Sampling(temperature=0.0)), LIMITS, "e")
    foreign = tmp_path / "foreign"
    foreign.write_text("a letter\n")
    with pytest.raises(PromptFileError, match="line 1: no answer of `run`"):
        write_answers(model, asked, foreign, DEFAULTS, LIMITS, "e")
    assert (out.read_bytes(), foreign.read_text()) == (kept, "a letter\n")


def test_two_runs_do_not_write_to_one_file(model: Model, tmp_path: Path) -> None:
    held = Answers(tmp_path / "out", {}, {})
    asked = read_prompts(write(tmp_path / "prompts", LINES[:1]))
    with pytest.raises(PromptFileError, match="another run writes to it"):
        write_answers(model, asked, tmp_path / "out", DEFAULTS, LIMITS, "e")
    held.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "scheduler"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object with prompt or messages, one of the two"),
        ('{"prompt": "x", "messages": []}', "line 2: expected an object with prompt or messages, one of the two"),
        ('{"prompt": 1}', "line 2: prompt: expected a text"),
        ('{"messages": ["x"]}', "line 2: messages: expected a list of objects"),
        ('{"prompt": "x", "max_tokens": 2.5}', r"line 2: max_tokens: expected a whole number, found 2\.5"),
        ('{"prompt": "x", "max_tokens": 0}', "line 2: max tokens: expected at least 1, found 0"),
        ('{"prompt": "x", "temperature": true}', "line 2: temperature: expected a number, found True"),
        ('{"prompt": "x", "temperature": -1}', "line 2: temperature: expected 0"),
        ('{"prompt": "x", "stop": [""]}', "line 2: stop: expected a text or a list of texts"),
        ('{"prompt": "x", "temperature": 1' + "0" * 400 + "}", "line 2: temperature: expected at most"),
        ('{"prompt": "x", "top_p": 1' + "0" * 400 + "}", "line 2: top_p: expected at most"),
        ('{"prompt": "x", "temperature": 1e400}', "line 2: a number is beyond the range of floats"),
        ('{"prompt": "x", "id": NaN}', "line 2: not JSON: NaN is not a number of JSON"),
        ('{"prompt": "x", "id": [1e400]}', "line 2: a number is beyond the range of floats"),
        ('{"prompt": "x", "id": {"a": "\\ud800"}}', r"line 2: not a text of Unicode: a lone surrogate, '\\ud800'"),
        ('{"prompt": "a\\ud800b"}', "line 2: not a text of Unicode"),
        ('{"prompt": "x", "\\ud800": 1}', "line 2: not a text of Unicode"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2: not a text of Unicode"),
        ('{"prompt": "x", "id": ' + "[" * 990 + "]" * 990 + "}", "line 2: nested too deeply"),
        ('{"prompt": "x", "max_tokens": 1' + "0" * 30 + "}", "line 2: max_tokens: expected at most"),
        ('{"prompt": "x", "suffix": "y"}', "line 2: 'suffix' is not supported; expected"),
        ('{"prompt": "x", "seed": 1, "seed": 2}', "line 2: not JSON: 'seed' is there twice in one object"),
        ('{"prompt": "x", "tools": []}', "line 2: tools: expected messages, not a prompt"),
        ('{"prompt": "x", "response_format": "json"}', "line 2: response_format: expected an object, found 'json'"),
        (
            '{"prompt": "x", "response_format": {"type": "xml"}}',
            "line 2: response_format.type: expected text",
        ),
        (
            '{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}',
            "line 2: schema",
        ),
    ],
)
def test_prompts_that_are_not_understood(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "prompts").write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(PromptFileError, match=message):
        read_prompts(tmp_path / "prompts")


def test_a_file_without_prompts_and_one_that_would_be_written_over(run: Run, chat_store: Path, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", [])
    assert "holds no prompt" in run("run", chat_store, empty, "--out", tmp_path / "out")[2]
    prompts = write(tmp_path / "prompts", LINES)
    code, _, errors = run("run", chat_store, prompts, "--out", prompts)
    assert (code, "is the file of prompts" in errors) == (2, True)
    assert len(read(prompts)) == 5


def test_prompts_from_standard_input(
    run: Run, chat_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "again"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "The scheduler"}\n')))
        out = tmp_path / "out"
        code, _, errors = run("run", chat_store, "-", "--out", out, "--max-tokens", 2, "--temperature", 0)
        assert (code, "1 were there" in errors) == (0, name == "again")
    assert len(read(out)) == 1
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    code, _, errors = run("run", chat_store, "-", "--out", out)
    assert (code, "standard input, line 1: not JSON" in errors) == (2, True)
    code, _, errors = run("run", chat_store, "-", "--out", "-")
    assert (code, "--out -: expected a file" in errors) == (2, True)


@pytest.mark.parametrize(
    "content",
    [
        b"precious notes, no newline at the end",
        b'{"results": [1, 2, 3]}',
        b'{"line": 1, "key": null, "text": ""}',
        b'{"line": 99, "key": null, "text": ""}\n',
        b'{"line": 1, "id": "first", "key": "0123',
        b'{"line": null, "key": null, "text": ""}\n',
        b"[" * 100_000 + b"\n",
        b"\xff",
    ],
)
def test_a_file_of_the_user_is_refused_and_stays(model: Model, tmp_path: Path, content: bytes) -> None:
    asked = read_prompts(write(tmp_path / "prompts", LINES[:2]))
    out = tmp_path / "out"
    out.write_bytes(content)
    with pytest.raises(PromptFileError, match=r"line 1: (no answer of `run`|answers another prompt)"):
        write_answers(model, asked, out, DEFAULTS, LIMITS, "e")
    assert out.read_bytes() == content


def test_every_torn_line_is_recognised(tmp_path: Path) -> None:
    out, keys, ids = tmp_path / "out", {1: "ab", 12: "cd"}, {1: "\u00e9", 12: None}
    lines = [
        {"line": 1, "id": ids[1], "key": "ab", "error": "\u00e9"},
        {"line": 12, "id": None, "key": "cd", "text": "x"},
    ]
    for line in lines:
        written = json.dumps(line, ensure_ascii=False).encode()
        for length in range(1, len(written)):
            out.write_bytes(written[:length])
            Answers(out, keys, ids).close()
            assert out.read_bytes() == b""
            out.write_bytes(written[: length - 1] + b"#")
            if length < written.index(b'": "', written.index(b'"key"') + 10):
                with pytest.raises(PromptFileError):
                    Answers(out, keys, ids)
                assert out.read_bytes() == written[: length - 1] + b"#"


def test_nothing_but_the_file_of_answers_is_written_and_a_link_stays(model: Model, tmp_path: Path) -> None:
    prompts = write(tmp_path / "out.ordered", LINES[:1])
    before = prompts.read_bytes()
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real", tmp_path / "out"
    real.touch(0o600)
    link.symlink_to("folder/real")
    write_answers(model, read_prompts(prompts), link, DEFAULTS, LIMITS, "e")
    assert prompts.read_bytes() == before
    assert link.is_symlink()
    assert [answer["line"] for answer in read(real)] == [1]
    assert real.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.rglob("*")} == {"out.ordered", "folder", "real", "out"}


def test_answers_of_another_engine_are_refused(model: Model, chat_store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "made", groups=2)
    engines = [engine_of(str(chat_store), *how) for how in ((8, "segment"), (6, "segment"), (8, "token"))]
    engines.append(engine_of(str(other), 8, "segment"))
    assert len(set(engines)) == 4
    shutil.copytree(chat_store, tmp_path / "moved")
    assert engine_of(str(tmp_path / "moved"), 8, "segment") == engines[0]
    bincompress.pack(str(chat_store), str(tmp_path / "packed.zip"))
    assert engine_of(str(tmp_path / "packed.zip"), 8, "segment") == engines[0]
    asked = read_prompts(write(tmp_path / "prompts", LINES[:1]))
    write_answers(model, asked, tmp_path / "answers", DEFAULTS, LIMITS, engines[0])
    kept = (tmp_path / "answers").read_bytes()
    for engine in engines[1:]:
        with pytest.raises(PromptFileError, match="of another store or other settings; give another --out"):
            write_answers(model, asked, tmp_path / "answers", DEFAULTS, LIMITS, engine)
    assert (tmp_path / "answers").read_bytes() == kept


def test_more_tokens_than_the_context_are_refused_before_the_work(model: Model, tmp_path: Path) -> None:
    asked = read_prompts(write(tmp_path / "prompts", [LINES[0], {"prompt": "x", "max_tokens": 257}]))
    with pytest.raises(PromptFileError, match="line 2 of the prompts: max_tokens: expected at most 256, the context"):
        write_answers(model, asked, tmp_path / "out", DEFAULTS, LIMITS, "e")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"text": 5}, {"text": None}, {"id": "other"}, {"error": {}}])
def test_an_answer_that_was_edited_to_what_run_never_writes_is_refused(
    model: Model, tmp_path: Path, change: dict[str, Any]
) -> None:
    asked = read_prompts(write(tmp_path / "prompts", LINES[:1]))
    out = tmp_path / "out"
    write_answers(model, asked, out, DEFAULTS, LIMITS, "e")
    write(out, [read(out)[0] | change])
    before = out.read_bytes()
    with pytest.raises(PromptFileError, match="line 1: "):
        write_answers(model, asked, out, DEFAULTS, LIMITS, "e")
    assert out.read_bytes() == before


def test_a_file_that_came_in_the_place_of_the_answers_stays(model: Model, tmp_path: Path) -> None:
    asked = read_prompts(write(tmp_path / "prompts", LINES[:1]))
    out, other = tmp_path / "out", tmp_path / "other"

    def replace(done: int, total: int) -> None:
        other.write_text("precious")
        other.replace(out)

    with pytest.raises(PromptFileError, match="another program put a file of its own there, which was left") as found:
        write_answers(model, asked, out, DEFAULTS, LIMITS, "e", replace)
    assert out.read_text() == "precious"
    assert [answer["line"] for answer in read(Path(str(found.value).rpartition(" in ")[2]))] == [1]


def test_a_disk_that_fills_under_the_answers(run: Run, chat_store: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        prompts = write(tmp_path / "prompts", [{"prompt": "A page", "max_tokens": 1, "id": "x" * 3000}] * 4)
        command = ("run", chat_store, prompts, "--out", disk / "out", "--temperature", 0)
        code, _, errors = run(*command)
        assert code == 2
        assert errors == (
            f"error: {disk / 'out'}: cannot be written: No space left on device; free some space; run the same "
            "command again to resume\n"
        )
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        assert run(*command)[0] == 0
        assert [answer["line"] for answer in read(disk / "out")] == [1, 2, 3, 4]
    finally:
        subprocess.run(["umount", disk], check=True)
