"""Log probabilities of continuations and texts, and what lm-evaluation-harness asks, without that package."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.errors import BincompressError
from bincompress.inference.evaluate import log_softmax
from bincompress.lm_eval.requests import HarnessRequests
from bincompress.model.errors import PromptError, SamplingError, TemplateError
from bincompress.scoring.likelihood import Pair, likelihoods
from bincompress.scoring.models import Scored, load_scored
from bincompress.scoring.scorer import Scorer
from tests.conftest import DEMO_MODEL
from tests.serving import running

TEXT = "The scheduler of the kernel decides which of the processes runs next and for how long it may run"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def store(chat_store: Path) -> Path:
    return chat_store


@pytest.fixture(scope="module")
def scored(store: Path) -> Scored:
    return load_scored(str(store), threads=1)


@pytest.fixture(scope="module")
def unquantized() -> Scored:
    return load_scored(str(DEMO_MODEL), threads=1)


def alone(scored: Scored, pair: Pair) -> tuple[float, bool]:
    """Return what the formula gives: the whole sequence run by itself."""
    decoder = scored.model.decoder
    cache = decoder.new_cache(len(pair.run), scored.model.defaults.cache)
    states = decoder.states(pair.run, cache)[len(pair.context) - 1 :]
    rows = np.concatenate([decoder.logits_of(states[row : row + 1]) for row in range(len(states))])
    logprobs = log_softmax(rows)[np.arange(len(rows)), pair.continuation]
    return float(logprobs.sum()), rows.argmax(axis=1).tolist() == list(pair.continuation)


def many_pairs(seed: int, vocab: int) -> list[Pair]:
    """Return pairs whose contexts share beginnings, with continuations of which some begin others."""
    random = np.random.default_rng(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(int(token) for token in random.integers(0, vocab, random.integers(1, most)))

    shots, pairs = tokens(40), []
    for _ in range(4):
        context = shots[: random.integers(1, len(shots) + 1)] + tokens(12) if random.random() < 0.7 else tokens(9)
        begin = tokens(5)
        pairs += [
            Pair(context, begin),
            Pair(context, begin + tokens(4)),
            Pair(context, tokens(2)),
            Pair(context, begin),
        ]
    order = random.permutation(len(pairs))
    return [pairs[number] for number in order]


def test_likelihoods_are_those_of_each_pair_alone(scored: Scored, unquantized: Scored) -> None:
    for seed, model, tolerance in ((0, scored, 0.0), (1, scored, 0.0), (2, unquantized, 2e-4)):
        pairs = many_pairs(seed, model.model.decoder.config.vocab)
        expected = [alone(model, pair) for pair in pairs]
        for at_once in (1, 3, 50):
            done: list[int] = []
            found = likelihoods(model.model.decoder, pairs, model.model.defaults.cache, at_once, done.append)
            assert [each.logprob for each in found] == pytest.approx([p for p, _ in expected], rel=0, abs=tolerance)
            assert [each.greedy for each in found] == [greedy for _, greedy in expected]
            assert done == sorted(done)
            assert done[-1] == len(pairs)


def test_greedy_is_said_of_what_the_model_would_write(scored: Scored) -> None:
    decoder = scored.model.decoder
    context = tuple(scored.model.tokenizer.encode("The scheduler"))
    written: list[int] = []
    for _ in range(4):
        cache = decoder.new_cache(20, "float16")
        written.append(int(decoder.next_logits([*context, *written], cache).argmax()))
    other = (*written[:3], (written[3] + 1) % 4096)
    first, second = likelihoods(decoder, [Pair(context, tuple(written)), Pair(context, other)], "float16")
    assert (first.greedy, second.greedy) == (True, False)


def test_shared_tokens_are_run_once(scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = scored.model.decoder
    run: list[int] = []
    own = decoder.states_of_all

    def counted(texts: Sequence[Any]) -> Any:
        run.append(sum(len(tokens) for tokens, _ in texts))
        return own(texts)

    monkeypatch.setattr(decoder, "states_of_all", counted)
    shots, choices = tuple(range(100, 600)), [(7, 8, 9), (7, 8, 10), (3,), (4,)]
    contexts = [(*shots, *range(number, number + 20)) for number in (10, 40, 70)]
    likelihoods(decoder, [Pair(context, each) for context in contexts for each in choices], "float16")
    # The 500 common tokens, the rest of each context but its last token, and that with each different beginning of
    # what follows: two for the longer ones of each context (which differ in the last token alone) are one.
    assert sum(run) == 500 + 3 * 19 + 3 * (3 + 1)


def test_pairs_beyond_what_caches_may_take_are_split(scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = many_pairs(5, 4096)
    whole = likelihoods(scored.model.decoder, pairs, "float16", 50)
    monkeypatch.setattr("bincompress.scoring.likelihood._POSITIONS_AT_ONCE", 30)
    assert likelihoods(scored.model.decoder, pairs, "float16", 50) == whole


def test_texts_are_cut_into_tokens_as_the_harness_does(scored: Scored) -> None:
    scorer, tokenizer = Scorer(scored), scored.model.tokenizer
    assert scorer.prefix_token == 0
    assert tokenizer.decode([0], skip_special=False) == "<|begin_of_text|>"
    before, after = scorer.encode_pair("A page is ", "a part")
    assert before == tokenizer.encode("A page is")
    assert before + after == tokenizer.encode("A page is a part")
    bare = tokenizer.encode("A page", special=False)
    assert scorer.encode_pair("", "A page") == ([0], bare)
    assert scorer.encode_pair("  ", "A page") == ([0], tokenizer.encode("  A page", special=False))
    assert scorer.encode_pair("", "<|begin_of_text|>A page") == ([0], bare)
    assert scorer.encode("<|begin_of_text|>A page") == tokenizer.encode("<|begin_of_text|>A page", special=False)
    assert Scorer(scored, add_bos=False).encode("A page") == bare


def test_contexts_that_are_too_long_lose_their_beginning(scored: Scored, caplog: pytest.LogCaptureFixture) -> None:
    text = " ".join(WORDS * 3)
    found = Scorer(scored, max_length=16).loglikelihood([(text, " and so on")])
    before, after = Scorer(scored).encode_pair(text, " and so on")
    assert found[0][0] == alone(scored, Pair(tuple(before[len(after) - 17 :]), tuple(after)))[0]
    assert f"a context of {len(before)} tokens is cut to its last {17 - len(after)}" in caplog.text
    with pytest.raises(PromptError, match=r"a continuation has \d+ tokens, the context 4"):
        Scorer(scored, max_length=4).loglikelihood([("A", text)])
    with pytest.raises(PromptError, match="a continuation has no tokens"):
        Scorer(scored).loglikelihood([("A page", "")])
    with pytest.raises(PromptError, match="max_length: expected 2 to 2048"):
        Scorer(scored, max_length=4096)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 40])
def test_a_text_is_scored_in_windows_that_score_each_token_once(scored: Scored, length: int) -> None:
    scorer = Scorer(scored, max_length=16, add_bos=False)
    text = scored.model.tokenizer.decode(scored.model.tokenizer.encode(" ".join(WORDS * 4), special=False)[:length])
    ids = [0, *scorer.encode(text)]
    expected = 0.0
    for begin in range(0, len(ids) - 1, 16):
        end = min(begin + 16, len(ids) - 1)  # tokens begin + 1 .. end are scored, behind as much as fits
        first = 0 if begin == 0 else end - 16
        expected += alone(scored, Pair(tuple(ids[first : begin + 1]), tuple(ids[begin + 1 : end + 1])))[0]
    assert scorer.rolling([text, "", text]) == pytest.approx([expected, 0.0, expected], abs=1e-9)


def test_texts_are_written_as_by_generate(scored: Scored) -> None:
    scorer = Scorer(scored, at_once=3)
    asked = [(" ".join(WORDS[:n]), {"until": ["."], "max_gen_toks": 12, "do_sample": False}) for n in range(2, 9)]
    greedy = replace(scored.model.defaults.sampling, temperature=0.0)
    settings = replace(scored.model.defaults, max_tokens=12, stop=(".",), sampling=greedy)
    assert scorer.generate(asked) == ["".join(scored.model.stream(text, settings)) for text, _ in asked]
    drawn = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "seed": 3, "max_new_tokens": 5}
    chosen = scorer.settings_of(drawn)
    assert (chosen.sampling.temperature, chosen.sampling.top_p, chosen.sampling.seed) == (0.9, 0.8, 3)
    assert (chosen.max_tokens, chosen.stop) == (5, ())
    assert scorer.settings_of({"temperature": 0.7}).sampling.temperature == 0.7
    assert scorer.settings_of({"temperature": 0.7, "do_sample": False}).sampling.temperature == 0.0
    assert scorer.settings_of({"until": "\n\n", "num_beams": 1}).stop == ("\n\n",)
    assert scorer.settings_of({}, usual=9).max_tokens == 9


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs: num_beams: this setting is not supported"),
        ({"best_of": 2}, "generation_kwargs: best_of: this setting is not supported"),
        ({"do_sample": True}, "do_sample: expected a temperature above 0 beside it"),
        ({"until": [3]}, "until: expected a text or a list of texts"),
        ({"top_p": "much"}, "generation_kwargs: top_p: expected a number, found 'much'"),
        ({"top_p": 2}, "top_p: expected 0 to 1"),
        ({"max_gen_toks": 2048}, "max_gen_toks: expected less than the context of 2048, found 2048"),
        ({"max_gen_toks": 0}, "max tokens: expected at least 1"),
    ],
)
def test_settings_that_are_not_understood_are_refused_by_name(
    scored: Scored, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises((PromptError, SamplingError), match=message):
        Scorer(scored).generate([("A page", wanted)])


def test_conversations_follow_the_template(scored: Scored, unquantized: Scored) -> None:
    scorer = Scorer(scored)
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    assert scorer.rendered(asked) == "user: Hi\nanswer:"
    begun = [*asked, {"role": "assistant", "content": "Well, "}]
    assert scorer.rendered(begun, add_generation_prompt=False) == "user: Hi\nassistant: Well, "
    with pytest.raises(TemplateError, match="the model has no chat template"):
        Scorer(unquantized).rendered(asked)


@dataclass
class Instance:
    """A request as the harness hands it over."""

    args: tuple[Any, ...]


class Hook:
    """Takes down answers as the harness's cache does."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.noted.append((kind, request, answer))


def test_requests_of_the_harness_are_answered(store: Path, scored: Scored) -> None:
    harness = HarnessRequests(str(store), threads=1, batch_size="auto", device="cuda:0", max_batch_size=64)
    harness.cache_hook = hook = Hook()
    pairs = [("The scheduler", " decides"), ("The scheduler", " runs"), ("", "A page")]
    found = harness.loglikelihood([Instance(pair) for pair in pairs], disable_tqdm=True)
    assert found == Scorer(scored).loglikelihood(pairs)
    assert hook.noted == [("loglikelihood", pair, answer) for pair, answer in zip(pairs, found, strict=True)]
    text = " ".join(WORDS)
    assert harness.loglikelihood_rolling([Instance((text,))], disable_tqdm=True) == Scorer(scored).rolling([text])
    written = harness.generate_until([Instance((text, {"max_gen_toks": 4}))], disable_tqdm=True)
    assert written == Scorer(scored).generate([(text, {"max_gen_toks": 4})])
    assert harness.apply_chat_template([{"role": "user", "content": "Hi"}]) == "user: Hi\nanswer:"
    assert harness.chat_template(False) is None
    assert "enable_thinking" in str(harness.chat_template(True))
    with pytest.raises(TemplateError, match="chat template: expected 'default'"):
        harness.chat_template("rag")
    assert harness.get_model_info()["model_activations"] == "8 bits per segment"
    assert "/" not in harness.tokenizer_name
    for given, message in (
        ({"batch_size": "many"}, "batch_size: expected a number"),
        ({"batch_size": 0}, "at least 1"),
        ({"memory": "4GB"}, "memory: expected a number of bytes"),
    ):
        with pytest.raises(BincompressError, match=message):
            HarnessRequests(str(store), threads=1, **given)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(BincompressError, match=r"has no tokenizer\.json"):
        load_scored(str(tmp_path / "model"), threads=1)


def test_the_prefix_token_is_the_tokenizers_before_that_of_the_config(tmp_path: Path) -> None:
    """Qwen's config.json has a beginning-of-text token that its tokenizer does not name."""
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    assert load_scored(str(tmp_path / "model"), threads=1).prefix_token == 1
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    assert load_scored(str(tmp_path / "model"), threads=1).prefix_token == 0


def test_the_harness_that_is_not_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError('No module named lm_eval', name='lm_eval')\n")
    path = f"{tmp_path}:{Path(__file__).resolve().parents[1]}"
    done = subprocess.run(
        [sys.executable, "-m", "bincompress.lm_eval"], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: lm_eval is not installed: pip install 'bincompress[lm-eval]'\n"


def test_the_server_lists_an_end_token_behind_an_echoed_prompt(store: Path, scored: Scored) -> None:
    """The harness's local-completions leaves out the last token that is listed, as the one that was written."""
    ids = scored.model.tokenizer.encode("The scheduler decides")
    body = {"prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "logit_bias": {"1": 100}}
    with running(store, scored.model) as server:
        status, told = server.ask("/v1/completions", body)
        streamed = server.raw("/v1/completions", json.dumps({**body, "stream": True}).encode())[2].decode()
        _, chat = server.ask(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "logit_bias": {"1": 100}},
        )
    assert status == 200
    choice = told["choices"][0]
    listed = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == ("<|begin_of_text|>The scheduler decides", "stop")
    assert len(listed["token_logprobs"]) == len(ids) + 1
    assert listed["tokens"][-1] == "<|end_of_text|>"
    assert sum(listed["token_logprobs"][1:-1]) == pytest.approx(alone(scored, Pair((ids[0],), tuple(ids[1:])))[0])
    chunks = [json.loads(line[6:]) for line in streamed.split("\n") if line.startswith("data: {")]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [share for part in parts for share in part["token_logprobs"]] == listed["token_logprobs"]
    assert chat["choices"][0]["logprobs"]["content"] == []
