"""A model's tokenizer and chat templates as metadata of a GGUF file, proved by making tokens of texts with both.

Source: llama.cpp, conversion/base.py (which key holds what) and llama-vocab.cpp (what it does with them).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bincompress.errors import BincompressError, StoreError
from bincompress.exporting.metadata import as_read
from bincompress.exporting.probes import TEXTS, with_tokens
from bincompress.inference.chat import load_template
from bincompress.model.added_tokens import special_tokens
from bincompress.model.files import json_object
from bincompress.model.tokenizer import Tokenizer, load_tokenizer
from bincompress.sources.gguf.splits import DIGITS, GPT2, SPLITS
from bincompress.sources.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, tokenizer_files

_KEY = "tokenizer.ggml."
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_FLAGS = ("lstrip", "rstrip", "single_word")
_MOST_NAMED = 3
_NO_MERGE = -1e6  # below every score of a token that merges make


def tokenizer_metadata(arch: str, assets: Mapping[str, bytes], rows: int) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of the tokenizer and the chat templates, and notes on what they do not say.

    arch: as llama.cpp calls it. rows: of the embedding; a token each. Raises StoreError where GGUF cannot hold the
    tokenizer: who reads the file would make other tokens of a text.
    """
    if "tokenizer.json" not in assets:
        return {}, ["the store has no tokenizer.json: the file is written without a tokenizer"]
    own = load_tokenizer(assets)
    parsed = json.loads(own.as_json())
    model = parsed["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise StoreError(f"tokenizer.json: a {model.get('type')} tokenizer is not written as GGUF; expected plain BPE")
    if own.size > rows:
        raise StoreError(f"tokenizer.json: {own.size:,} tokens; the embedding has {rows:,} rows, a token each in GGUF")
    kind = "llama" if model.get("byte_fallback") else "gpt2"
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if any(" " in part for pair in merges for part in pair):
        raise StoreError("tokenizer.json: a merge with a space is not written as GGUF")
    texts, types = _tokens(own, parsed, kind, rows, _named(assets, own).get("unknown_token_id"))
    found: dict[str, Any] = {
        "model": kind, "pre": _split(parsed, kind), "tokens": texts, "token_type": types,
        "merges": [" ".join(pair) for pair in merges], **_named(assets, own), **_ends(own, assets), **_added(own),
    }  # fmt: skip
    if kind == "llama":
        found["scores"] = _scores(texts, merges)
    notes = _flags(parsed)
    keyed = {_KEY + key: value for key, value in found.items()} | _templates(assets)
    prefixes = (False, True) if kind == "llama" else (None,)
    problem = ""
    for prefix in prefixes:
        tried = keyed if prefix is None else keyed | {f"{_KEY}add_space_prefix": prefix}
        problem = _difference(arch, own, tried, _texts(prefix))
        if not problem:
            return tried, [*notes, *_remarks(arch, own, parsed, tried)]
    raise StoreError(f"tokenizer.json is not written as GGUF: {problem}")


def _tokens(
    own: Tokenizer, parsed: Mapping[str, Any], kind: str, rows: int, unknown: int | None
) -> tuple[list[str], list[int]]:
    """Return every row's token and its type; rows without one are unused."""
    added = {entry["id"]: entry for entry in parsed["added_tokens"]}
    texts, types = [], []
    for number in range(rows):
        text = own.text_of(number)
        if text is None:
            texts.append(f"[PAD{number}]")
            types.append(UNUSED)
            continue
        texts.append(text)
        if number in added:
            types.append(CONTROL if added[number]["special"] else USER_DEFINED)
        else:
            types.append(BYTE if kind == "llama" and _is_byte(text) else NORMAL)
        if kind == "llama" and number == unknown:
            types[-1] = UNKNOWN
    return texts, types


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _split(parsed: Mapping[str, Any], kind: str) -> str:
    """Return llama.cpp's name for how text is split before merges; raises StoreError where it is not known."""
    if kind == "llama":
        return "default"
    parts = list(_parts(parsed.get("pre_tokenizer")))
    regexes = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    kinds = [part.get("type") for part in parts]
    if len(regexes) == 1 and kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        name = next((name for name, regex in SPLITS.items() if regex == regexes[0]), None)
        # Where several names stand for one split, the one that says most: llama.cpp knows all of them.
        named = {"llama3": "llama-bpe"}.get(name, name) if name is not None else None
        if named is not None:
            return named
    elif kinds == ["ByteLevel"]:
        return GPT2[1]
    elif kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return DIGITS[0]
    shown = str(regexes[0] if regexes else kinds)[:80]
    raise StoreError(f"tokenizer.json: how it splits text is not known in GGUF files: {shown}")


def _parts(pre: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(pre, Mapping) and pre.get("type") == "Sequence":
        for part in pre["pretokenizers"]:
            yield from _parts(part)
    elif isinstance(pre, Mapping):
        yield pre


def _named(assets: Mapping[str, bytes], own: Tokenizer) -> dict[str, int]:
    """Return the numbers of the tokens with a role."""
    texts = special_tokens(assets).texts
    found = {
        "bos_token_id": own.bos_id,
        "unknown_token_id": own.number_of(texts.get("unk_token")),
        "padding_token_id": own.number_of(texts.get("pad_token")),
    }
    return {key: number for key, number in found.items() if number is not None}


def _ends(own: Tokenizer, assets: Mapping[str, bytes]) -> dict[str, int]:
    """Return the numbers of the tokens that end a text, the tokenizer's own first; raises StoreError past 3."""
    first = own.number_of(special_tokens(assets).texts.get("eos_token"))
    stated = (json_object(assets, "config.json") or {}).get("eos_token_id")
    first = stated if first is None and type(stated) is int else first
    ends = sorted(own.eos_ids, key=lambda number: (number != first, number))
    if len(ends) > len(_ENDS):
        raise StoreError(f"{len(ends)} tokens end a text; a GGUF file names at most {len(_ENDS)}")
    return dict(zip(_ENDS, ends, strict=False))


def _added(own: Tokenizer) -> dict[str, bool]:
    """Return which tokens a text gets at its ends; raises StoreError where these are others than bos and eos."""
    plain, special = own.encode("1", special=False), own.encode("1")
    for bos in (False, True):
        for eos in own.eos_ids if own.eos_ids and len(special) > len(plain) + bos else [None]:
            if special == [*([own.bos_id] if bos else []), *plain, *([] if eos is None else [eos])]:
                return {"add_bos_token": bos, "add_eos_token": eos is not None}
    raise StoreError(f"tokenizer.json: puts tokens around a text that a GGUF file cannot say: {special} of {plain}")


def _scores(texts: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return a score for each token: the later its first merge, the lower; by them llama.cpp merges."""
    places: dict[str, int] = {}
    for place, pair in enumerate(merges):
        places.setdefault("".join(pair), place)
    return [-float(places[text]) if text in places else _NO_MERGE for text in texts]


def _templates(assets: Mapping[str, bytes]) -> dict[str, str]:
    found = load_template(assets)
    named = {} if found is None else found.templates
    key = "tokenizer.chat_template"
    return {key if name == "default" else f"{key}.{name}": text for name, text in named.items()}


def _read(arch: str, keyed: Mapping[str, Any]) -> Tokenizer:
    return load_tokenizer(tokenizer_files(arch, as_read(keyed)))


def _texts(prefix: bool | None) -> list[str]:
    """Return texts that have to become the same tokens; those that begin with a space where none is put before them.

    llama.cpp puts one before every text; transformers, as whom we read files, not before another space.
    """
    return [text for text in TEXTS if not prefix or not text.startswith((" ", "\u2581"))]


def _difference(arch: str, own: Tokenizer, keyed: Mapping[str, Any], texts: Sequence[str]) -> str:
    """Return what who reads the file would do otherwise with a text of no special tokens; nothing if all is equal."""
    try:
        back = _read(arch, keyed)
    except BincompressError as error:
        return str(error)
    for text in texts:
        if (ours := own.encode(text)) != (theirs := back.encode(text)):
            return f"{text!r} is {ours} here, and {theirs} to who reads the file"
    if own.eos_ids != back.eos_ids:
        return f"texts end with {sorted(own.eos_ids)} here, and with {sorted(back.eos_ids)} to who reads the file"
    return ""


def _remarks(arch: str, own: Tokenizer, parsed: Mapping[str, Any], keyed: Mapping[str, Any]) -> list[str]:
    """Return notes on texts of which a reader of the file may make other tokens."""
    back, found = _read(arch, keyed), []
    added = [entry["content"] for entry in parsed["added_tokens"]]
    if any(own.encode(text) != back.encode(text) for text in TEXTS):
        found.append("texts that begin with a space may become other tokens to who reads the file")
    other = [token for token in added if any(own.encode(text) != back.encode(text) for text in with_tokens(token))]
    if other:
        found.append(
            f"texts with {_some(other)} may become other tokens: a GGUF file does not say how spaces beside them count"
        )
    if parsed.get("normalizer") and parsed["normalizer"].get("type") == "NFC":
        found.append("a GGUF file does not say that texts are normalized (NFC) first")
    words = [word for number in range(own.size) if (word := own.decode([number]))]  # special ones give none
    pairs = zip(words, own.encode_all(words), back.encode_all(words), strict=True)
    differ = [word for word, ours, theirs in pairs if ours != theirs and word not in added]
    if differ:
        found.append(f"{len(differ)} tokens' own texts become other tokens to who reads the file, as {_some(differ)}")
    return found


def _flags(parsed: Mapping[str, Any]) -> list[str]:
    found = {flag: [entry["content"] for entry in parsed["added_tokens"] if entry.get(flag)] for flag in _FLAGS}
    return [f"a GGUF file does not say {flag} of {_some(tokens)}" for flag, tokens in found.items() if tokens]


def _some(texts: Sequence[str]) -> str:
    shown = ", ".join(ascii(text) for text in texts[:_MOST_NAMED])
    return shown + (f" and {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else "")
