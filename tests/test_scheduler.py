"""Texts that are written together: each as it is alone, fair, bounded, cancelled, and nothing computed twice."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.inference.generate import GenerationSettings, Model, TooLongError
from bincompress.inference.load import load
from bincompress.inference.logprobs import token_logprob
from bincompress.inference.prefixes import Prefix, PrefixCache
from bincompress.inference.sampling import Sampling
from bincompress.inference.scheduler import BusyError, ClosedError, Limits, Scheduler
from bincompress.inference.sequence import CancelledError, DeadlineError, Ended, Piece, PromptRead, Request
from bincompress.model.errors import NotFiniteError

GREEDY = Sampling(temperature=0.0)
BOUND = 60.0


@pytest.fixture(scope="module")
def model(demo_store: Path) -> Model:
    return load(str(demo_store), threads=1)


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    made = Scheduler(model, Limits(parallel=3, waiting=20, context=512))
    yield made
    made.close()


class Heard:
    """What a text's listener was told."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.seen: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.events.put(event)

    def next(self) -> Any:
        self.seen.append(self.events.get(timeout=BOUND))
        return self.seen[-1]

    def end(self) -> Ended:
        while not isinstance(self.next(), Ended):
            pass
        found: Ended = self.seen[-1]
        return found

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.seen if isinstance(event, Piece))

    @property
    def reused(self) -> int:
        return int(next(event.reused for event in self.seen if isinstance(event, PromptRead)))


def settings(tokens: int = 24, **others: Any) -> GenerationSettings:
    return GenerationSettings(tokens, Sampling(temperature=0.0, **others), ignore_eos=True)


def ask(model: Model, prompt: str, chosen: GenerationSettings | None = None, **others: Any) -> Request:
    return Request(tuple(model.tokenizer.encode(prompt)), chosen or settings(), **others)


class Gate:
    """Holds the scheduler's thread before each of its passes until it is let through."""

    def __init__(self, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[tuple[Any, int]]] = []
        self.reached: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.go: queue.SimpleQueue[None] = queue.SimpleQueue()
        own = scheduler._run

        def run(shares: Any) -> None:
            self.reached.put(None)
            self.go.get(timeout=BOUND)
            self.passes.append(list(shares))
            own(shares)

        monkeypatch.setattr(scheduler, "_run", run)

    def let(self, passes: int = 1) -> None:
        """Let so many passes through, and return when the next one is about to begin."""
        for _ in range(passes):
            self.go.put(None)
            self.reached.get(timeout=BOUND)

    def open(self) -> None:
        for _ in range(5000):
            self.go.put(None)


PROMPTS = [
    "In Python,",
    "The scheduler of the kernel decides which of the processes runs next, and for how long. " * 6,
    "A page",
    "A table in a database has rows and columns. To select rows,",
    "The scheduler of the kernel decides",
    "x",
]


def test_texts_are_what_they_are_alone_whatever_is_cancelled_beside_them(model: Model) -> None:
    expected = {prompt: "".join(model.stream(prompt, settings())) for prompt in PROMPTS}
    for seed in range(3):
        random = np.random.default_rng(seed)
        scheduler = Scheduler(model, Limits(parallel=int(random.integers(2, 5)), waiting=40, context=512))
        asked = [PROMPTS[number] for number in random.integers(0, len(PROMPTS), 14)]
        heard = [Heard() for _ in asked]
        texts = [
            scheduler.submit([(ask(model, prompt), listener)])[0] for prompt, listener in zip(asked, heard, strict=True)
        ]
        dropped = set(random.choice(len(asked), 5, replace=False).tolist())
        for number in dropped:
            for _ in range(int(random.integers(0, 12))):
                if isinstance(heard[number].next(), Ended):
                    break
            texts[number].cancel()
        for number, (prompt, listener) in enumerate(zip(asked, heard, strict=True)):
            ended = listener.seen[-1] if listener.seen and isinstance(listener.seen[-1], Ended) else listener.end()
            if ended.error is None:
                assert (listener.text, ended.reason, ended.sampled) == (expected[prompt], "length", 24)
            else:
                assert number in dropped
                assert isinstance(ended.error, CancelledError)
                assert expected[prompt].startswith(listener.text)
        scheduler.close()


def test_sampled_texts_follow_their_seed_beside_others(model: Model, scheduler: Scheduler) -> None:
    chosen = GenerationSettings(16, Sampling(1.2, top_p=0.9, frequency_penalty=0.5, seed=7), ignore_eos=True)
    expected = "".join(model.stream("In Python,", chosen))
    heard = [Heard() for _ in range(3)]
    scheduler.submit([(ask(model, PROMPTS[3]), heard[0]), (ask(model, "In Python,", chosen), heard[1])])
    scheduler.submit([(ask(model, PROMPTS[5]), heard[2])])
    for listener in heard:
        listener.end()
    assert heard[1].text == expected


def test_a_short_prompt_is_not_behind_a_long_one(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(scheduler, monkeypatch)
    long, short = Heard(), Heard()
    scheduler.submit([(Request((5,) * 400, settings(2)), long)])
    gate.reached.get(timeout=BOUND)
    scheduler.submit([(ask(model, "A page"), short)])
    gate.let(2)
    assert isinstance(short.next(), PromptRead)  # after the one pass that both were in
    assert long.events.empty()
    gate.open()
    assert short.end().sampled == 24
    assert long.end().sampled == 2
    assert max(sum(share for _, share in shares) for shares in gate.passes) <= 256


def test_prompts_share_a_pass_equally(model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(scheduler, monkeypatch)
    heard = [Heard() for _ in range(3)]
    scheduler.submit([(Request((5 + number,) * 200, settings(1)), heard[number]) for number in range(3)])
    gate.reached.get(timeout=BOUND)
    gate.open()
    for listener in heard:
        listener.end()
    first = sorted(share for _, share in gate.passes[0])
    assert len(first) == 3
    assert first[-1] - first[0] <= 1


def test_a_cancelled_text_gets_no_further_token(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, heard = Gate(scheduler, monkeypatch), Heard()
    (text,) = scheduler.submit([(ask(model, "A page"), heard)])
    gate.reached.get(timeout=BOUND)
    gate.let(3)
    text.cancel()
    gate.open()  # for the pass that was about to begin
    ended = heard.end()
    assert isinstance(ended.error, CancelledError)
    assert ended.sampled <= 4


def test_the_queue_is_bounded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(model, Limits(parallel=1, waiting=2, context=128))
    gate, heard = Gate(scheduler, monkeypatch), [Heard() for _ in range(3)]
    for listener in heard:
        scheduler.submit([(ask(model, "A page", settings(2)), listener)])
    with pytest.raises(BusyError, match="try again later"):
        scheduler.submit([(ask(model, "A page"), Heard())])
    gate.open()
    assert [listener.end().sampled for listener in heard] == [2, 2, 2]
    scheduler.close()
    with pytest.raises(ClosedError):
        scheduler.submit([(ask(model, "A page"), Heard())])


def test_a_deadline_ends_texts_that_wait_and_that_are_written(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, written, waited = Gate(scheduler, monkeypatch), Heard(), Heard()
    far = time.monotonic() + 1000
    monkeypatch.setattr("bincompress.inference.scheduler.time.monotonic", lambda: far if written.seen else 0.0)
    others = [(ask(model, PROMPTS[number]), Heard()) for number in (0, 2)]
    scheduler.submit([(ask(model, "A page", deadline=far - 1), written), *others])
    scheduler.submit([(ask(model, "A page", deadline=far - 1), waited)])
    gate.reached.get(timeout=BOUND)
    gate.let(2)
    written.next()
    gate.open()
    assert isinstance(written.end().error, DeadlineError)
    assert isinstance(waited.end().error, DeadlineError)
    assert others[0][1].end().sampled == 24


def test_a_next_turn_computes_only_what_is_new(model: Model, scheduler: Scheduler) -> None:
    first, heard = PROMPTS[1] + " So", Heard()
    (text,) = scheduler.submit([(ask(model, first), heard)])
    heard.end()
    read = scheduler.counts.read
    turn = (*text.tokens, *model.tokenizer.encode(" And then?", special=False))
    again = Heard()
    scheduler.submit([(Request(turn, settings()), again)])
    again.end()
    assert again.reused == len(text.tokens) - 1  # the last token sampled was not run
    assert scheduler.counts.read - read == len(turn) - again.reused
    assert again.text == "".join(model.stream(turn, settings()))
    assert scheduler.counts.reused == again.reused


def test_texts_of_one_call_read_their_prompt_once(model: Model, scheduler: Scheduler) -> None:
    heard = [Heard() for _ in range(5)]
    asked = [
        replace(ask(model, PROMPTS[1]), settings=GenerationSettings(8, Sampling(1.0, seed=seed), ignore_eos=True))
        for seed in range(5)
    ]
    scheduler.submit(list(zip(asked, heard, strict=True)))
    for request, listener in zip(asked, heard, strict=True):
        listener.end()
        assert listener.text == "".join(model.stream(request.prompt, request.settings))
    assert scheduler.counts.read == len(asked[0].prompt) + 4
    assert [listener.reused for listener in heard] == [0] + 4 * [len(asked[0].prompt) - 1]


def test_log_probabilities_are_those_of_the_model(model: Model, scheduler: Scheduler) -> None:
    heard = Heard()
    request = ask(model, PROMPTS[3], settings(6), logprobs=3, prompt_logprobs=True)
    (text,) = scheduler.submit([(request, heard)])
    heard.end()
    rows = model.decoder.logits(text.tokens[:-1], model.decoder.new_cache(64, "float16"))
    found = [each for event in heard.seen if not isinstance(event, Ended) for each in event.tokens]
    assert [each.token for each in found] == text.tokens[1:]
    for each, row in zip(found, rows, strict=True):
        exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
        assert each.logprob == pytest.approx(exact[each.token], abs=1e-3)  # the head is kept: BLAS for many tokens
        assert [token for token, _ in each.top] == np.argsort(-exact)[:3].tolist()
        assert [share for _, share in each.top] == pytest.approx(np.sort(exact)[::-1][:3].tolist(), abs=1e-3)
    only = Heard()
    scheduler.submit([(replace(request, only_prompt=True), only)])
    assert (only.end().sampled, only.seen[0].tokens) == (0, heard.seen[0].tokens)


def test_tokens_of_a_stop_text_are_not_told_of(model: Model, scheduler: Scheduler) -> None:
    whole = "".join(model.stream("In Python,", settings(24)))
    for stop in (whole[10:14], whole[-4:], whole[20:21]):
        heard = Heard()
        chosen = replace(settings(24), stop=(stop,))
        scheduler.submit([(ask(model, "In Python,", chosen, logprobs=0), heard)])
        assert heard.end().reason == "stop"
        assert heard.text == whole[: whole.index(stop)]
        tokens = [each.token for event in heard.seen if isinstance(event, Piece) for each in event.tokens]
        assert model.tokenizer.decode(tokens).startswith(heard.text)
        assert not model.tokenizer.decode(tokens[:-1]).startswith(whole[: whole.index(stop) + len(stop)])


def test_a_text_that_cannot_be_run_ends_no_other(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = model.decoder.states_of_all

    def run(texts: Any) -> Any:
        if any(77 in ids for ids, _ in texts):
            raise NotFiniteError("the model computes NaN or infinity")
        return own(texts)

    monkeypatch.setattr(type(model.decoder), "states_of_all", staticmethod(run))
    expected = "".join(model.stream("In Python,", settings()))
    broken, whole = Heard(), Heard()
    scheduler.submit([(Request((5, 77, 6), settings()), broken), (ask(model, "In Python,"), whole)])
    assert isinstance(broken.end().error, NotFiniteError)
    assert whole.end().sampled == 24
    assert whole.text == expected


def test_a_listener_that_fails_ends_no_other_text(model: Model, scheduler: Scheduler) -> None:
    def failing(event: Any) -> None:
        raise RuntimeError("a listener's fault")

    heard = Heard()
    scheduler.submit([(ask(model, "A page"), failing), (ask(model, "In Python,"), heard)])
    assert heard.end().sampled == 24


def test_a_fault_of_the_scheduler_is_told_and_does_not_end_it(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(scheduler, "_admit", failing)
    told, heard = Heard(), Heard()
    scheduler.submit([(ask(model, "A page"), told)])
    assert isinstance(told.end().error, RuntimeError)
    monkeypatch.undo()
    scheduler.submit([(ask(model, "A page"), heard)])
    assert heard.end().sampled == 24


def test_what_cannot_be_asked_is_refused_before_it_waits(model: Model, scheduler: Scheduler) -> None:
    with pytest.raises(TooLongError, match="the prompt has 600 tokens, the context 512"):
        scheduler.submit([(Request((5,) * 600), Heard())])
    assert (scheduler.waiting, scheduler.active) == (0, 0)


def test_close_finishes_or_cancels(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(model, Limits(parallel=1, context=512))
    heard = [Heard(), Heard()]
    for listener in heard:
        scheduler.submit([(ask(model, "A page", settings(400)), listener)])
    while not isinstance(heard[0].next(), Piece):
        pass
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    assert all(isinstance(listener.end().error, CancelledError) for listener in heard)
    closing.join(BOUND)
    assert not scheduler._thread.is_alive()
    finished = Heard()
    scheduler = Scheduler(model, Limits(parallel=1, context=512))
    scheduler.submit([(ask(model, "A page", settings(4)), finished)])
    scheduler.close(BOUND)
    assert finished.end().sampled == 4


def test_prefixes_have_a_bound_of_memory(model: Model) -> None:
    one = model.decoder.new_cache(512, "float16")
    model.decoder.next_logits(list(range(2, 100)), one)
    prefixes = PrefixCache(model.decoder, 512, "float16", int(2.5 * one.held_bytes))
    for first in (2, 3, 4, 5):
        ids = [first, *range(10, 107)]
        cache = prefixes.take(ids)
        assert cache.length == 0
        model.decoder.next_logits(ids, cache)
        prefixes.put(ids, cache)
        assert prefixes.held_bytes <= 2.5 * one.held_bytes
    assert prefixes.take([2, *range(10, 107)]).length == 0  # the oldest were given up
    assert prefixes.take([5, *range(10, 107)]).length == 97
    assert PrefixCache(model.decoder, 512, "float16", 0).held_bytes == 0


def test_a_beginning_is_copied_where_the_other_text_goes_on(model: Model) -> None:
    prefixes = PrefixCache(model.decoder, 512, "float16", 1 << 30)
    long = list(range(2, 202))
    cache = prefixes.take(long)
    model.decoder.next_logits(long, cache)
    other = [*long[:50], 7, 7, 7]
    copied = prefixes.take(other, [Prefix(np.asarray(long), cache)])
    assert (copied.length, cache.length) == (50, 200)
    expected = model.decoder.next_logits(other, model.decoder.new_cache(64, "float16"))
    np.testing.assert_array_equal(model.decoder.next_logits(other[50:], copied), expected)
    prefixes.put(long, cache)
    prefixes.put(other, copied)
    assert prefixes.take([*long, 5]) is cache
    assert prefixes.take([*other, 5]) is copied


def test_token_logprob_of_plain_probabilities() -> None:
    found = token_logprob(np.log(np.array([0.1, 0.2, 0.4, 0.3], np.float32)), 0, 2)
    assert found.logprob == pytest.approx(np.log(0.1), abs=1e-6)
    assert [token for token, _ in found.top] == [2, 3]
    assert token_logprob(np.zeros(4, np.float32), 1, 9).logprob == pytest.approx(np.log(0.25))
