"""Which tokens does a model have beside those of tokenizer.json? Read by the rule of transformers, so that ids agree.

`added_tokens_decoder` of tokenizer_config.json counts; only where it is absent do special_tokens_map.json and
added_tokens.json. Then come the named tokens (bos_token, eos_token, ...) and the extra ones.
Source: transformers 5, tokenization_utils_base.py (_from_pretrained) and tokenization_utils_tokenizers.py (__init__).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tokenizers

from bincompress.errors import BincompressError
from bincompress.model.errors import TokenizerError
from bincompress.model.files import json_object
from bincompress.model.llama_tokenizer import class_tokens

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class SpecialTokens:
    """What the files beside tokenizer.json say of tokens."""

    listed: tuple[tokenizers.AddedToken, ...]  # in the order of their ids
    named: dict[str, tokenizers.AddedToken]  # by "bos_token" and so on, a model's own names last
    extra: tuple[tokenizers.AddedToken, ...]

    @property
    def texts(self) -> dict[str, str]:
        """The named tokens' texts."""
        return {name: token.content for name, token in self.named.items()}


def special_tokens(files: Mapping[str, bytes]) -> SpecialTokens:
    """Read a model's files by name; raises TokenizerError naming the file and the entry that is not a token."""
    config = {**class_tokens(files), **(json_object(files, _CONFIG) or {})}
    extra = _extra(config)
    listed: dict[int, tokenizers.AddedToken] = {}
    origin = dict.fromkeys(config, _CONFIG)
    decoder = config.get("added_tokens_decoder")
    if "added_tokens_decoder" not in config:
        given = json_object(files, _MAP) or {}
        origin |= dict.fromkeys(given, _MAP)
        config = {**config, **{key: _as_special(value) for key, value in given.items()}}
        extra += [token for token in _list(given, "extra_special_tokens") if token not in extra]
        special = {_text(config.get(name)) for name in NAMED} | {_text(token) for token in extra}
        # The map's older name for extra tokens counts only where nothing has the newer one.
        extra = extra or _list(given, "additional_special_tokens")
        for text, number in (json_object(files, _ADDED) or {}).items():
            check_unicode(text, _ADDED)
            listed[_number(number, _ADDED, text)] = tokenizers.AddedToken(
                text, normalized=text not in special, special=text in special
            )
    elif not isinstance(decoder, Mapping):
        raise TokenizerError(f"{_CONFIG}: added_tokens_decoder: expected an object, found {decoder!r:.60}")
    else:
        for key, entry in decoder.items():
            listed[_number(key, _CONFIG, "added_tokens_decoder")] = _token(entry, _CONFIG, key, special=False)
    names = [*NAMED, *(key for key in config if key.endswith("_token") and key not in NAMED)]
    named = {
        name: _token(config[name], origin[name], name)
        for name in names
        if isinstance(config.get(name), str | Mapping) and _text(config[name])
    }
    models_own = config.get("extra_special_tokens")
    if isinstance(models_own, Mapping):
        named |= {str(name): _token(token, _CONFIG, str(name)) for name, token in models_own.items()}
    ordered = tuple(token for _, token in sorted(listed.items()))
    return SpecialTokens(ordered, named, tuple(_token(token, _CONFIG, "extra_special_tokens") for token in extra))


def add(tokenizer: tokenizers.Tokenizer, tokens: SpecialTokens) -> None:
    """Add to a tokenizer the tokens that its own file lacks; ids are given by the library, in this order."""
    known = tokenizer.get_added_tokens_decoder().values()
    wanted = list(tokens.listed)
    texts = {token.content for token in (*known, *wanted)}
    for token in (*tokens.named.values(), *tokens.extra):
        if token.content not in texts:
            texts.add(token.content)
            wanted.append(token)
    special = set(tokens.texts.values())
    for token in wanted:
        if token.content in special and not token.special:
            token.special = True
    present = {_state(token) for token in known}
    if any(_state(token) not in present for token in wanted):  # else nothing would change, and it takes milliseconds
        with named("tokens beside tokenizer.json: cannot be added"):
            tokenizer.add_tokens(wanted)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Raise TokenizerError in place of what the tokenizers library raises: bare Exceptions, and panics of its Rust."""
    try:
        yield
    except BaseException as error:
        # A panic is no Exception, so that it ends a program of PyO3's own; here it is a fault of the file.
        if isinstance(error, BincompressError | MemoryError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        raise TokenizerError(f"{what}: {' '.join(str(error).split())[:200] or type(error).__name__}") from None


def _state(token: tokenizers.AddedToken) -> tuple[Any, ...]:
    return (token.content, *(getattr(token, flag) for flag in _FLAGS))


def _extra(config: Mapping[str, Any]) -> list[Any]:
    return _list(config, "extra_special_tokens") or _list(config, "additional_special_tokens")


def _list(config: Mapping[str, Any], key: str) -> list[Any]:
    given = config.get(key)
    return list(given) if isinstance(given, list) else []


def _as_special(value: Any) -> Any:
    return {**value, "special": True} if isinstance(value, Mapping) and "content" in value else value


def _text(value: Any) -> str:
    """Return the text of a token as the files write it, empty where there is none."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else ""


def _token(value: Any, file: str, key: str, special: bool = True) -> tokenizers.AddedToken:
    """Return a token written as text or as an object; special: what a token that does not say is."""
    text = _text(value)
    flags = {flag: value[flag] for flag in _FLAGS if flag in value} if isinstance(value, Mapping) else {}
    check_unicode(text, f"{file}: {key}")
    if not text or not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerError(f"{file}: {key}: expected a token (text, or an object with content), found {value!r:.60}")
    return tokenizers.AddedToken(text, **{"special": special, **flags})


def check_unicode(text: str, where: str) -> None:
    """Raise TokenizerError where a token has half of a pair of surrogates, which JSON can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise TokenizerError(f"{where}: {text!r:.60} is not a text of Unicode (a lone surrogate)") from None


def _number(value: Any, file: str, key: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0 or isinstance(value, bool | float):
        raise TokenizerError(f"{file}: {key}: expected a token number, found {value!r:.60}")
    return number
