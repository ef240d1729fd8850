"""The class LlamaTokenizer in tokenizer_config.json: ids are those of transformers, which rebuilds tokenizer.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from bincompress.model.errors import TokenizerError
from bincompress.model.llama_tokenizer import AS_IT_IS
from bincompress.model.tokenizer import load_tokenizer

TEXTS = [" a bc", "a bc", "  a", "<s>bc</s> a</s>\nb", "a</s>  b<x>a", "", "\na", "é😀a", "▁a", "a q<y> a"]


def metaspace(**model: Any) -> dict[str, Any]:
    """Return a tokenizer.json as Llama 2 has it: the normalizer puts a space before each piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁bc", "▁▁", *"abc", "bc"]
    merges = [("▁", "a"), ("b", "c"), ("▁", "bc"), ("▁", "▁")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True, **model)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    made.add_tokens([AddedToken("<x>", normalized=False), AddedToken("<y>", normalized=True)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found: dict[str, Any] = json.loads(made.to_str())
    return found


def files_of(own: dict[str, Any], model_type: str = "llama", **model: Any) -> dict[str, bytes]:
    named = {"tokenizer_class": "LlamaTokenizer", **own}
    config = {"model_type": model_type, "vocab_size": 300}
    parts = {"tokenizer.json": metaspace(**model), "tokenizer_config.json": named, "config.json": config}
    return {name: json.dumps(part).encode() for name, part in parts.items()}


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CASES: dict[str, dict[str, bytes]] = {
    "plain": files_of(NAMED),
    "fast": files_of({**NAMED, "tokenizer_class": "LlamaTokenizerFast"}),
    "legacy": files_of({**NAMED, "legacy": True}),
    "not legacy": files_of({**NAMED, "legacy": None}),
    "no prefix": files_of({**NAMED, "add_prefix_space": False}),
    "legacy, prefix null": files_of({**NAMED, "legacy": True, "add_prefix_space": None}),
    "no names": files_of({}),
    "names null": files_of(dict.fromkeys(NAMED)),
    "end token of its own": files_of({**NAMED, "eos_token": "<end>"}),
    "dropout, which the class leaves out": files_of(NAMED, dropout=0.5),
    "a class that takes the file": files_of({**NAMED, "tokenizer_class": "PreTrainedTokenizerFast"}),
    "a model type that takes the file": files_of(NAMED, model_type="mistral"),
    "added": files_of({**NAMED, "added_tokens_decoder": {"270": {"content": "<z>", "special": True}}}),
}


@pytest.mark.slow  # which imports transformers
@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers")
    for name, content in CASES[case].items():
        (tmp_path / name).write_bytes(content)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(CASES[case])
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text) == expected, text
        assert ours.decode(expected, skip_special=False) == theirs.decode(expected), text
    ends = set() if theirs.eos_token_id is None else {theirs.eos_token_id}
    assert ours.eos_ids == ends


def test_only_the_first_piece_gets_a_space() -> None:
    """The same without transformers: 260 is a with a space before it, 263 is a alone."""
    cases = ("plain", "legacy", "no prefix")
    ids = {case: load_tokenizer(CASES[case]).encode("a</s>a", special=False) for case in cases}
    assert ids == {"plain": [260, 2, 263], "legacy": [260, 2, 260], "no prefix": [263, 2, 263]}


def test_model_types_that_take_the_file_are_those_of_transformers() -> None:
    table = pytest.importorskip("transformers.models.auto.tokenization_auto")
    taken = ("TokenizersBackend", "MistralCommonBackend", "PreTrainedTokenizerFast")
    named = {key for key, value in table.TOKENIZER_MAPPING_NAMES.items() if value in taken}
    assert named | table.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS >= AS_IT_IS


def test_random_merges_are_refused_by_name() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: model: dropout = 0\.5 gives random tokens"):
        load_tokenizer(files_of({"tokenizer_class": "PreTrainedTokenizerFast"}, dropout=0.5))
    load_tokenizer(files_of({"tokenizer_class": "PreTrainedTokenizerFast"}, dropout=0.0))
