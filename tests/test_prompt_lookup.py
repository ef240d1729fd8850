"""Drafts from the text so far: each text is what it is without them, to the last bit, and fewer passes are run."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.inference import lookup
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.load import load
from bincompress.inference.lookup import Lookup
from bincompress.inference.prefixes import PrefixCache
from bincompress.inference.sampling import Sampling
from bincompress.inference.scheduler import Limits, Scheduler
from bincompress.inference.sequence import Ended, Piece, PromptRead, Request
from tests.conftest import Run
from tests.test_scheduler import Heard

WORDS = "The scheduler decides which process runs next. The scheduler of the kernel decides "
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "bias": {"temperature": 0.0, "logit_bias": ((300, 4.0), (1, -100.0))},
    "drawn": {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 5},
}


@pytest.fixture(scope="module")
def store(chat_store: Path) -> Path:
    return chat_store


@pytest.fixture(scope="module")
def model(store: Path) -> Model:
    return load(str(store), threads=1)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft after a single token that came before, so that right and wrong drafts of all lengths are checked."""
    monkeypatch.setattr(lookup, "MATCHED", 1)
    monkeypatch.setattr(lookup, "SHORTEST", 1)


@pytest.fixture
def passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass over the weights."""
    counts: list[int] = []
    own = model.decoder._advance_parts

    def counted(tokens: Any, parts: Any) -> Any:
        counts.append(len(tokens))
        return own(tokens, parts)

    monkeypatch.setattr(model.decoder, "_advance_parts", counted)
    return counts


def prompts(seed: int) -> list[list[int]]:
    """Return tokens drawn at random, and ones that repeat a part of themselves."""
    random = np.random.default_rng(seed)
    drawn = random.integers(2, 4096, 20).tolist()
    return [drawn, [*drawn[:7], *drawn[:7], *drawn[:5]], random.integers(2, 12, 30).tolist()]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_text_is_what_it_is_without_drafts(model: Model, passes: list[int], name: str) -> None:
    drafting = replace(model, prompt_lookup=True)
    encoded = model.tokenizer.encode(WORDS * 2)
    for prompt in (encoded, *prompts(1)):
        chosen = GenerationSettings(24, Sampling(**SETTINGS[name]), ignore_eos=True)
        plain, drafted = model.stream(prompt, chosen), drafting.stream(prompt, chosen)
        expected = list(plain)
        passes.clear()
        assert "".join(drafted) == "".join(expected)
        assert drafted.tokens == plain.tokens
        assert drafted.finish_reason == plain.finish_reason
        assert max(passes[1:]) > 1, "nothing was drafted"
    if name == "greedy":  # the last prompt's text repeats itself
        assert len(passes) < 24


def test_stop_texts_end_a_text_within_a_draft(model: Model) -> None:
    chosen = GenerationSettings(40, Sampling(temperature=0.0), ignore_eos=True)
    whole = "".join(model.stream(WORDS * 2, chosen))
    for place in range(0, len(whole) - 3, 5):
        stopped = replace(chosen, stop=(whole[place : place + 3],))
        plain, drafted = model.stream(WORDS * 2, stopped), replace(model, prompt_lookup=True).stream(WORDS * 2, stopped)
        assert "".join(drafted) == "".join(plain)
        assert (drafted.tokens, drafted.finish_reason) == (plain.tokens, "stop")


def test_a_cache_that_is_kept_holds_the_text_alone(model: Model) -> None:
    """What follows a text whose draft was wrong is computed as anew."""
    drafting = replace(model, prompt_lookup=True)
    prefixes = PrefixCache(model.decoder, 256, "float16", 1 << 30)
    chosen = GenerationSettings(9, Sampling(temperature=0.0), context=256, ignore_eos=True)
    messages: list[dict[str, str]] = [{"role": "user", "content": WORDS}]
    for turn in range(3):
        expected = "".join(model.chat(messages, chosen))
        assert "".join(drafting.chat(messages, chosen, prefixes=prefixes)) == expected
        messages += [{"role": "assistant", "content": expected}, {"role": "user", "content": f"{WORDS}{turn}"}]
    begun = iter(drafting.chat(messages, chosen, prefixes=prefixes))
    next(begun)
    del begun  # dropped in the midst
    assert "".join(drafting.chat(messages, chosen, prefixes=prefixes)) == "".join(model.chat(messages, chosen))


def test_a_full_context_is_written_to_its_end(model: Model) -> None:
    prompt = model.tokenizer.encode(WORDS * 2)
    chosen = GenerationSettings(None, Sampling(temperature=0.0), context=len(prompt) + 30, ignore_eos=True)
    plain, drafted = model.stream(prompt, chosen), replace(model, prompt_lookup=True).stream(prompt, chosen)
    assert "".join(drafted) == "".join(plain)
    assert (len(drafted.tokens), drafted.finish_reason) == (30, "length")


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    made = Scheduler(replace(model, prompt_lookup=True), Limits(parallel=3, waiting=20, context=512))
    yield made
    made.close()


def test_texts_beside_each_other_are_what_they_are_without_drafts(
    model: Model, scheduler: Scheduler, passes: list[int]
) -> None:
    plain = Scheduler(model, Limits(parallel=3, waiting=20, context=512))
    asked = [
        Request(tuple(prompt), GenerationSettings(20, Sampling(**SETTINGS[name]), stop, ignore_eos=True), logprobs=2)
        for prompt, name, stop in (
            (model.tokenizer.encode(WORDS * 2), "greedy", ()),
            (prompts(2)[1], "penalties", ()),
            (prompts(2)[2], "drawn", ()),
            (model.tokenizer.encode(WORDS), "greedy", (" the",)),
            (prompts(3)[2], "bias", ()),
        )
    ]
    found = []
    for each in (plain, scheduler):
        heard = [Heard() for _ in asked]
        passes.clear()
        for request, listener in zip(asked, heard, strict=True):
            each.submit([(request, listener)])
        ended = [listener.end() for listener in heard]
        found.append([_told(listener.seen) for listener in heard])
        assert all(end.error is None for end in ended)
        assert each.counts.written == sum(end.sampled for end in ended)
        assert each.counts.read == plain.counts.read
    assert found[0] == found[1]
    assert max(passes) > 3
    plain.close()


def _told(events: Sequence[Any]) -> tuple[str, list[Any], Any]:
    """Return a text, its tokens' log probabilities and its end."""
    pieces = [event for event in events if isinstance(event, Piece)]
    ended = events[-1]
    assert isinstance(ended, Ended)
    assert isinstance(events[0], PromptRead)
    tokens = [token for piece in pieces for token in piece.tokens]
    return "".join(piece.text for piece in pieces), tokens, (ended.reason, ended.sampled)


@pytest.mark.parametrize("through", ["generate", "scheduler"])
def test_the_head_is_not_run_behind_a_wrong_draft(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, passes: list[int], through: str
) -> None:
    """Nor can what it would say there, such as NaN, end the text."""
    chosen = GenerationSettings(16, Sampling(temperature=0.0), ignore_eos=True)
    own, rows = model.decoder.logits_of, []

    def logits_of(states: Any) -> Any:
        rows.append(len(states))
        return own(states)

    monkeypatch.setattr(model.decoder, "logits_of", logits_of)
    for prompt in (model.tokenizer.encode(WORDS), prompts(1)[0]):
        rows.clear()
        if through == "generate":
            assert len("".join(replace(model, prompt_lookup=True).stream(prompt, chosen)))
        else:
            heard = Heard()
            scheduler.submit([(Request(tuple(prompt), chosen), heard)])
            assert heard.end().error is None
        assert sum(rows) == 16
    assert max(passes[1:]) > 1


def test_drafts_are_what_followed_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "MATCHED", 2)
    monkeypatch.setattr(lookup, "SHORTEST", 2)
    found = Lookup([1, 2, 3, 4, 5, 1, 2, 8, 9, 1])
    assert found.draft(7) == []  # 9, 1 has not come before
    found.push(2)
    assert found.draft(7) == [8, 9, 1, 2]
    assert found.draft(3) == [8, 9, 1]
    assert found.draft(1) == found.draft(0) == found.draft(-1) == []
    found.push(3)
    assert found.draft(2) == [4, 5]
    assert Lookup([1]).draft(7) == Lookup([1, 2]).draft(7) == []


def test_commands_take_the_option(run: Run, store: Path, tmp_path: Path) -> None:
    common = ("--max-tokens", 12, "--temperature", 0, "--threads", 1)
    plain = run("generate", store, WORDS * 2, *common)
    assert run("generate", store, WORDS * 2, *common, "--prompt-lookup")[:2] == plain[:2]
    (tmp_path / "prompts").write_text(json.dumps({"prompt": WORDS * 2}) + "\n")
    assert run("run", store, tmp_path / "prompts", "--out", tmp_path / "out", *common, "--prompt-lookup")[0] == 0
    assert json.loads((tmp_path / "out").read_text())["text"] + "\n" == plain[1]
    # It changes no text, so that answers with and without it belong together.
    code, _, errors = run("run", store, tmp_path / "prompts", "--out", tmp_path / "out", *common)
    assert (code, "0 answers written, 1 were there" in errors) == (0, True)
