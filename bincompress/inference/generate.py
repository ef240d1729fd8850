"""Text from a model: a prompt or a conversation in, pieces of text out as they are sampled."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bincompress.inference.chat import ChatTemplate, Message
from bincompress.inference.lookup import Following
from bincompress.inference.prefixes import PrefixCache
from bincompress.inference.sampling import Floats, Sampler, Sampling
from bincompress.model.cache import CacheType, KvCache
from bincompress.model.decoder import Decoder
from bincompress.model.errors import PromptError, TemplateError
from bincompress.model.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from bincompress.inference.constraint import Grammar

FinishReason = Literal["stop", "length"]


class TooLongError(PromptError):
    """The prompt fills the context."""


@dataclass(frozen=True)
class GenerationSettings:
    """What ends a generation and how tokens are chosen."""

    max_tokens: int | None = None  # None: until the context is full
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # texts that end it and are not given
    context: int | None = None  # tokens of prompt and answer together; None: the model's limit
    cache: CacheType = "float16"
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise PromptError(f"max tokens: expected at least 1, found {self.max_tokens}")
        if self.context is not None and self.context < 2:
            raise PromptError(f"context: expected at least 2 tokens, found {self.context}")
        if not all(self.stop):
            raise PromptError("stop: expected non-empty texts")


@dataclass(frozen=True)
class Model:
    """A decoder with what turns text into its tokens and back."""

    decoder: Decoder
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    defaults: GenerationSettings = field(default_factory=GenerationSettings)  # as the model's authors set them
    notes: tuple[str, ...] = ()  # what a user should know of how the model is run
    prompt_lookup: bool = False  # draft tokens from the text so far; changes no text

    def stream(
        self,
        prompt: str | Sequence[int],
        settings: GenerationSettings | None = None,
        grammar: "Grammar | None" = None,
        prefixes: PrefixCache | None = None,
    ) -> "Generation":
        """Return an iterator over the pieces of text that continue the prompt; raise PromptError at once.

        grammar: what the text is held to (`json_grammar`). prefixes: where caches of earlier texts are taken from and
        left.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]
        return Generation(self, ids, settings or self.defaults, prefixes, grammar)

    def json_grammar(self, schema: Any) -> "Grammar":
        """Return the grammar of the JSON values that a JSON schema (parsed JSON) allows, for `stream`.

        Raises SchemaError where the schema is faulty, too complex, or asks for what is not enforced.
        """
        from bincompress.inference.constraint import Grammars
        from bincompress.inference.json_schema import json_grammar

        return Grammars(self.tokenizer, self.decoder.config.vocab).compiled(json_grammar(schema))

    def chat(
        self,
        messages: Sequence[Message],
        settings: GenerationSettings | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prefixes: PrefixCache | None = None,
    ) -> "Generation":
        """Return an iterator over the pieces of the model's answer to a conversation.

        prefixes: where caches of earlier turns are taken from and left, so that only what is new is computed.
        """
        if self.template is None:
            raise TemplateError("the model has no chat template; use generate, or add chat_template.jinja to the model")
        text = self.template.render(messages, tools)
        return Generation(self, self.tokenizer.encode(text, special=False), settings or self.defaults, prefixes)


def room_after(prompt: Sequence[int], settings: GenerationSettings, decoder: Decoder) -> int:
    """Return the most tokens that can follow a prompt; raise PromptError or TooLongError where it cannot be run."""
    largest = decoder.config.context
    limit = min(settings.context or largest, largest)
    if not prompt:
        raise PromptError("the prompt is empty and the tokenizer has no beginning-of-text token; give some text")
    if len(prompt) >= limit:
        raise TooLongError(
            f"the prompt has {len(prompt)} tokens, the context {limit}; "
            f"shorten the prompt to at most {limit - 1}" + _larger(limit, largest)
        )
    decoder.check_ids(prompt)
    return min(limit - len(prompt), settings.max_tokens or limit)


class Generation:
    """One generation: iterate once for its text; `finish_reason` and the counts of tokens are final afterwards."""

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        settings: GenerationSettings,
        prefixes: PrefixCache | None = None,
        grammar: "Grammar | None" = None,
    ) -> None:
        self.limit = room_after(prompt, settings, model.decoder)  # most tokens that can come
        self._model = model
        self._prompt = list(prompt)
        self._settings = settings
        self._prefixes = prefixes
        self._grammar = grammar
        self.prompt_tokens = len(prompt)
        self.tokens: list[int] = []  # sampled so far, an end token included
        self.finish_reason: FinishReason | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text; a piece is given only when no stop text can begin in it."""
        held = Held(self._settings.stop)
        text = TextStream(self._model.tokenizer, self._prompt)
        for token in self._sample():
            piece = held.push(text.push(token))
            if held.stopped:
                self.finish_reason = "stop"
            if piece:
                yield piece
            if held.stopped:
                return
        rest = held.push(text.finish())
        if held.stopped:
            self.finish_reason = "stop"
        else:
            rest += held.finish()
        if rest:
            yield rest

    def _sample(self) -> Iterator[int]:
        """Yield sampled tokens up to the limit or an end token, which is not yielded."""
        # The last token that is sampled is never run, so it needs no place in the cache.
        last = len(self._prompt) + self.limit - 1
        if self._prefixes is None:
            yield from self._sample_with(self._model.decoder.new_cache(last, self._settings.cache))
            return
        cache = self._prefixes.take(self._prompt)
        try:
            yield from self._sample_with(cache)
        finally:
            self._prefixes.put([*self._prompt, *self.tokens], cache)

    def _sample_with(self, cache: KvCache) -> Iterator[int]:
        decoder, settings = self._model.decoder, self._settings
        ends = frozenset() if settings.ignore_eos else self._model.tokenizer.eos_ids
        constraint = None if self._grammar is None else self._grammar.begin()
        breakers = settings.sampling.breakers(self._model.tokenizer, decoder.config.vocab)
        sampler = Sampler(settings.sampling, decoder.config.vocab, self._prompt, constraint, breakers)
        logits = decoder.next_logits(self._prompt[cache.length :], cache)
        following = Following(decoder, cache, self._prompt, self._model.prompt_lookup)
        try:
            yield from self._sampled(sampler, ends, logits, following)
        finally:
            following.finish()

    def _sampled(self, sampler: Sampler, ends: frozenset[int], logits: Floats, following: Following) -> Iterator[int]:
        while True:
            token = sampler.choose(logits)
            self.tokens.append(token)
            if token in ends:
                self.finish_reason = "stop"
                return
            if sampler.is_complete:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.limit:
                self.finish_reason = "length"
            yield token
            if self.finish_reason is not None:
                return
            logits = following.after(token)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, of the answer so far, and of both."""
        sampled = len(self.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": sampled,
            "total_tokens": self.prompt_tokens + sampled,
        }


class Held:
    """Holds text back as long as its end may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._text = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Return what can be given now; once a stop text is complete, what comes before the first one."""
        self._text += piece
        found = [at for at in (self._text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            given, self._text = self._text[: min(found)], ""
            return given
        keep = max((_overlap(self._text, stop) for stop in self._stops), default=0)
        given, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        return given

    def finish(self) -> str:
        """Return what was held back."""
        given, self._text = self._text, ""
        return given


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _larger(limit: int, model_limit: int) -> str:
    return f" or raise the context (the model's is {model_limit})" if limit < model_limit else ""
