"""Which modules does a pattern of quantization_config name? It is untrusted, so the time that it takes is bounded."""

import re
import time
from collections.abc import Iterable

from bincompress.errors import CheckpointError

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]{1,300}")
_REGEX = re.compile(r"(?:[A-Za-z0-9_.\-|^$*+?()\[\]]|\\[.dw\-_]){1,500}")
_MOST_REPEATS = 3  # of one alternative: matching takes a name's length to this power at most
_MOST_ALTERNATIVES = 32
_SECONDS = 5.0  # for all patterns and names of a checkpoint


class Patterns:
    """Lists of patterns, each a name, or a regular expression of a kind whose time is bounded."""

    def __init__(self, where: str) -> None:
        """Begin to count the time; where: the field, for messages."""
        self._where = where
        self._end = time.monotonic() + _SECONDS
        self._compiled: dict[str, re.Pattern[str]] = {}

    def first(self, name: str, patterns: Iterable[str], regex_prefix: bool) -> str | None:
        """Return the first pattern that names this module.

        regex_prefix: as in compressed-tensors, "re:" begins an expression and all else is a whole name. Else, as in
        transformers, a pattern is a beginning or an end of the name, or an expression for its beginning.
        """
        for pattern in patterns:
            if regex_prefix:
                found = self._matches(pattern[3:], name) if pattern.startswith("re:") else pattern == name
            else:
                found = name.endswith(pattern) or self._matches(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name, pattern)
            if found:
                return pattern
        return None

    def _matches(self, pattern: str, name: str, given: str | None = None) -> bool:
        if pattern not in self._compiled:
            self._check(pattern if given is None else given)
            try:
                self._compiled[pattern] = re.compile(pattern)
            except (re.error, RecursionError) as error:
                raise CheckpointError(f"{self._where}: pattern {pattern!r:.80} is not one: {error}") from None
        if time.monotonic() > self._end:
            raise CheckpointError(f"{self._where}: its patterns take more than {_SECONDS:.0f} s")
        return self._compiled[pattern].match(name) is not None

    def _check(self, pattern: str) -> None:
        """Raise CheckpointError for an expression whose time could grow without bounds."""
        if _PLAIN.fullmatch(pattern):
            return
        alternatives = pattern.split("|")
        repeats = max(len(re.findall(r"[*+]", part)) for part in alternatives)
        if (
            not _REGEX.fullmatch(pattern)
            or len(alternatives) > _MOST_ALTERNATIVES
            or re.search(r"\)[*+?]", pattern)
            or repeats > _MOST_REPEATS
        ):
            raise CheckpointError(
                f"{self._where}: pattern {pattern!r:.80} is not understood; expected names, or expressions with at "
                f"most {_MOST_REPEATS} repetitions in an alternative and none of a group"
            )
