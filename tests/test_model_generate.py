"""Generation with the small trained model: golden tokens, stop texts, limits, refusals."""

from pathlib import Path

import numpy as np
import pytest

from bincompress.errors import CheckpointError
from bincompress.inference.chat import ChatTemplate
from bincompress.inference.generate import Generation, GenerationSettings, Model
from bincompress.inference.sampling import Sampling
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.errors import PromptError, TemplateError
from bincompress.model.tokenizer import load_tokenizer

FOLDER = Path(__file__).resolve().parents[1] / "bincompress" / "demo_model"
PROMPT = "In Python,"
GREEDY = Sampling(temperature=0.0)
# 32 greedy tokens after PROMPT; the two largest logits are never closer than GAP, so roundings do not decide.
GOLDEN = [
    269, 1047, 820, 295, 269, 200, 49, 919, 862, 3066, 308, 261, 1454, 862, 3066, 13,
    320, 269, 1602, 820, 200, 1117, 269, 1454, 862, 3066, 308, 261, 1454, 862, 3066, 15,
]  # fmt: skip
GAP = 0.05


@pytest.fixture(scope="module")
def model() -> Model:
    files = {path.name: path.read_bytes() for path in FOLDER.glob("*.json")}
    return Model(load_checkpoint(FOLDER), load_tokenizer(files))


def greedy(model: Model, prompt: str = PROMPT, tokens: int = 32, stop: tuple[str, ...] = ()) -> Generation:
    return model.stream(prompt, GenerationSettings(tokens, GREEDY, stop))


def test_greedy_tokens_are_golden(model: Model) -> None:
    generation = greedy(model)
    text = "".join(generation)
    assert generation.tokens == GOLDEN
    assert text == model.tokenizer.decode(GOLDEN)
    assert generation.finish_reason == "length"
    assert generation.usage == {"prompt_tokens": 4, "completion_tokens": 32, "total_tokens": 36}


def test_golden_tokens_are_not_close_calls(model: Model) -> None:
    prompt = model.tokenizer.encode(PROMPT)
    logits = model.decoder.logits(prompt + GOLDEN[:-1], model.decoder.new_cache(64))[len(prompt) - 1 :]
    assert logits.argmax(axis=1).tolist() == GOLDEN
    second, first = np.sort(logits, axis=1)[:, -2:].T
    assert (first - second).min() > GAP


def test_a_seed_repeats_itself(model: Model) -> None:
    def draw(seed: int) -> str:
        return "".join(model.stream(PROMPT, GenerationSettings(20, Sampling(0.8, top_p=0.95, seed=seed))))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_stop_text_ends_the_text_before_it(model: Model) -> None:
    whole = "".join(greedy(model))
    middle = whole[20:24]
    for stop in ((middle,), ("nowhere", middle), (whole[21:25], middle)):
        generation = greedy(model, stop=stop)
        assert "".join(generation) == whole[: whole.index(middle)]
        assert generation.finish_reason == "stop"
        assert len(generation.tokens) < 32


def test_stop_text_is_held_back_until_it_is_certain(model: Model) -> None:
    whole = "".join(greedy(model))
    almost = whole[10:18] + "\0"
    assert "".join(greedy(model, stop=(almost,))) == whole
    end = whole[-3:] + "\0"
    assert "".join(greedy(model, stop=(end,))) == whole


def test_every_part_of_the_answer_is_a_stop_text(model: Model) -> None:
    """Stop texts of one letter to fifteen, which begin and end within tokens or span several."""
    whole = "".join(greedy(model))
    for start in (0, 13, 26):
        for length in (1, 2, 3, 7, 15):
            stop = whole[start : start + length]
            generation = greedy(model, stop=(stop,))
            assert ("".join(generation), generation.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize("stop", ["\N{CJK UNIFIED IDEOGRAPH-754C}", ".*", "z" * 6000])
def test_a_stop_text_that_never_comes_changes_nothing(model: Model, stop: str) -> None:
    generation = greedy(model, stop=(stop,))
    assert ("".join(generation), generation.finish_reason) == (model.tokenizer.decode(GOLDEN), "length")


@pytest.mark.parametrize("settings", [{"temperature": 1e-9}, {"top_p": 1e-9}, {"top_k": 1}])
def test_sampling_from_one_token_is_greedy(model: Model, settings: dict[str, float]) -> None:
    generation = model.stream(PROMPT, GenerationSettings(32, Sampling(seed=1, **settings)))  # type: ignore[arg-type]
    "".join(generation)
    assert generation.tokens == GOLDEN


def test_a_top_k_beyond_the_vocabulary_leaves_every_token(model: Model) -> None:
    def draw(top_k: int) -> str:
        return "".join(model.stream(PROMPT, GenerationSettings(10, Sampling(0.9, top_k=top_k, seed=3))))

    assert draw(10**9) == draw(4096) == draw(0)


def test_end_token_ends_the_text(model: Model) -> None:
    ending = Model(model.decoder, load_tokenizer({"tokenizer.json": (FOLDER / "tokenizer.json").read_bytes()}))
    ending.tokenizer.eos_ids = frozenset([GOLDEN[6]])
    generation = greedy(ending)
    assert "".join(generation) == model.tokenizer.decode(GOLDEN[: GOLDEN.index(GOLDEN[6])])
    assert generation.finish_reason == "stop"
    heedless = ending.stream(PROMPT, GenerationSettings(32, GREEDY, ignore_eos=True))
    assert "".join(heedless) == model.tokenizer.decode(GOLDEN)


def test_the_context_is_a_limit(model: Model) -> None:
    generation = model.stream(PROMPT, GenerationSettings(sampling=GREEDY, context=10))
    "".join(generation)
    assert generation.tokens == GOLDEN[:6]
    assert generation.finish_reason == "length"
    generation = model.stream([5] * 2047, GenerationSettings(sampling=GREEDY, ignore_eos=True))
    "".join(generation)
    assert generation.usage["total_tokens"] == 2048


def test_prompt_longer_than_the_context(model: Model) -> None:
    with pytest.raises(PromptError, match=r"the prompt has 2048 tokens, the context 2048; .* at most 2047$"):
        model.stream([5] * 2048)
    with pytest.raises(PromptError, match=r"has 4 tokens, the context 4; .* raise the context \(the model's is 2048\)"):
        model.stream(PROMPT, GenerationSettings(context=4))


def test_empty_prompt_is_the_beginning_of_a_text(model: Model) -> None:
    assert model.stream("", GenerationSettings(3)).prompt_tokens == 1
    assert model.stream([], GenerationSettings(3)).prompt_tokens == 1
    bare = Model(model.decoder, load_tokenizer({"tokenizer.json": (FOLDER / "tokenizer.json").read_bytes()}))
    with pytest.raises(PromptError, match="the prompt is empty and the tokenizer has no beginning-of-text token"):
        bare.stream([])


def test_tokens_that_do_not_exist(model: Model) -> None:
    with pytest.raises(PromptError, match="token 4096 is not in the vocabulary: expected 0 to 4095"):
        "".join(model.stream([4096], GenerationSettings(3)))


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"stop": ("",)}, {"context": 0}])
def test_settings_are_checked(model: Model, settings: dict[str, object]) -> None:
    with pytest.raises(PromptError):
        model.stream(PROMPT, GenerationSettings(**settings))  # type: ignore[arg-type]


def test_chat_uses_the_template(model: Model) -> None:
    template = ChatTemplate({"default": "{{ bos_token }}{{ messages[0].content }}"}, {"bos_token": "<|begin_of_text|>"})
    generation = Model(model.decoder, model.tokenizer, template).chat(
        [{"role": "user", "content": PROMPT}], GenerationSettings(32, GREEDY)
    )
    "".join(generation)
    assert generation.tokens == GOLDEN
    with pytest.raises(TemplateError, match="no chat template"):
        model.chat([{"role": "user", "content": PROMPT}])


def test_checkpoint_that_does_not_hold_what_it_says(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        load_checkpoint(tmp_path)
    config = (FOLDER / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    weights = next(FOLDER.glob("*.safetensors")).read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is missing"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": 4096', '"vocab_size": 4095'))
    with pytest.raises(CheckpointError, match=r"expected shape \(4095, 256\), .* found \(4096, 256\)"):
        load_checkpoint(tmp_path)
