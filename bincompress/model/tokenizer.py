"""Text to tokens and back, also token by token: the model's own tokenizer.json with the ids that end a text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from bincompress.model.errors import PromptError, TokenizerError

_UNFINISHED = "\ufffd"  # what decoders give for bytes that are not yet a whole character
_LONGEST_CHARACTER = 4  # bytes in UTF-8, so tokens at most
_CONTEXT = 6  # tokens of the prompt that decide how the first new token is written (a leading space, say)


class Tokenizer:
    """A tokenizer.json, its beginning-of-text token and the tokens that end generation."""

    def __init__(self, data: bytes, *configs: Mapping[str, Any] | None) -> None:
        """Read tokenizer.json's bytes; the first of `configs` that names eos_token_id (or bos_token_id) decides it.

        Give generation_config.json, config.json and tokenizer_config.json in this order, as far as the model has them;
        the last names tokens by text.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"tokenizer.json: cannot be read: {str(error)[:200]}") from None
        # A stored limit or padding belongs to training; transformers switches both off as well.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        given = [config for config in configs if config is not None]
        self.eos_ids = frozenset(self._ids(given, "eos"))
        bos = self._ids(given, "bos")
        self.bos_id: int | None = bos[0] if bos else None

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the tokens of a text, with those that the tokenizer's post-processor adds unless `special` is off."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = ascii(text[error.start])
            raise PromptError(f"text: not UTF-8: {found} at place {error.start}; convert it (iconv -t UTF-8)") from None
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of these tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def _ids(self, configs: Sequence[Mapping[str, Any]], kind: str) -> list[int]:
        for config in configs:
            value = config.get(f"{kind}_token_id")
            listed = value if isinstance(value, list) else [value]
            if value is not None:
                numbers = [entry for entry in listed if type(entry) is int and entry >= 0]
                if len(numbers) != len(listed):
                    raise TokenizerError(f"{kind}_token_id: expected a token number or a list, found {value!r}")
                return numbers
            named = config.get(f"{kind}_token")
            text = named.get("content") if isinstance(named, Mapping) else named
            token = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
            if token is not None:
                return [token]
        return []


class TextStream:
    """Text of tokens that arrive one by one; pieces joined are the text of all, and no piece ends inside a character.

    A decoder may write a token differently at the start of a text (sentencepiece drops a leading space), so each
    token is decoded after those before it, and what these give alone is cut off.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._ids: list[int] = []
        self._written = ""  # text of the tokens in _ids that has already been given away
        self._keep_last(prompt)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip)

    def _keep_last(self, ids: Sequence[int]) -> bool:
        """Let the window begin a few tokens before the end of `ids`, between two characters; say whether one is found.

        A window that begins inside a character decodes to other text: with byte tokens, a whole run of it.
        """
        for length in range(_CONTEXT, _CONTEXT + _LONGEST_CHARACTER):
            text = self._tokenizer.decode(ids[-length:], self._skip)
            if _UNFINISHED not in text:
                self._ids, self._written = list(ids[-length:]), text
                return True
        return False

    def push(self, token: int) -> str:
        """Return the text that this token completes, perhaps none."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(_UNFINISHED) or len(text) <= len(self._written):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """Return what was held back, replacement characters included."""
        return self._give(self._decode())

    def _give(self, text: str) -> str:
        piece = text[len(self._written) :]
        # Only the last tokens can matter to the next one.
        if len(self._ids) < 3 * _CONTEXT or not self._keep_last(self._ids):
            self._written = text
        return piece


def load_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """Build the tokenizer from a model's files by name; raise TokenizerError if tokenizer.json is not among them."""
    if "tokenizer.json" not in files:
        raise TokenizerError("the model has no tokenizer.json; put it beside config.json")
    names = ("generation_config.json", "config.json", "tokenizer_config.json")
    return Tokenizer(files["tokenizer.json"], *(json_object(files, name) for name in names))


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    """Return a file's JSON object, None if the model lacks the file."""
    if name not in files:
        return None
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise TokenizerError(f"{name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{name}: expected an object, found {type(value).__name__}")
    return value
