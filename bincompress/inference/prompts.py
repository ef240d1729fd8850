"""What does a file of prompts ask? One JSON object a line; what is not understood is refused by its line."""

import hashlib
import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from bincompress.errors import BincompressError
from bincompress.inference.generate import GenerationSettings
from bincompress.inference.request_fields import Fields
from bincompress.inference.response_format import response_format
from bincompress.process.streams import read_input
from bincompress.sources.text import UTF_8

_NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "typical_p",
    "dry_multiplier", "dry_base", "xtc_probability", "xtc_threshold",
)  # fmt: skip
_FORM = ("response_format", "tools", "tool_choice", "parallel_tool_calls")
_WHOLE = ("max_tokens", "top_k", "seed", "dry_allowed_length", "dry_penalty_last_n")
_LARGEST = (1 << 63) - 1  # of whole numbers, as in a request to the server
_DEEPEST = 64  # levels of lists and objects


class PromptFileError(BincompressError):
    """A file of prompts, answers or questions is not what it should be; the message names the line."""


@dataclass(frozen=True)
class Prompt:
    """One line of a file of prompts: a text or messages, and what it sets for itself."""

    line: int  # from 1
    text: str | None
    messages: list[dict[str, Any]] | None
    id: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    form: dict[str, Any] = field(default_factory=dict)  # what it asks of the answer's form, and the tools it offers

    def key(self, chosen: GenerationSettings, engine: str) -> str:
        """Return what tells this prompt with these settings from others; engine: what tells the model (`engine_of`)."""
        told = [self.text, self.messages, self.id, asdict(chosen), engine]
        if self.form:  # in its own order, as that of a schema's properties is the order of the answer's
            told.append(json.dumps(self.form))
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def read_prompts(path: Path) -> list[Prompt]:
    """Return a file's prompts, JSON objects one a line; raise PromptFileError naming the line and what is wrong."""
    found = [_prompt(named(path), number, given) for number, given in read_values(path)]
    if not found:
        raise PromptFileError(f'{named(path)}: holds no prompt; expected lines such as {{"prompt": "The scheduler"}}')
    return found


def read_values(path: Path) -> list[tuple[int, Any]]:
    """Return a file's JSON values, one a line, with the lines' numbers; raise PromptFileError for what is no JSON.

    The path "-" is standard input.
    """
    try:
        text = read_input("the file") if str(path) == "-" else path.read_text(UTF_8)
        lines = text.split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"{path}: cannot be read: {error}") from None
    return [(number, _value(named(path), number, line)) for number, line in enumerate(lines, 1) if line.strip()]


def named(path: Path) -> str:
    """Return what messages call a file: "-" is standard input."""
    return "standard input" if str(path) == "-" else str(path)


def _value(path: str, number: int, line: str) -> Any:
    try:
        given = json.loads(line, parse_constant=_no_number, object_pairs_hook=_once_each)
        problem = _unwritable(given)
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = f"not JSON: {str(error)[:100]}"
    if problem:
        raise PromptFileError(f"{path}, line {number}: {problem}")
    return given


def _prompt(path: str, number: int, given: Any) -> Prompt:
    def refuse(what: str) -> PromptFileError:
        return PromptFileError(f"{path}, line {number}: {what}")

    if not isinstance(given, dict) or ("prompt" in given) == ("messages" in given):
        raise refuse("expected an object with prompt or messages, one of the two")
    text, messages, own = given.pop("prompt", None), given.pop("messages", None), given.pop("id", None)
    if messages is None and not isinstance(text, str):
        raise refuse("prompt: expected a text")
    fine = isinstance(messages, list) and all(isinstance(each, dict) for each in messages)
    if text is None and not (fine and messages):
        raise refuse("messages: expected a list of objects with role and content")
    form = {name: value for name in _FORM if (value := given.pop(name, None)) is not None}
    if text is not None and (name := next((name for name in form if name != "response_format"), None)):
        raise refuse(f"{name}: expected messages, not a prompt")
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name == "stop":
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
                raise refuse("stop: expected a text or a list of texts")
        elif name in _NUMBERS or name in _WHOLE:
            kinds = (int,) if name in _WHOLE else (int, float)
            if type(value) not in kinds:
                raise refuse(f"{name}: expected a {'whole ' if name in _WHOLE else ''}number, found {value!r:.40}")
            most = _LARGEST if name in _WHOLE else sys.float_info.max
            if abs(value) > most:
                raise refuse(f"{name}: expected at most {most:,}, found {value!r:.40}")
        else:
            known = ", ".join(sorted((*_NUMBERS, *_WHOLE, *_FORM, "stop", "id", "messages", "prompt")))
            raise refuse(f"{name!r:.40} is not supported; expected {known}")
        settings[name] = value
    made = Prompt(number, text, messages, own, settings, form)
    try:
        settings_of(made, GenerationSettings())
        response_format(Fields(form))
    except BincompressError as error:
        raise refuse(str(error)) from None
    return made


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; of two fields of one name, one would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{twice!a:.40} is there twice in one object")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _unwritable(given: Any) -> str:
    """Return what keeps a value that was read from being written as JSON in UTF-8, if anything."""
    level = [given]
    for _ in range(_DEEPEST):
        if any(isinstance(each, float) and not math.isfinite(each) for each in level):
            return "a number is beyond the range of floats"
        for text in (each for each in level if isinstance(each, str)):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return f"not a text of Unicode: a lone surrogate, {text[error.start]!a}"
        level = [
            inner
            for each in level
            if isinstance(each, list | dict)
            for inner in (itertools.chain(each, each.values()) if isinstance(each, dict) else each)
        ]
        if not level:
            return ""
    return f"nested too deeply; expected at most {_DEEPEST} levels"


def check_lengths(prompts: list[Prompt], context: int | None) -> None:
    """Raise PromptFileError naming the line that asks for more tokens than the context (None: any) can hold."""
    for prompt in prompts:
        asked = prompt.settings.get("max_tokens", 0)
        if context is not None and asked > context:
            raise PromptFileError(
                f"line {prompt.line} of the prompts: max_tokens: expected at most {context:,}, the context, "
                f"found {asked:,}"
            )


def settings_of(prompt: Prompt, defaults: GenerationSettings) -> GenerationSettings:
    """Return the settings of a prompt: its own before the defaults, whose seed its line number is added to."""
    own = {key: value for key, value in prompt.settings.items() if key not in ("stop", "max_tokens")}
    seed = defaults.sampling.seed
    sampling = replace(defaults.sampling, **{**({} if seed is None else {"seed": seed + prompt.line}), **own})
    chosen = replace(defaults, sampling=sampling, max_tokens=prompt.settings.get("max_tokens", defaults.max_tokens))
    return replace(chosen, stop=tuple(prompt.settings.get("stop", defaults.stop)))
