"""`bincompress run`: lines are answered as alone, resumed after an end at any moment, refused before the work."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.load import load
from bincompress.inference.offline import Answers, PromptFileError, read_prompts, write_answers
from bincompress.inference.sampling import Sampling
from bincompress.inference.scheduler import Limits
from tests.conftest import Run
from tests.serving import make_store

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
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("offline"))


@pytest.fixture(scope="module")
def model(store: Path) -> Model:
    return load(str(store), threads=1)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_line_is_answered_as_alone(model: Model, tmp_path: Path) -> None:
    asked = read_prompts(write(tmp_path / "prompts", LINES))
    counts: list[tuple[int, int]] = []
    done = write_answers(model, asked, tmp_path / "out", DEFAULTS, LIMITS, lambda *count: counts.append(count))
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
    write_answers(model, asked, tmp_path / "whole", DEFAULTS, LIMITS)
    expected = (tmp_path / "whole").read_bytes()
    for stop in range(5):
        out = tmp_path / f"out{stop}"

        def interrupt(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_answers(model, asked, out, DEFAULTS, LIMITS, interrupt)
        assert len(read(out)) == stop
        with out.open("ab") as file:
            file.write(expected[:20])
        assert write_answers(model, asked, out, DEFAULTS, LIMITS) == (5 - stop, 0)
        assert out.read_bytes() == expected
        assert write_answers(model, asked, out, DEFAULTS, LIMITS) == (0, 0)
        assert out.read_bytes() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"prompts", "whole", *(f"out{stop}" for stop in range(5))}


def test_a_prompt_that_cannot_be_run_fails_alone_and_is_tried_again(run: Run, store: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts", [{"prompt": "word " * 500}, {"prompt": "A page"}])
    for _ in range(2):
        code, _, errors = run(
            "run", store, prompts, "--out", tmp_path / "out", "--max-tokens", 2, "--temperature", 0, "--context", 64
        )
        assert code == 1
        assert "1 failed" in errors
        found = read(tmp_path / "out")
        assert "the context 64" in found[0]["error"]
        assert found[1]["completion_tokens"] == 2
    assert "1 answers written, 1 were there" in errors


def test_answers_to_something_else_are_refused(model: Model, tmp_path: Path) -> None:
    asked = read_prompts(write(tmp_path / "prompts", LINES[:2]))
    out = tmp_path / "out"
    write_answers(model, asked, out, DEFAULTS, LIMITS)
    kept = out.read_bytes()
    others = read_prompts(write(tmp_path / "others", LINES[1:3]))
    with pytest.raises(PromptFileError, match="line 1: answers another prompt or other settings"):
        write_answers(model, others, out, DEFAULTS, LIMITS)
    with pytest.raises(PromptFileError, match="line 1: answers another prompt or other settings"):
        write_answers(model, asked, out, GenerationSettings(9, Sampling(temperature=0.0)), LIMITS)
    foreign = tmp_path / "foreign"
    foreign.write_text("a letter\n")
    with pytest.raises(PromptFileError, match="line 1: no answer of `run`"):
        write_answers(model, asked, foreign, DEFAULTS, LIMITS)
    assert (out.read_bytes(), foreign.read_text()) == (kept, "a letter\n")


def test_two_runs_do_not_write_to_one_file(model: Model, tmp_path: Path) -> None:
    held = Answers(tmp_path / "out", {})
    asked = read_prompts(write(tmp_path / "prompts", LINES[:1]))
    with pytest.raises(PromptFileError, match="another run writes to it"):
        write_answers(model, asked, tmp_path / "out", DEFAULTS, LIMITS)
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
        ('{"prompt": "x", "tools": []}', "line 2: 'tools' is not supported; expected"),
    ],
)
def test_prompts_that_are_not_understood(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "prompts").write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(PromptFileError, match=message):
        read_prompts(tmp_path / "prompts")


def test_a_file_without_prompts_and_one_that_would_be_written_over(run: Run, store: Path, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", [])
    assert "holds no prompt" in run("run", store, empty, "--out", tmp_path / "out")[2]
    prompts = write(tmp_path / "prompts", LINES)
    code, _, errors = run("run", store, prompts, "--out", prompts)
    assert (code, "is the file of prompts" in errors) == (2, True)
    assert len(read(prompts)) == 5
