"""Text to tokens and back, also token by token: the model's own tokenizer.json with the ids that end a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from bincompress.model.added_tokens import NAMED, SpecialTokens, add, check_unicode, named, special_tokens
from bincompress.model.charsmap import check_charsmaps
from bincompress.model.errors import PromptError, TokenizerError
from bincompress.model.files import json_object, pointer
from bincompress.model.llama_tokenizer import LlamaForm, llama_form, rebuild, without_added
from bincompress.process.systems import give_back_freed_memory

_UNFINISHED = "\ufffd"  # what decoders give for bytes that are not yet a whole character
_LONGEST_CHARACTER = 4  # bytes in UTF-8, so tokens at most
_SPACE = "\u2581"  # as sentencepiece writes it


def _byte_alphabet() -> dict[str, int]:
    """Return the bytes by the characters that stand for them in byte-level tokens. Source: GPT-2, encoder.py."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_TAIL = 64  # tokens of the prompt that are looked at
_CONTEXT = 6  # tokens of the prompt that decide how the first new token is written (a leading space, say)


class Tokenizer:
    """A tokenizer.json with the tokens added beside it, its beginning-of-text token and the tokens that end a text."""

    def __init__(
        self,
        data: bytes,
        *configs: Mapping[str, Any] | None,
        tokens: SpecialTokens | None = None,
        split_special_tokens: bool = False,
        llama: LlamaForm | None = None,
    ) -> None:
        """Read tokenizer.json's bytes and the ids that begin and end a text.

        configs: generation_config.json, config.json and tokenizer_config.json as far as the model has them. All end
        tokens that any of them names end a text; the first that names a beginning-of-text token decides it. tokens:
        those that the files beside tokenizer.json know. split_special_tokens: special tokens in a text are text.
        llama: how the class LlamaTokenizer writes texts, where a file names it.
        """
        if found := pointer(data):
            raise TokenizerError(f"tokenizer.json: {found}")
        check_charsmaps(data)
        with named("tokenizer.json: cannot be read"):
            read = without_added(data) if llama is not None and llama.lists_all else data
            # Not from a text, which takes 60 MB more for a moment with a vocabulary of 151,936.
            self._tokenizer = tokenizers.Tokenizer.from_buffer(read)
        if llama is not None:
            rebuild(self._tokenizer, llama)
        _check_dropout(self._tokenizer)
        give_back_freed_memory()  # a large vocabulary takes a hundred MB while it is read
        # A stored limit or padding belongs to training; transformers switches both off as well.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = b'"ByteLevel"' in data
        self._tokenizer.encode_special_tokens = split_special_tokens
        if tokens is not None:
            add(self._tokenizer, tokens)
        given = [config for config in configs if config is not None]
        self.eos_ids = frozenset(token for config in given for token in self._ids(config, "eos"))
        bos = [token for config in given for token in self._ids(config, "bos")]
        self.bos_id: int | None = bos[0] if bos else None
        self._with: dict[tuple[str, ...], frozenset[int]] = {}

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def as_json(self) -> str:
        """Return tokenizer.json of all that is known here, added tokens too."""
        return str(self._tokenizer.to_str())

    def text_of(self, token: int) -> str | None:
        """Return a token as the vocabulary writes it, None where no token has this number."""
        found = self._tokenizer.id_to_token(token)
        return None if found is None else str(found)

    def number_of(self, text: str | None) -> int | None:
        """Return the number of a token that is written so, None where there is none."""
        return None if text is None else self._tokenizer.token_to_id(text)

    def tokens_with(self, texts: tuple[str, ...]) -> frozenset[int]:
        """Return the tokens that have one of these texts in what they write; those asked for last are kept."""
        known = self._with.get(texts)
        if known is None:
            wanted = [text.encode("utf-8", "replace") for text in texts]
            tokens = range(self.size)
            known = frozenset(token for token in tokens if any(each in self.token_bytes(token) for each in wanted))
            self._with = {texts: known}
        return known

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are left out of texts."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, own in added.items() if own.special)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the tokens of a text, with those that the tokenizer's post-processor adds unless `special` is off."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = ascii(text[error.start])
            raise PromptError(f"text: not UTF-8: {found} at place {error.start}; convert it (iconv -t UTF-8)") from None
        with named("tokenizer.json: cannot make tokens of the text"):
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of many texts, as `encode` does of one."""
        with named("tokenizer.json: cannot make tokens of the text"):
            return [list(found.ids) for found in self._tokenizer.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of these tokens."""
        with named("tokenizer.json: cannot make a text of tokens"):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def token_bytes(self, token: int) -> bytes:
        """Return what one token writes; a token may end in the midst of a character. Special tokens give their text."""
        text = self._tokenizer.id_to_token(token) or ""
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        if self._byte_level and all(character in _BYTES for character in text):
            return bytes(_BYTES[character] for character in text)
        return text.replace(_SPACE, " ").encode("utf-8", "replace")

    def id_of(self, text: str) -> int | None:
        """Return the number of the token that is written so, or None."""
        found = self._tokenizer.token_to_id(text)
        return None if found is None else int(found)

    def _ids(self, config: Mapping[str, Any], kind: str) -> list[int]:
        """Return the tokens that one file names as those that begin ("bos") or end ("eos") a text."""
        value = config.get(f"{kind}_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        numbers = [entry for entry in listed if type(entry) is int]
        if len(numbers) != len(listed):
            raise TokenizerError(f"{kind}_token_id: expected a token number or a list, found {value!r}")
        named = config.get(f"{kind}_token")
        text = named.get("content") if isinstance(named, Mapping) else named
        if isinstance(text, str):
            check_unicode(text, f"{kind}_token")
        token = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        # A negative number is how files say that there is none.
        return [number for number in numbers if number >= 0] + ([] if token is None else [token])


class TextStream:
    """Text of tokens that arrive one by one; pieces joined are the text of all, and no piece ends inside a character.

    A decoder may write a token differently at the start of a text (sentencepiece drops a leading space), so each
    token is decoded after those before it, and what these give alone is cut off.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        skip_special: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """shown: special tokens that are text all the same."""
        self._tokenizer = tokenizer
        self._skip = skip_special and not shown
        self._left_out = tokenizer.special_ids - shown if shown else frozenset()
        self._ids: list[int] = []
        self._written = ""  # text of the tokens in _ids that has already been given away
        self._keep_last([token for token in prompt[-_TAIL:] if token not in self._left_out])

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
        if token in self._left_out:
            return ""
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
    llama = llama_form(files)
    tokens = special_tokens(files)
    own = {**(json_object(files, "tokenizer_config.json") or {}), **tokens.texts}
    for name in NAMED:
        if name not in tokens.named:
            own.pop(name, None)
    configs = (json_object(files, "generation_config.json"), json_object(files, "config.json"), own)
    return Tokenizer(
        files["tokenizer.json"],
        *configs,
        tokens=tokens,
        split_special_tokens=own.get("split_special_tokens") is True,
        llama=llama,
    )


def _check_dropout(tokenizer: tokenizers.Tokenizer) -> None:
    """Raise TokenizerError where merges are left out at random, as in training: a text has other ids each time."""
    dropout = getattr(tokenizer.model, "dropout", None)
    if dropout:
        raise TokenizerError(
            f"tokenizer.json: model: dropout = {dropout:.3g} gives random tokens; expected null; set it to null"
        )
