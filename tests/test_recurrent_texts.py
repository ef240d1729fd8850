"""Texts of models whose layers have a state in place of keys and values: each is what it is alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress import compress
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.load import load
from bincompress.inference.sampling import Sampling
from bincompress.inference.scheduler import Limits, Scheduler
from bincompress.inference.sequence import CancelledError, Request
from bincompress.model.cache import CacheType, cache_bytes
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.decoder import Decoder
from bincompress.model.errors import NotFiniteError, UnsupportedModelError
from bincompress.model.steps import NO_MATRIX
from tests.conftest import Run
from tests.test_declarations import WORDS, write
from tests.test_scheduler import Gate, Heard, settings

KINDS = ["Qwen3_5ForCausalLM", "Lfm2ForCausalLM"]
PROMPT = tuple(int(token) for token in np.random.default_rng(3).integers(2, 96, 21))
OTHER = tuple(int(token) for token in np.random.default_rng(4).integers(2, 96, 13))


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("states")
    compress(str(write(folder / "model", request.param)), str(folder / "store"), groups=4, block=64)
    return load(str(folder / "store"), threads=2)


def alone(model: Model, prompt: tuple[int, ...], chosen: GenerationSettings | None = None) -> str:
    return "".join(model.stream(prompt, chosen or settings()))


def test_a_token_reads_the_same_whichever_tokens_share_its_pass(model: Model) -> None:
    decoder, tokens = model.decoder, [*PROMPT, *OTHER]
    assert decoder.tokens_alike is None
    whole = decoder.states(tokens, decoder.new_cache(40))
    for cuts in ([1] * 34, [2, 31, 1], [20, 14]):
        cache, found, at = decoder.new_cache(40), [], 0
        for count in cuts:
            found.append(decoder.states(tokens[at : at + count], cache))
            at += count
        assert np.array_equal(np.concatenate(found), whole)
    first, second = decoder.new_cache(40), decoder.new_cache(40)
    decoder.states(tokens[:5], first)
    both = decoder.states_of_all([(tokens[5:], first), (tokens[:9], second)])
    assert np.array_equal(both, np.concatenate([whole[5:], whole[:9]]))


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_a_token_of_each_of_several_texts_reads_what_it_reads_alone(model: Model, kind: CacheType) -> None:
    decoder = model.decoder
    caches = [[decoder.new_cache(40, kind) for _ in range(2)] for _ in (PROMPT, OTHER)]
    for prompt, own in zip((PROMPT, OTHER), caches, strict=True):
        for cache in own:
            decoder.states(prompt, cache)
    found = decoder.states_of_all([([5], one) for one, _ in caches])
    assert np.array_equal(found, np.concatenate([decoder.states([5], other) for _, other in caches]))


def test_texts_are_what_they_are_alone_where_one_beside_them_is_cancelled(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(model, Limits(parallel=2, context=100))
    gate = Gate(scheduler, monkeypatch)
    heard = [Heard(), Heard(), Heard()]
    asked = [Request(prompt, settings()) for prompt in (PROMPT, OTHER, PROMPT[:5])]
    texts = [scheduler.submit([pair])[0] for pair in zip(asked, heard, strict=True)]
    gate.reached.get(timeout=60)
    gate.let(4)
    texts[0].cancel()
    gate.open()
    assert isinstance(heard[0].end().error, CancelledError)
    for request, listener in zip(asked[1:], heard[1:], strict=True):
        assert listener.end().error is None
        assert listener.text == alone(model, request.prompt)
    scheduler.close()


def test_what_a_text_begins_with_is_computed_again_unless_a_state_ends_there(model: Model) -> None:
    scheduler = Scheduler(model, Limits(parallel=2, context=100))
    first = Heard()
    (text,) = scheduler.submit([(Request(PROMPT, settings(8)), first)])
    first.end()
    for turn, reused in (
        ((*text.tokens, 7, 8), len(text.tokens) - 1),  # the last token sampled was not run
        ((*text.tokens[:-4], 9, 9), 0),  # another course from a place where no pass has ended
        ((*PROMPT, 5), 0),
    ):
        again = Heard()
        scheduler.submit([(Request(turn, settings(8)), again)])
        assert again.end().error is None
        assert (again.reused, again.text) == (reused, alone(model, turn, settings(8)))
    scheduler.close()


def test_texts_of_one_call_read_their_prompt_once(model: Model) -> None:
    scheduler = Scheduler(model, Limits(parallel=4, context=100))
    drawn = [GenerationSettings(8, Sampling(1.0, seed=seed), ignore_eos=True) for seed in range(4)]
    heard = [Heard() for _ in drawn]
    scheduler.submit([(Request(PROMPT, own), listener) for own, listener in zip(drawn, heard, strict=True)])
    for own, listener in zip(drawn, heard, strict=True):
        assert listener.end().error is None
        assert listener.text == alone(model, PROMPT, own)
    assert [listener.reused for listener in heard] == [0] + 3 * [len(PROMPT) - 1]
    assert scheduler.counts.read == len(PROMPT) + 3
    scheduler.close()


def test_a_pass_that_fails_changes_no_state(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(model, PROMPT), alone(model, OTHER)
    own, calls = model.decoder.logits_of, [0]

    def failing(states: Any) -> Any:
        calls[0] += 1
        if calls[0] % 5 == 3:  # after the pass has been noted
            raise NotFiniteError("the model computes NaN or infinity")
        return own(states)

    monkeypatch.setattr(Decoder, "logits_of", staticmethod(failing))
    scheduler = Scheduler(model, Limits(parallel=2, context=100))
    heard = [Heard(), Heard()]
    scheduler.submit([(Request(prompt, settings()), each) for prompt, each in zip((PROMPT, OTHER), heard, strict=True)])
    found = [each.end() for each in heard]
    scheduler.close()
    assert calls[0] > 5
    for ended, listener, text in zip(found, heard, expected, strict=True):
        assert ended.error is None or isinstance(ended.error, NotFiniteError)  # a text that was run by itself
        assert text.startswith(listener.text)
    assert any(ended.error is None for ended in found)


def test_a_cache_goes_back_to_where_a_pass_ended_and_nowhere_else(model: Model) -> None:
    decoder = model.decoder
    cache, other = decoder.new_cache(40), decoder.new_cache(40)
    expected = decoder.states(PROMPT, cache)
    decoder.states(OTHER[:2], cache)
    assert [cache.reusable(length) for length in (30, 23, 22, 21, 20, 0)] == [23, 23, 21, 21, 0, 0]
    for refused in (22, 20, 24):
        with pytest.raises(ValueError, match=f"cannot rewind to {refused}: the cache holds 23 positions"):
            cache.rewind(refused)
    with pytest.raises(ValueError, match="cannot copy 22 positions"):
        other.copy_from(cache, 22)
    other.copy_from(cache, 21)
    again = decoder.states(OTHER[:2], other)
    cache.rewind(21)
    assert np.array_equal(decoder.states(OTHER[:2], cache), again)
    cache.rewind()
    assert np.array_equal(decoder.states(PROMPT, cache), expected)
    assert cache.nbytes == cache_bytes(decoder.config, 40)
    assert 0 < cache.held_bytes <= cache.nbytes


def test_nothing_is_known_of_a_pass_that_was_not_finished(model: Model) -> None:
    decoder = model.decoder
    cache = decoder.new_cache(40)
    decoder.states(PROMPT, cache)
    expected = decoder.states(OTHER, decoder_copy(decoder, cache))

    last = decoder.layers[-1]
    decoder.layers[-1] = replace(last, down=NO_MATRIX)  # which raises, after all states were written
    try:
        with pytest.raises(RuntimeError):
            decoder.states(OTHER, cache)
    finally:
        decoder.layers[-1] = last
    assert np.array_equal(decoder.states(OTHER, cache), expected)


def decoder_copy(decoder: Decoder, cache: Any) -> Any:
    made = decoder.new_cache(cache.capacity)
    made.copy_from(cache, cache.length)
    return made


@pytest.mark.parametrize("architecture", KINDS)
def test_layer_after_layer(architecture: str, tmp_path: Path, run: Run) -> None:
    model, text = write(tmp_path / "model", architecture), tmp_path / "text"
    text.write_text(WORDS)
    samples = ("--samples", 4, "--context", 32, "--compensate", "--groups", 2)
    found = run("compress", model, tmp_path / "store", "--sequential", text, *samples)
    assert found[0] == 0, found[2]
    assert "gates of a state" in found[1] or architecture.startswith("Lfm2")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*KINDS, "Ministral3ForCausalLM"])
def test_training_refuses_by_name_what_it_does_not_know(architecture: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from bincompress.distillation.decoder import TorchDecoder

    config = load_checkpoint(write(tmp_path / "model", architecture)).config
    what = "queries that grow" if architecture.startswith("Min") else "layers without attention"
    with pytest.raises(UnsupportedModelError, match=f"training does not know {architecture} yet: {what}"):
        TorchDecoder(config, torch.device("cpu"), 16)
