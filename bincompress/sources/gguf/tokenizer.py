"""The tokenizer of a GGUF file, as the files of a checkpoint: tokenizer.json, tokenizer_config.json, the chat template.

Ids are those of transformers' reading of the same file. Source: transformers, integrations/gguf/
gguf_tokenizer_mapping.py and the tokenizer classes that it fills (GPT2Tokenizer, LlamaTokenizer, GemmaTokenizer).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from bincompress.errors import CheckpointError
from bincompress.sources.gguf.merges import merges_of_vocabulary
from bincompress.sources.gguf.splits import DIGITS, GPT2, SPLITS

_KEY = "tokenizer.ggml."
_SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens (llama.h)
_GEMMA = ("gemma", "gemma2", "gemma3")
# Keys that are read, or that say nothing of how texts become tokens.
TOKENIZER_KEYS = (
    "model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges", "added_tokens", "add_bos_token",
    "add_eos_token", "add_space_prefix", "add_sep_token", "chat_template", "huggingface.json",
)  # fmt: skip
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Tokens that the class has by itself, where the vocabulary has them.
_OF_CLASS = {"gpt2": ("<|endoftext|>",), "llama": ("<unk>", "<s>", "</s>")}
_OF_GEMMA = ("<unk>", "<bos>", "<eos>", "<pad>", "<mask>")


def tokenizer_files(arch: str, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of the tokenizer by name; none where the file has no tokenizer.

    arch: general.architecture. Raises CheckpointError where its kind, or the way that it splits text, is not known.
    """
    if f"{_KEY}model" not in metadata:
        return {}
    tokens = _texts(metadata, "tokens")
    with _named():
        backend = _backend(arch, tokens, metadata)
        _add_ends(backend, tokens, metadata)
        made = backend.to_str()
    named = {name: _token(tokens, metadata, key) for name, key in _NAMED.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: text for name, text in named.items() if text is not None},
        **{f"add_{end}_token": _adds(metadata, end) for end in ("bos", "eos")},
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": made.encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }
    return files | _templates(metadata) | _ends(tokens, metadata)


@contextmanager
def _named() -> Iterator[None]:
    """Raise CheckpointError in place of what the tokenizers library raises: bare Exceptions, and panics of its Rust."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, CheckpointError | MemoryError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"GGUF metadata: no tokenizer can be made of it: {reason}") from None


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    found = metadata.get(_KEY + key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"GGUF metadata: {_KEY}{key}: expected a list of texts")
    return found


def _numbers(metadata: Mapping[str, Any], key: str, count: int) -> Any:
    """Return an array of one number for each token."""
    found = metadata.get(_KEY + key)
    if not isinstance(found, np.ndarray) or len(found) != count:
        held = len(found) if isinstance(found, np.ndarray | list) else repr(found)[:40]
        raise CheckpointError(f"GGUF metadata: {_KEY}{key}: expected {count:,} numbers, one a token, found {held}")
    return found


def _token(tokens: Sequence[str], metadata: Mapping[str, Any], key: str) -> str | None:
    """Return the text of the token whose number a key holds."""
    number = metadata.get(_KEY + key)
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise CheckpointError(f"GGUF metadata: {_KEY}{key}: {number!r:.40}; expected one of {len(tokens):,} tokens")
    return tokens[number] or None


def _adds(metadata: Mapping[str, Any], end: str) -> bool:
    """Return whether a text gets a token at its beginning (bos) or end (eos)."""
    key = f"{_KEY}add_{end}_token"
    default = end == "bos" and metadata[f"{_KEY}model"] == "llama"  # as llama.cpp does for files that do not say
    return _truth(metadata, key, default)


def _truth(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"GGUF metadata: {key}: expected a truth, found {value!r:.40}")
    return value


def _backend(arch: str, tokens: list[str], metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer without what it puts at the ends of a text."""
    kind, split = metadata[f"{_KEY}model"], metadata.get(f"{_KEY}pre", "default")
    if kind == "gpt2":
        backend = _byte_level(tokens, metadata, split)
        own: Iterable[str] = _OF_CLASS["gpt2"]
    elif kind == "llama":
        gemma = arch in _GEMMA
        backend = _gemma(tokens, metadata) if gemma else _sentencepiece(arch, tokens, metadata)
        own = _OF_GEMMA if gemma else _OF_CLASS["llama"]
        if split in SPLITS:
            backend.pre_tokenizer = _splitter(SPLITS[split])
    else:
        raise CheckpointError(f"GGUF metadata: {_KEY}model: {kind!r:.40} is not read; known: 'gpt2', 'llama'")
    _add_tokens(backend, tokens, metadata, kind == "gpt2", own)
    return backend


def _byte_level(tokens: list[str], metadata: Mapping[str, Any], split: Any) -> tokenizers.Tokenizer:
    spelling = _bytes_to_unicode()
    alphabet = set(spelling.values())
    vocab = {
        token if set(token) <= alphabet else "".join(spelling[byte] for byte in token.encode("utf-8")): number
        for number, token in enumerate(tokens)
    }
    backend = _bpe(vocab, _merges(metadata, vocab), continuing_subword_prefix="", end_of_word_suffix="")
    if split in SPLITS:
        backend.pre_tokenizer = _splitter(SPLITS[split])
    elif split in DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif split in GPT2:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        raise CheckpointError(
            f"GGUF metadata: {_KEY}pre: {split!r:.60}: how this tokenizer splits text is not known; known: "
            f"{', '.join(sorted({*SPLITS, *DIGITS, *GPT2}))}"
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _splitter(split: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(arch: str, tokens: list[str], metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocab = {token: number for number, token in enumerate(tokens)}
    scores = _numbers(metadata, "scores", len(tokens)) if f"{_KEY}merges" not in metadata else []
    backend = _bpe(
        vocab, _merges(metadata, vocab, dict(zip(tokens, map(float, scores), strict=False))), byte_fallback=True,
        fuse_unk=True,
    )  # fmt: skip
    prefixed = _truth(metadata, f"{_KEY}add_space_prefix", True)
    if not prefixed:
        backend.normalizer = normalizers.Replace(pattern=" ", content=_SPACE)
    elif arch == "phi3":  # whose own tokenizer.json does it so
        prefix = [normalizers.Prepend(prepend=_SPACE), normalizers.Replace(pattern=" ", content=_SPACE)]
        backend.normalizer = normalizers.Sequence(prefix)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    parts = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        *([decoders.Strip(content=" ", left=1)] if prefixed else []),
    ]
    backend.decoder = decoders.Sequence(parts)
    return backend


def _gemma(tokens: list[str], metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    if _truth(metadata, f"{_KEY}add_space_prefix", False):
        raise CheckpointError(f"GGUF metadata: {_KEY}add_space_prefix: True is not supported of Gemma")
    # Tokens of spaces alone are stored as spaces; the order of the vocabulary is that of the merges.
    spelled = [_SPACE * len(token) if " " in token and not token.strip() else token for token in tokens]
    vocab = {token: number for number, token in enumerate(spelled)}
    places = {token: -float(number) for number, token in enumerate(spelled)}
    backend = _bpe(vocab, _merges(metadata, vocab, places), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    return backend


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))


def _merges(
    metadata: Mapping[str, Any], vocab: Mapping[str, int], scores: Mapping[str, float] | None = None
) -> list[tuple[str, str]]:
    """Return the merges that the file lists, or those that its vocabulary implies."""
    if f"{_KEY}merges" not in metadata and scores is not None:
        return merges_of_vocabulary(vocab, scores)
    pairs = [tuple(merge.split(" ")) for merge in _texts(metadata, "merges")]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong is not None:
        raise CheckpointError(f"GGUF metadata: {_KEY}merges: {' '.join(wrong)!r:.60}; expected two parts and a space")
    return pairs  # type: ignore[return-value]


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], metadata: Mapping[str, Any], byte_level: bool, own: Iterable[str]
) -> None:
    """Add the tokens that are matched whole: those of control as special ones, and those that a user defined."""
    alphabet = set(_bytes_to_unicode().values()) if byte_level else None
    backend.add_tokens([AddedToken(token, special=True) for token in own if backend.token_to_id(token) is not None])
    if f"{_KEY}token_type" not in metadata:
        return
    types = _numbers(metadata, "token_type", len(tokens)).tolist()
    control = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, types, strict=True)
        if kind == CONTROL and token and (alphabet is None or set(token) <= alphabet)
    ]
    backend.add_tokens(control)
    vocab = backend.get_vocab(True)
    defined = [
        AddedToken(token, normalized=False, special=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind == USER_DEFINED and token and token in vocab
    ]
    backend.add_tokens(defined)


def _add_ends(backend: tokenizers.Tokenizer, tokens: list[str], metadata: Mapping[str, Any]) -> None:
    """Let a text begin and end with the tokens that the file says."""
    ends = {
        end: _token(tokens, metadata, f"{end}_token_id") if _adds(metadata, end) else None for end in ("bos", "eos")
    }
    bos, eos = ends["bos"], ends["eos"]
    single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    special = [(text, int(metadata[f"{_KEY}{end}_token_id"])) for end, text in ends.items() if text]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def _templates(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the chat template, and others by their names."""
    found = {}
    for key, text in metadata.items():
        if key == "tokenizer.chat_template" and isinstance(text, str):
            found["chat_template.jinja"] = text.encode()
        elif key.startswith("tokenizer.chat_template.") and isinstance(text, str):
            name = key.removeprefix("tokenizer.chat_template.")
            if name.replace("_", "").replace("-", "").isalnum() and name.isascii() and len(name) < 64:
                found[f"additional_chat_templates/{name}.jinja"] = text.encode()
    return found


def _ends(tokens: list[str], metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return generation_config.json where an answer may end with another token than a text (eot)."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    numbers = [metadata[_KEY + key] for key in keys if _token(tokens, metadata, key) is not None]
    ends = list(dict.fromkeys(numbers))
    return {"generation_config.json": json.dumps({"eos_token_id": ends}).encode()} if len(ends) > 1 else {}


def _bytes_to_unicode() -> dict[int, str]:
    """Return the character that stands for each byte in a byte-level vocabulary (GPT-2, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
