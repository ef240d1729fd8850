"""What do both interfaces ask alike? Sampling, stop texts, lengths: from a request's fields to generation settings."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bincompress.inference.generate import GenerationSettings
from bincompress.inference.offered_tools import Tools
from bincompress.inference.request_fields import Fields
from bincompress.inference.sampling import Sampling
from bincompress.inference.sequence import Request
from bincompress.serving.service import Service

MOST_STOPS, LONGEST_STOP = 16, 256
# Numbers of the sampling, each with the least and the most that a request may ask.
SAMPLING_NUMBERS: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0), ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0), ("typical_p", 0.0, 1.0),
    ("dry_multiplier", 0.0, 100.0), ("dry_base", 1.0, 100.0), ("xtc_probability", 0.0, 1.0),
    ("xtc_threshold", 0.0, 1.0),
)  # fmt: skip
SAMPLING_WHOLE = (("top_k", -1), ("dry_allowed_length", 1), ("dry_penalty_last_n", -1))
MOST_BIASED = 1024
LARGEST = (1 << 63) - 1


@dataclass(frozen=True)
class Asked:
    """Texts that one request asks for, the choices of its first prompt first, and how it wants to be told of them."""

    requests: list[Request]
    choices: int = 1  # to a prompt
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    logprobs: int | None = None
    prompts: list[str] = field(default_factory=list)  # their texts, where they are echoed
    form: str | None = None  # a grammar, which the texts are held to
    tools: Tools | None = None  # that the texts may call


def sampling_of(fields: Fields, defaults: Sampling, names: Mapping[str, str] | None = None) -> Sampling:
    """Return the sampling that a request asks for; what it does not say is as the model's authors set it.

    names: by a name of `Sampling` what this interface calls it.
    """
    named = names or {}
    given = {}
    for name, least, most in SAMPLING_NUMBERS:
        given[name] = fields.number(named.get(name, name), least, most)
    for name, least in SAMPLING_WHOLE:
        given[name] = fields.number(name, least, LARGEST, whole=True)
    given["top_k"] = 0 if given["top_k"] == -1 else given["top_k"]  # as other servers have it: off
    breakers = fields.take("dry_sequence_breakers", list)
    given["dry_sequence_breakers"] = None if breakers is None else _texts(fields, "dry_sequence_breakers", breakers)
    given["seed"] = fields.number("seed", 0, LARGEST, whole=True)
    given["logit_bias"] = _bias(fields)
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _bias(fields: Fields) -> tuple[tuple[int, float], ...] | None:
    given = fields.take("logit_bias", dict)
    if given is None:
        return None
    if len(given) > MOST_BIASED:
        fields.refuse("logit_bias", f"expected at most {MOST_BIASED} tokens, found {len(given):,}")
    found = []
    for token, added in given.items():
        if not token.isdecimal() or len(token) > 9 or type(added) not in (int, float):
            fields.refuse("logit_bias", "expected token numbers with a number each")
        found.append((int(token), float(min(max(added, -1e9), 1e9))))
    return tuple(found)


def stops_of(fields: Fields) -> tuple[str, ...]:
    """Return the texts that end the answer."""
    given = fields.take("stop", str, list)
    return _texts(fields, "stop", [given] if isinstance(given, str) else given or [])


def _texts(fields: Fields, name: str, given: list[Any]) -> tuple[str, ...]:
    if len(given) > MOST_STOPS:
        fields.refuse(name, f"expected at most {MOST_STOPS} texts, found {len(given):,}")
    for text in given:
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_STOP:
            fields.refuse(name, f"expected texts of 1 to {LONGEST_STOP} characters")
        if any("\ud800" <= character <= "\udfff" for character in text):
            fields.refuse(name, "expected texts of Unicode, found a lone surrogate, which no text can hold")
    return tuple(given)


def request_for(
    service: Service, prompt: list[int], sampling: Sampling, stop: tuple[str, ...], most: int | None, **others: Any
) -> Request:
    """Return a text to be written after these tokens, at most so many; most 0: the prompt alone is read."""
    scheduler = service.ready()
    context = scheduler.limits.context
    sampling.breakers(service.model.tokenizer, service.model.decoder.config.vocab)  # here, beside the event loop
    room = context - len(prompt)
    if most is not None and most > max(room, 1):
        Fields({}).refuse(
            "max_tokens",
            f"expected at most {max(room, 0):,}, the context of {context:,} less the prompt of {len(prompt):,}, "
            f"found {most:,}",
        )
    settings = GenerationSettings(
        most or 1 if most is not None else None, sampling, stop, context, service.model.defaults.cache
    )
    deadline = time.monotonic() + service.settings.request_seconds
    return Request(tuple(prompt), settings, only_prompt=most == 0, deadline=deadline, **others)


def seeded(request: Request, choice: int) -> Request:
    """Return the request of a further choice: with a seed of its own, the first one's plus its number."""
    sampling = request.settings.sampling
    if not choice or sampling.seed is None:
        return request
    return replace(request, settings=replace(request.settings, sampling=replace(sampling, seed=sampling.seed + choice)))


def choices_of(fields: Fields, service: Service, prompts: int = 1) -> int:
    """Return how many texts are asked for to each prompt."""
    choices: int = fields.number("n", 1, service.settings.most_choices, whole=True) or 1
    if choices * prompts > service.settings.most_choices:
        fields.refuse(
            "n", f"expected at most {service.settings.most_choices} texts a request, found {choices * prompts}"
        )
    return choices


def check_model(fields: Fields, service: Service, *also: str) -> None:
    """Refuse another model's name than this one's."""
    name = fields.take("model", str)
    if name is not None and name not in (service.settings.model_name, *also):
        service.unknown_model(name)


def lengths_of(fields: Fields, *names: str, least: int = 1) -> int | None:
    """Return the most tokens that may be written, by the first of these names that is given."""
    found = [fields.number(name, least, math.inf, whole=True) for name in names]
    given: list[int] = [value for value in found if value is not None]
    return given[0] if given else None
