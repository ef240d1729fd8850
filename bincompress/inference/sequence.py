"""One text among those that are written at the same time: what was asked, what has come, and who is told of it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from bincompress.errors import BincompressError
from bincompress.inference.constraint import Grammar
from bincompress.inference.generate import FinishReason, GenerationSettings, Held, Model, room_after
from bincompress.inference.logprobs import TokenLogprob, token_logprob
from bincompress.inference.lookup import Lookup
from bincompress.inference.prefixes import Prefix
from bincompress.inference.sampling import Floats, Sampler
from bincompress.model.cache import KvCache
from bincompress.model.tokenizer import TextStream


class CancelledError(BincompressError):
    """Whoever asked no longer wants the text."""


class DeadlineError(BincompressError):
    """The text was not finished in the time that it was given."""


@dataclass(frozen=True)
class Request:
    """What a text is to be.

    logprobs: report each token's log probability, beside so many of the likeliest. prompt_logprobs: those of the prompt
    as well, which is then computed as a whole. only_prompt: nothing is written. deadline: a time of time.monotonic().
    """

    prompt: tuple[int, ...]
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    logprobs: int | None = None
    prompt_logprobs: bool = False
    only_prompt: bool = False
    grammar: Grammar | None = None  # that the text is held to
    shown: frozenset[int] = frozenset()  # special tokens that are text all the same
    deadline: float = math.inf


@dataclass(frozen=True)
class PromptRead:
    """The prompt was read; tokens: with log probabilities from the second one on, where they were asked for."""

    tokens: tuple[TokenLogprob, ...]
    reused: int  # tokens that an earlier text had left computed


@dataclass(frozen=True)
class Piece:
    """Text that can be given, perhaps none, and the log probabilities of the tokens that it is of."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The text is finished, or `error` says why not."""

    reason: FinishReason | None
    sampled: int  # tokens, an end token included
    error: Exception | None = None
    end_token: TokenLogprob | None = None  # that ended it, where log probabilities were asked for


Listener = Callable[[PromptRead | Piece | Ended], None]


class Writing:
    """A text that is being written; only its scheduler's thread calls it, but for `cancel`."""

    def __init__(self, model: Model, request: Request, listener: Listener, leader: "Writing | None" = None) -> None:
        self.limit = room_after(request.prompt, request.settings, model.decoder)
        self.request = request
        self.leader = leader  # a text of the same prompt, which is read once
        self.tokens = list(request.prompt)  # of the prompt, and those sampled
        self.cache: KvCache | None = None
        self.ended = False
        self.cancelled = False
        self.submitted = time.monotonic()
        self._tell = listener
        self.reused = 0
        constraint = None if request.grammar is None else request.grammar.begin()
        sampling, vocab = request.settings.sampling, model.decoder.config.vocab
        breakers = sampling.breakers(model.tokenizer, vocab)
        self._sampler = Sampler(sampling, vocab, request.prompt, constraint, breakers)
        self._lookup = Lookup(request.prompt) if model.prompt_lookup else None
        self.draft: list[int] = []  # what may follow, to be checked in the next pass
        self._text = TextStream(model.tokenizer, request.prompt, shown=request.shown)
        self._held = Held(request.settings.stop)
        self._ends = frozenset() if request.settings.ignore_eos else model.tokenizer.eos_ids
        self._prompt_logprobs: list[TokenLogprob] = []
        self._untold: list[tuple[int, TokenLogprob]] = []  # with the length of the text before each
        self._length = 0  # of the text of all tokens so far
        self._given = 0

    @property
    def sampled(self) -> int:
        """Tokens that were sampled so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def held(self) -> int:
        """Tokens that its cache holds."""
        return self._cache.length

    @property
    def left(self) -> int:
        """Tokens that are to be run before the next one can be sampled."""
        return len(self.tokens) - self.held

    @property
    def is_read(self) -> bool:
        """Whether the next token can be sampled."""
        return self.left <= 0

    @property
    def prefix(self) -> Prefix:
        """What its cache holds, for texts that begin alike."""
        return Prefix(np.asarray(self.tokens, np.int64), self._cache)

    @property
    def _cache(self) -> KvCache:
        assert self.cache is not None, "a text has a cache from when it is taken on"
        return self.cache

    def cancel(self) -> None:
        """Have it ended before its next token, from any thread."""
        self.cancelled = True

    def problem(self, now: float) -> BincompressError | None:
        """Return why it is not to go on, if so."""
        if self.cancelled:
            return CancelledError("cancelled")
        if now > self.request.deadline:
            waited = now - self.submitted
            return DeadlineError(
                f"not finished within its time: {self.sampled} tokens were written in {waited:.1f} s; "
                "ask for fewer, or try again when the server is less busy"
            )
        return None

    def begin(self, cache: KvCache) -> None:
        """Take a cache, which may hold a beginning of the prompt."""
        self.cache = cache
        self.reused = cache.length

    def following(self, count: int) -> tuple[list[int], KvCache]:
        """Return the next tokens to be run, drafted ones included, and the cache that they go to."""
        return [*self.tokens, *self.draft][self.held : self.held + count], self._cache

    def draft_within(self, most: int) -> int:
        """Draft what may follow the one token that is to be run; return how many tokens there are then to run."""
        self.draft = []
        if self._lookup is not None and self.sampled:
            room = min(most - 1, self.limit - self.sampled - 1, self._cache.free - 1)
            self.draft = self._lookup.draft(room)
        return 1 + len(self.draft)

    def rewind(self, length: int) -> None:
        """Forget the draft, and what a pass that failed has put into the cache."""
        self.draft = []
        self._cache.rewind(min(length, self.held))

    def advance(self, logits: Iterable[Floats], first: int) -> None:
        """Note what followed the tokens of a pass.

        logits: rows (vocab,) after each of its tokens while a prompt is read whose log probabilities are wanted, and
        where some were drafted, else after the last, or none while more are to be run. first: the place of the first of
        the pass's tokens.
        """
        if self.draft:
            self._check(logits, first)
            return
        if self.wants_all and first < len(self.request.prompt):
            for place, row in enumerate(logits, first + 1):
                if place < len(self.request.prompt):
                    found = token_logprob(row, self.tokens[place], self.request.logprobs or 0)
                    self._prompt_logprobs.append(found)
        if not self.is_read:
            return
        if not self.sampled:
            self._tell(PromptRead(tuple(self._prompt_logprobs), self.reused))
            if self.request.only_prompt:
                self.end("length")
                return
        *_, last = logits
        self._sample(last)

    def _check(self, logits: Iterable[Floats], first: int) -> None:
        """Sample as long as the draft says what comes, and forget the rest of it."""
        draft, self.draft = self.draft, []
        used = 0
        for row, drafted in zip(logits, [*draft, None], strict=True):
            used += 1
            self._sample(row)
            if self.ended or self.tokens[-1] != drafted:
                break
        self._cache.rewind(first + used)

    @property
    def wants_all(self) -> bool:
        """Whether the logits after every token of the prompt are wanted, too."""
        return self.request.prompt_logprobs

    def _sample(self, logits: Floats) -> None:
        token = self._sampler.choose(logits)
        self.tokens.append(token)
        if self._lookup is not None:
            self._lookup.push(token)
        most = self.request.logprobs
        logprob = None if most is None else token_logprob(logits, token, most)
        if token in self._ends:
            self._finish("stop", logprob)
            return
        if logprob is not None:
            self._untold.append((self._length, logprob))
        text = self._text.push(token)
        self._length += len(text)
        self._give(self._held.push(text))
        if self._held.stopped:
            self.end("stop")
        elif self._sampler.is_complete:
            self._finish("stop")
        elif self.sampled == self.limit:
            self._finish("length")

    def _finish(self, reason: FinishReason, end_token: TokenLogprob | None = None) -> None:
        """Give what was held back, and end."""
        text = self._text.finish()
        self._length += len(text)
        rest = self._held.push(text)
        if self._held.stopped:
            reason = "stop"
        else:
            rest += self._held.finish()
        self._give(rest, last=not self._held.stopped)
        self.end(reason, end_token=end_token)

    def _give(self, text: str, last: bool = False) -> None:
        """Tell of text and of the tokens that began in it; last: of all that are left."""
        self._given += len(text)
        told = [found for begin, found in self._untold if begin < self._given or last]
        if text or told:
            self._untold = self._untold[len(told) :]
            self._tell(Piece(text, tuple(told)))

    def end(
        self, reason: FinishReason | None, error: Exception | None = None, end_token: TokenLogprob | None = None
    ) -> None:
        """End it, once."""
        if not self.ended:
            self.ended = True
            with contextlib.suppress(Exception):  # a listener's fault must not end other texts
                self._tell(Ended(reason, self.sampled, error, end_token))
