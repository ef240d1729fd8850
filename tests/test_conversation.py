"""Does a chat go on when an answer is stopped, when it outgrows the context, and after one long paste?"""

import io
import os
import pty
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import bincompress
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.inference.conversation import Conversation
from bincompress.inference.generate import GenerationSettings, TooLongError
from bincompress.inference.load import load
from bincompress.inference.sampling import Sampling
from bincompress.sources.checkpoint import open_checkpoint
from tests.conftest import Run

ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
BOUND = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(Path(bincompress.__file__).parent / "demo_model", folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    plan = make_plan(open_checkpoint(folder / "model"), load_recipe(None, {"groups": 4, "block": 64}))
    assert compress(plan, str(folder / "store")).complete
    return folder / "store"


def test_the_oldest_turns_are_left_out(store: Path) -> None:
    model = load(str(store), threads=1)
    talk = Conversation(model, GenerationSettings(max_tokens=8, context=64), "Be brief.")
    for number in range(6):
        generation = talk.ask(f"What is question number {number} about?")
        assert generation.limit >= 8
        assert "Be brief" in model.tokenizer.decode(generation._prompt)
        assert f"number {number}" in model.tokenizer.decode(generation._prompt)
        talk.answered("".join(generation))
    assert talk.left_out > 0
    with pytest.raises(TooLongError):
        talk.ask("word " * 100)
    talk.ask("And now?")


def test_a_turn_computes_only_what_is_new(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(str(store), threads=1)
    run: list[int] = []
    own = type(model.decoder).next_logits

    def counted(decoder: Any, ids: Any, cache: Any) -> Any:
        run.append(len(ids))
        return own(decoder, ids, cache)

    monkeypatch.setattr(type(model.decoder), "next_logits", counted)
    settings = GenerationSettings(6, Sampling(temperature=0.0), ignore_eos=True)
    talk, said = Conversation(model, settings), list[dict[str, str]]()
    for number, question in enumerate(("What is a page in the memory of a machine?", "And a table?", "Why?")):
        run.clear()
        generation = talk.ask(question)
        answer = "".join(generation)
        talk.answered(answer)
        # This template names an answer otherwise once it is given, so that it is new as well.
        last = f"assistant: {said[-1]['content']}\n" if said else ""
        new = len(model.tokenizer.encode(f"{last}user: {question}\nanswer:", special=False))
        assert run[0] <= new + 2 * (number > 0)  # where texts are joined
        assert run[0] < generation.prompt_tokens or number == 0
        assert run[1:] == [1] * 5
        said.append({"role": "user", "content": question})
        assert answer == "".join(model.chat(said, settings))
        said.append({"role": "assistant", "content": answer})


def test_a_stopped_answer_leaves_what_it_has_computed(store: Path) -> None:
    model = load(str(store), threads=1)
    settings = GenerationSettings(20, Sampling(temperature=0.0), ignore_eos=True)
    talk = Conversation(model, settings)
    generation: Any = iter(talk.ask("What is a page in the memory of a machine?"))
    talk.answered(next(generation) + next(generation))
    generation.close()  # as the command does it where an answer is interrupted
    asked = talk.ask("And a table?")
    turns = [*talk._turns, talk._asked]
    assert "".join(asked) == "".join(model.chat(turns, settings))


def test_a_long_line_does_not_end_a_piped_chat(run: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 5000 + "\nWhat is a page?\n\n"))
    code, out, errors = run("chat", store, "--max-tokens", 5, "--seed", 1)
    assert (code, out.count("\n")) == (0, 1)
    assert "this question is left out" in errors


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, store: Path, *options: str) -> None:
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "bincompress", "chat", str(store), *options])
        self.seen = ""

    def until(self, text: str) -> None:
        end = time.monotonic() + BOUND
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.file], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.file, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert text in self.seen, self.seen
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text: bytes) -> None:
        os.write(self.file, text)

    def end(self) -> int:
        while True:
            try:
                if not os.read(self.file, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_ends_the_answer_and_not_the_chat(store: Path) -> None:
    chat = Terminal(store, "--seed", "1", "--temperature", "1.0")
    chat.until("> ")
    for _ in range(2):
        chat.type(b"Tell me of the kernel\n")
        chat.until("\n")  # the echo
        chat.until(" ")  # a piece of the answer
        chat.type(b"\x03")
        chat.until("the answer was stopped")
        chat.until("> ")
    chat.type(b"\x04")
    assert chat.end() == 0


def test_ctrl_c_at_the_prompt_ends_the_chat(store: Path) -> None:
    chat = Terminal(store)
    chat.until("> ")
    chat.type(b"\x03")
    chat.until("interrupted\r\n")
    assert chat.end() == 130


def test_sigterm_ends_a_chat(store: Path) -> None:
    chat = Terminal(store)
    chat.until("> ")
    os.kill(chat.pid, signal.SIGTERM)
    chat.until("ended by SIGTERM\r\n")
    assert chat.end() == 143
