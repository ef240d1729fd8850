"""Where in a returned text does each token begin? Tokens that are not in it, such as a first one, have no length."""

from collections.abc import Sequence

from bincompress.model.tokenizer import TextStream, Tokenizer


class TextOffsets:
    """Offsets in characters of a text's tokens, asked for one after the other.

    A token that continues a character begins where the character does.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], echoed: str | None) -> None:
        """prompt: its tokens; echoed: its text, where the returned text begins with it."""
        self._written = TextStream(tokenizer, prompt)
        self._read = [] if echoed is None else _offsets(tokenizer, prompt, echoed)
        self._at = len(echoed or "")

    def next(self, token: int) -> int:
        """Return the offset of the next token."""
        if self._read:
            return self._read.pop()
        begin = self._at
        self._at += len(self._written.push(token))
        return begin


def _offsets(tokenizer: Tokenizer, prompt: Sequence[int], text: str) -> list[int]:
    """Return the offsets of a prompt's tokens in its text, the last first."""
    own = tokenizer.encode(text, special=False)
    places = range(len(prompt) - len(own) + 1)
    # Around the text's own tokens are those that the tokenizer adds; tokens that were given have them in the text.
    before = next((place for place in places if list(prompt[place : place + len(own)]) == own), None)
    begin, end = (0, len(prompt)) if before is None else (before, before + len(own))
    stream, at, found = TextStream(tokenizer, skip_special=False), 0, []
    for place, token in enumerate(prompt):
        found.append(min(at, len(text)))
        if begin <= place < end:
            at += len(stream.push(token))
    return found[::-1]
