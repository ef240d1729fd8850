"""Scores and continues texts with the tokens that lm-evaluation-harness's `hf` backend makes of them."""

import logging
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.scheduler import Limits, Scheduler
from bincompress.inference.sequence import Ended, Piece, Request
from bincompress.model.errors import PromptError, TemplateError
from bincompress.scoring.likelihood import Likelihood, Pair, likelihoods
from bincompress.scoring.models import Scored

log = logging.getLogger("bincompress.scoring")

Progress = Callable[[int], None]  # requests done

_USUAL_LENGTH = 256  # tokens of an answer where a task does not say, as in lm-evaluation-harness
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_WHOLE = ("top_k", "seed")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_END_OF_LAST = "<continue here> "


class Scorer:
    """A model that answers what tasks ask: log probabilities of texts, and texts.

    max_length: most tokens of a context and its continuation (the model's limit if not given). at_once: contexts that
    share a pass over the weights. prefix_token: stands before a text without a context; the tokenizer's
    beginning-of-text token if not given, else its end-of-text token. add_bos: whether the tokenizer adds its special
    tokens; as its own file says if None.
    """

    def __init__(
        self,
        scored: Scored,
        max_length: int | None = None,
        at_once: int = 1,
        prefix_token: int | None = None,
        add_bos: bool | None = None,
    ) -> None:
        limit = scored.model.decoder.config.context
        if max_length is not None and not 2 <= max_length <= limit:
            raise PromptError(f"max_length: expected 2 to {limit}, the model's limit, found {max_length}")
        if at_once < 1:
            raise PromptError(f"batch_size: expected at least 1, found {at_once}")
        self.model: Model = scored.model
        self.max_length = max_length or limit
        self.at_once = at_once
        self._prefix_token = scored.prefix_token if prefix_token is None else prefix_token
        self._add_bos = add_bos

    def loglikelihood(
        self, asked: Sequence[tuple[str, str]], progress: Progress = lambda done: None
    ) -> list[tuple[float, bool]]:
        """Return, for each context and continuation, the log probability in nats and whether greedy decoding writes it.

        A context that is too long is cut at its beginning. Raises PromptError where a continuation is empty or does not
        fit the context.
        """
        pairs = [self._fitting(*self.encode_pair(*each)) for each in asked]
        return [(each.logprob, each.greedy) for each in self._likelihoods(pairs, progress)]

    def rolling(self, texts: Sequence[str], progress: Progress = lambda done: None) -> list[float]:
        """Return the log probability of each whole text in nats.

        The first token follows the prefix token. A text longer than the context is cut into windows of disjoint
        tokens; the last one is filled with tokens before it.
        """
        windows = [list(self._windows(self.encode(text))) for text in texts]
        found = iter(self._likelihoods([window for own in windows for window in own], progress))
        return [sum(next(found).logprob for _ in own) for own in windows]

    def generate(
        self, asked: Sequence[tuple[str, Mapping[str, Any]]], progress: Progress = lambda done: None, usual: int = 256
    ) -> list[str]:
        """Return what follows each context, by the settings that lm-evaluation-harness calls generation_kwargs.

        Greedy unless they say otherwise. usual: tokens of an answer where they do not say. What is not understood is
        refused by name with PromptError or SamplingError.
        """
        requests = []
        for context, wanted in asked:
            settings = self.settings_of(wanted, usual)
            room = self.max_length - (settings.max_tokens or 0)
            if room < 1:
                raise PromptError(
                    f"max_gen_toks: expected less than the context of {self.max_length}, found {settings.max_tokens}"
                )
            ids = self.encode(context)
            if len(ids) > room:
                log.warning("a context of %d tokens is cut to its last %d", len(ids), room)
            requests.append(Request(tuple(ids[-room:]) or (self.prefix_token,), settings))
        return self._written(requests, progress)

    def settings_of(self, wanted: Mapping[str, Any], usual: int = _USUAL_LENGTH) -> GenerationSettings:
        """Return what a task's generation_kwargs ask for."""
        left = dict(wanted)
        lengths = [left.pop(name, None) for name in _LENGTHS]
        until, drawn, temperature = left.pop("until", None), left.pop("do_sample", None), left.pop("temperature", None)
        stops = [until] if isinstance(until, str) else until or []
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise PromptError(f"until: expected a text or a list of texts, found {until!r:.60}")
        if drawn and not temperature:
            raise PromptError("do_sample: expected a temperature above 0 beside it")
        left["temperature"] = temperature if temperature is not None and drawn is not False else 0.0
        given = {name: _number(name, left.pop(name), float) for name in _NUMBERS if left.get(name) is not None}
        given |= {name: _number(name, left.pop(name), int) for name in _WHOLE if left.get(name) is not None}
        if left.get("num_beams") == 1:
            left.pop("num_beams")
        unknown = [name for name, value in left.items() if value is not None]
        if unknown:
            raise PromptError(f"generation_kwargs: {unknown[0]}: this setting is not supported")
        length = next((_number("max_gen_toks", value, int) for value in lengths if value is not None), usual)
        return replace(
            self.model.defaults,
            max_tokens=length,
            sampling=replace(self.model.defaults.sampling, **given),
            stop=tuple(stop for stop in stops if stop),
            context=self.max_length,
        )

    def rendered(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model's template writes it.

        Without add_generation_prompt it ends where the last message does, so that the model goes on with it.
        """
        if self.model.template is None:
            raise TemplateError("the model has no chat template; leave --apply_chat_template out")
        if add_generation_prompt:
            return self.model.template.render(messages)
        *others, last = messages
        marked = {**last, "content": f"{last['content']}{_END_OF_LAST}"}
        text = self.model.template.render([*others, marked], add_generation_prompt=False)
        place = text.rfind(_END_OF_LAST.strip())
        if place < 0:
            raise TemplateError("the chat template does not write the last message as it is, so it cannot be continued")
        # A template that cuts spaces at the end of a message leaves none before the mark either.
        return text[:place] if text[place:].startswith(_END_OF_LAST) else text[:place].rstrip()

    @property
    def prefix_token(self) -> int:
        """What stands before a text without a context."""
        if self._prefix_token is None:
            raise PromptError(
                "the tokenizer has neither a beginning-of-text nor an end-of-text token to put before a text without a "
                "context; give prefix_token_id"
            )
        return self._prefix_token

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Return a text's tokens; special tokens are not added to a text that begins with the prefix token's text."""
        if special is None:
            special = self._add_bos is not False
            if self._prefix_token is not None:
                begins = self.model.tokenizer.decode([self._prefix_token], skip_special=False)
                special = special and not text.startswith(begins)
        return self.model.tokenizer.encode(text, special=special)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of what follows it.

        Spaces at the end of the context count to the continuation, as tokens begin with them. Source:
        lm-evaluation-harness 0.4.13, TemplateLM.loglikelihood and _encode_pair.
        """
        if context == "":
            ids, prefix = self.encode(continuation, special=False), self.prefix_token
            return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        before = self.encode(text)
        if not before:  # spaces alone
            return [self.prefix_token], self.encode(continuation, special=False)
        return before, self.encode(text + continuation)[len(before) :]

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """Return a pair that fits, the context cut at its beginning where need be."""
        if not context or not continuation:
            what = "continuation" if context else "context"
            raise PromptError(f"a {what} has no tokens; expected a text of at least one")
        if len(continuation) > self.max_length:
            raise PromptError(f"a continuation has {len(continuation)} tokens, the context {self.max_length}")
        most = self.max_length + 1 - len(continuation)  # the last token is not run
        if len(context) > most:
            log.warning("a context of %d tokens is cut to its last %d", len(context), most)
        return Pair(tuple(context[-most:]), tuple(continuation))

    def _windows(self, ids: Sequence[int]) -> Iterator[Pair]:
        """Yield windows that score each token once. Source: get_rolling_token_windows of lm-evaluation-harness."""
        size = self.max_length
        if ids:
            yield Pair((self.prefix_token,), tuple(ids[:size]))
        for begin in range(size, len(ids), size):
            end = min(begin + size, len(ids))
            yield Pair(tuple(ids[end - size - 1 : begin]), tuple(ids[begin:end]))

    def _likelihoods(self, pairs: Sequence[Pair], progress: Progress) -> list[Likelihood]:
        model = self.model
        return likelihoods(model.decoder, pairs, model.defaults.cache, self.at_once, progress)

    def _written(self, requests: Sequence[Request], progress: Progress) -> list[str]:
        """Return the texts of requests, `at_once` of which are written together."""
        texts = [""] * len(requests)
        order = iter(sorted(range(len(requests)), key=lambda number: requests[number].prompt))
        events: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        scheduler = Scheduler(self.model, Limits(self.at_once, 2 * self.at_once, self.max_length))
        done = running = 0
        try:
            while done < len(requests):
                while running < 2 * self.at_once and (number := next(order, None)) is not None:
                    tell = lambda event, number=number: events.put((number, event))  # noqa: E731
                    scheduler.submit([(requests[number], tell)])
                    running += 1
                number, event = events.get()
                if isinstance(event, Piece):
                    texts[number] += event.text
                elif isinstance(event, Ended):
                    if event.error is not None:
                        raise event.error
                    done, running = done + 1, running - 1
                    progress(done)
        finally:
            scheduler.close()
        return texts


def _number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise PromptError(f"generation_kwargs: {name}: expected a number, found {value!r:.60}") from None
