"""Text to tokens and back, whole and in a stream, for byte-level and sentencepiece-style tokenizers."""

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bincompress.model.errors import TokenizerError
from bincompress.model.tokenizer import TextStream, Tokenizer, load_tokenizer

CORPUS = ["Once upon a time there was a kernel, and the kernel was good.", "the the the upon upon a a was was"] * 4
SPECIAL = ["<s>", "</s>", "<mark>"]


def byte_level() -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return str(tokenizer.to_str()).encode()


def sentencepiece() -> bytes:
    pieces = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"Onceuptimhrwaskld,.g",
        "▁a",
        "▁t",
        "he",
        "▁the",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return str(tokenizer.to_str()).encode()


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
TOKENIZERS = {"byte level": Tokenizer(byte_level(), CONFIG), "sentencepiece": Tokenizer(sentencepiece(), CONFIG)}
KINDS = st.sampled_from(sorted(TOKENIZERS))
TEXTS = st.text("a the upon,.\n é你好😀\u0301ñ👩‍👩", max_size=30)


@given(kind=KINDS, text=TEXTS)
def test_text_comes_back(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id == 0
    assert tokenizer.decode(ids) == text


@given(kind=KINDS, text=TEXTS)
def test_streamed_pieces_are_the_text_and_hold_no_half_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == text
    assert stream.finish() == ""


@given(kind=KINDS, prompt=TEXTS, text=TEXTS)
def test_a_stream_goes_on_where_the_prompt_ends(kind: str, prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    before = tokenizer.encode(prompt)
    after = tokenizer.encode(prompt + text)
    # Only where the prompt's tokens begin the tokens of the whole is there one answer.
    if prompt and after[: len(before)] == before:
        stream = TextStream(tokenizer, before)
        assert "".join(map(stream.push, after[len(before) :])) + stream.finish() == text


@given(ids=st.lists(st.integers(0, 319), max_size=40))
def test_any_tokens_stream_to_their_text(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer)
    text = "".join(map(stream.push, ids)) + stream.finish()
    whole = tokenizer.decode(ids)
    # Broken bytes may be marked more or less often when they are cut apart; all else is equal.
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_special_tokens_are_not_text() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("a the")
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, [*ids[:2], 2, *ids[2:], 1])) == "a the"
    assert TextStream(tokenizer, skip_special=False).push(1) == "</s>"


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([{"eos_token_id": 2}, {"eos_token_id": 1}], {2}),
        ([{"eos_token_id": [1, 2]}], {1, 2}),
        ([None, {"eos_token_id": None}, {"eos_token": "</s>"}], {1}),
        ([{}], set()),
    ],
)
def test_end_tokens(configs: Any, expected: set[int]) -> None:
    assert Tokenizer(sentencepiece(), *configs).eos_ids == expected


@pytest.mark.parametrize("value", ["1", 1.0, [1, None], -1, True])
def test_end_tokens_of_another_type_are_refused(value: Any) -> None:
    with pytest.raises(TokenizerError, match="eos_token_id: expected"):
        Tokenizer(sentencepiece(), {"eos_token_id": value})


def test_missing_or_broken_files_are_refused() -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer({})
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json: cannot be read"):
        load_tokenizer({"tokenizer.json": b"{}"})
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json: cannot be read"):
        load_tokenizer({"tokenizer.json": b"\xff"})
    with pytest.raises(TokenizerError, match=r"^config\.json: not JSON"):
        load_tokenizer({"tokenizer.json": byte_level(), "config.json": b"{"})


def test_truncation_and_padding_of_training_are_off() -> None:
    raw = json.loads(byte_level())
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    assert len(Tokenizer(json.dumps(raw).encode()).encode("Once upon a time there")) > 3
