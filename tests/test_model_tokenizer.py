"""Text to tokens and back, whole and in a stream, for byte-level and sentencepiece-style tokenizers."""

import json
from pathlib import Path
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
        ([{"eos_token_id": 2}, {"eos_token_id": 1}], {1, 2}),
        ([{"eos_token_id": 2}, {"eos_token_id": [2]}, {"eos_token": "</s>"}], {1, 2}),
        ([{"eos_token_id": -1}, {"eos_token_id": [1, -1]}], {1}),
        ([{"eos_token_id": []}], set()),
        ([{"eos_token_id": [1, 2]}], {1, 2}),
        ([None, {"eos_token_id": None}, {"eos_token": "</s>"}], {1}),
        ([{}], set()),
    ],
)
def test_end_tokens(configs: Any, expected: set[int]) -> None:
    assert Tokenizer(sentencepiece(), *configs).eos_ids == expected


@pytest.mark.parametrize("value", ["1", 1.0, [1, None], True])
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


def token(text: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **plain, "special": True, **flags}


# Files beside tokenizer.json, whose tokens it lacks.
BESIDE: dict[str, dict[str, Any]] = {
    "nothing": {"tokenizer_config.json": {}},
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"900": token("<|y|>", special=False, normalized=True), "320": token("<|x|>")},
            "eos_token": "<|x|>",
        },
    },
    "a listed token that strips": {
        "tokenizer_config.json": {"added_tokens_decoder": {"320": token("<|y|>", lstrip=True, rstrip=True)}}
    },
    "added_tokens.json": {"tokenizer_config.json": {}, "added_tokens.json": {"<|y|>": 321, "<|x|>": 320}},
    "special_tokens_map.json": {
        "tokenizer_config.json": {"eos_token": "</s>"},
        "special_tokens_map.json": {
            "eos_token": "<|x|>",
            "pad_token": token("<pad>"),
            "additional_special_tokens": ["<|y|>"],
        },
        "added_tokens.json": {"<pad>": 321, "<|y|>": 320},
    },
    "a decoder hides the other files": {
        "tokenizer_config.json": {"added_tokens_decoder": {}, "eos_token": "</s>"},
        "special_tokens_map.json": {"eos_token": "<|x|>"},
        "added_tokens.json": {"<|y|>": 320},
    },
    "names of its own": {
        "tokenizer_config.json": {
            "image_token": "<|y|>",
            "additional_special_tokens": ["<|x|>", {"__type": "AddedToken", **token("<pad>")}],
        }
    },
    "extra names": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<|y|>"}}},
    "a word becomes special": {"tokenizer_config.json": {"eos_token": "upon", "split_special_tokens": True}},
}


@pytest.mark.slow  # which imports transformers
@pytest.mark.parametrize("data", [byte_level(), sentencepiece()], ids=["byte level", "sentencepiece"])
@pytest.mark.parametrize("case", BESIDE)
def test_ids_equal_those_of_transformers(case: str, data: bytes, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    files = {"tokenizer.json": data, "config.json": b'{"model_type": "llama"}'}
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    for name, content in BESIDE[case].items():
        files[name] = json.dumps({**(common if name == "tokenizer_config.json" else {}), **content}).encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(files)
    for text in ("a <|x|>the <|y|> b", "the<pad> upon</s> a", ""):
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id is None or theirs.eos_token_id in ours.eos_ids
    assert ours.size == len(theirs)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"added_tokens_decoder": []}}, "added_tokens_decoder: expected an object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": token("a")}}}, "expected a token number, found 'x'"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"5": "a b"}, "eos_token": {"content": 3}}}, ""),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": ""}}}}, "5: expected a token"),
        ({"tokenizer_config.json": {"pad_token": token("a", special=7)}}, "pad_token: expected a token"),  # type: ignore[arg-type]
        ({"added_tokens.json": {"<x>": -1}}, "added_tokens.json: <x>: expected a token number, found -1"),
        ({"added_tokens.json": {"<x>": 1.5}}, "added_tokens.json: <x>: expected a token number, found 1.5"),
        ({"special_tokens_map.json": {"pad_token": {"content": "a", "lstrip": 1}}}, "special_tokens_map.json: pad_tok"),
    ],
)
def test_tokens_that_are_none_are_refused_by_file_and_name(files: dict[str, Any], message: str) -> None:
    encoded = {name: json.dumps(content).encode() for name, content in files.items()}
    if not message:
        assert load_tokenizer({"tokenizer.json": byte_level(), **encoded}).eos_ids == frozenset()
        return
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer({"tokenizer.json": byte_level(), **encoded})
    assert message in str(caught.value)


def test_a_pointer_is_called_one() -> None:
    content = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json: a Git LFS pointer, not the file itself"):
        load_tokenizer({"tokenizer.json": content})
    with pytest.raises(TokenizerError, match=r"^added_tokens\.json: a Git LFS pointer"):
        load_tokenizer({"tokenizer.json": byte_level(), "added_tokens.json": content})
