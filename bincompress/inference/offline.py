"""Many prompts from a file, written at once as the server does it; an interrupted run keeps what is done."""

import collections
import hashlib
import json
import os
import queue
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bincompress.errors import BincompressError
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.scheduler import Limits, Scheduler
from bincompress.inference.sequence import Ended, Piece, PromptRead, Request
from bincompress.model.errors import TemplateError

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_WHOLE = ("max_tokens", "top_k", "seed")


class PromptFileError(BincompressError):
    """A file of prompts or of answers is not what it should be; the message names the line."""


@dataclass(frozen=True)
class Prompt:
    """One line of a file of prompts: a text or messages, and what it sets for itself."""

    line: int  # from 1
    text: str | None
    messages: list[dict[str, Any]] | None
    id: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    def key(self, chosen: GenerationSettings) -> str:
        """Return what tells this prompt with these settings from others."""
        told = [self.text, self.messages, self.id, asdict(chosen)]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def read_prompts(path: Path) -> list[Prompt]:
    """Return a file's prompts, JSON objects one a line; raise PromptFileError naming the line and what is wrong."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"{path}: cannot be read: {error}") from None
    found = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise PromptFileError(f'{path}: holds no prompt; expected lines such as {{"prompt": "The scheduler"}}')
    return found


def _prompt(path: Path, number: int, line: str) -> Prompt:
    def refuse(what: str) -> PromptFileError:
        return PromptFileError(f"{path}, line {number}: {what}")

    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refuse(f"not JSON: {str(error)[:100]}") from None
    if not isinstance(given, dict) or ("prompt" in given) == ("messages" in given):
        raise refuse("expected an object with prompt or messages, one of the two")
    text, messages, own = given.pop("prompt", None), given.pop("messages", None), given.pop("id", None)
    if messages is None and not isinstance(text, str):
        raise refuse("prompt: expected a text")
    fine = isinstance(messages, list) and all(isinstance(each, dict) for each in messages)
    if text is None and not (fine and messages):
        raise refuse("messages: expected a list of objects with role and content")
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
        else:
            raise refuse(f"{name!r:.40} is not supported; expected {', '.join(sorted((*_NUMBERS, *_WHOLE, 'stop')))}")
        settings[name] = value
    made = Prompt(number, text, messages, own, settings)
    try:
        settings_of(made, GenerationSettings())
    except BincompressError as error:
        raise refuse(str(error)) from None
    return made


def settings_of(prompt: Prompt, defaults: GenerationSettings) -> GenerationSettings:
    """Return the settings of a prompt: its own before the defaults, whose seed its line number is added to."""
    own = {key: value for key, value in prompt.settings.items() if key not in ("stop", "max_tokens")}
    seed = defaults.sampling.seed
    sampling = replace(defaults.sampling, **{**({} if seed is None else {"seed": seed + prompt.line}), **own})
    chosen = replace(defaults, sampling=sampling, max_tokens=prompt.settings.get("max_tokens", defaults.max_tokens))
    return replace(chosen, stop=tuple(prompt.settings.get("stop", defaults.stop)))


class Answers:
    """A file of answers, JSON objects one a line, which a second run of the same prompts goes on with."""

    def __init__(self, path: Path, keys: dict[int, str]) -> None:
        self._path = path
        self.done: dict[int, dict[str, Any]] = {}
        self._file = path.open("a+b")
        try:
            _lock(self._file.fileno(), path)
            self._read(keys)
        except BaseException:
            self._file.close()
            raise

    def _read(self, keys: dict[int, str]) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # an earlier run ended in the midst of it
            try:
                found = json.loads(line)
                fits = keys.get(found["line"]) == found["key"]
            except (ValueError, TypeError, KeyError):
                raise PromptFileError(f"{self._path}, line {number}: no answer of `run`; give another --out") from None
            if not fits:
                raise PromptFileError(
                    f"{self._path}, line {number}: answers another prompt or other settings; give another --out, "
                    "or remove it"
                )
            if "error" not in found:  # what failed is tried again
                self.done[found["line"]] = found
            end += len(line)
        self._file.truncate(end)

    def add(self, answer: dict[str, Any]) -> None:
        """Write an answer down."""
        self.done[answer["line"]] = answer
        self._file.write(_encoded(answer))
        self._file.flush()

    def finish(self) -> None:
        """Put the answers in the order of their prompts, and close the file."""
        ordered = self._path.with_name(self._path.name + ".ordered")
        with ordered.open("wb") as file:
            file.writelines(_encoded(self.done[line]) for line in sorted(self.done))
            file.flush()
            os.fsync(file.fileno())
        ordered.replace(self._path)
        self._file.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()


def _encoded(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _lock(number: int, path: Path) -> None:
    import fcntl

    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PromptFileError(f"{path}: another run writes to it; wait for its end or give another --out") from None


def write_answers(
    model: Model,
    prompts: list[Prompt],
    out: Path,
    defaults: GenerationSettings,
    limits: Limits,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int]:
    """Write an answer to every prompt; return how many were written now, and how many of them failed.

    progress: is called with the answers that are there and those that will be. Raises PromptFileError.
    """
    chosen = {prompt.line: settings_of(prompt, defaults) for prompt in prompts}
    answers = Answers(out, {prompt.line: prompt.key(chosen[prompt.line]) for prompt in prompts})
    scheduler = None
    failed = written = 0
    try:
        left = [prompt for prompt in prompts if prompt.line not in answers.done]
        progress(len(answers.done), len(prompts))
        scheduler = Scheduler(model, limits)
        for prompt, answer in _answered(scheduler, left, chosen):
            answers.add({"line": prompt.line, "id": prompt.id, "key": prompt.key(chosen[prompt.line]), **answer})
            written += 1
            failed += "error" in answer
            progress(len(answers.done), len(prompts))
        answers.finish()
    finally:
        if scheduler is not None:
            scheduler.close()
        answers.close()
    return written, failed


def _answered(
    scheduler: Scheduler, prompts: list[Prompt], chosen: dict[int, GenerationSettings]
) -> Iterator[tuple[Prompt, dict[str, Any]]]:
    """Yield each prompt with its answer, in the order in which they are finished."""
    events: queue.SimpleQueue[tuple[Prompt, int, PromptRead | Piece | Ended]] = queue.SimpleQueue()
    pieces: dict[int, list[str]] = collections.defaultdict(list)
    waiting, running = collections.deque(prompts), 0
    while waiting or running:
        while waiting and running < 2 * scheduler.limits.parallel:
            prompt = waiting.popleft()
            try:
                ids = _tokens(scheduler.model, prompt)

                def tell(event: Any, prompt: Prompt = prompt, size: int = len(ids)) -> None:
                    events.put((prompt, size, event))

                scheduler.submit([(Request(tuple(ids), chosen[prompt.line]), tell)])
                running += 1
            except BincompressError as error:
                yield prompt, {"error": str(error)}
        if running:
            prompt, size, event = events.get()
            if isinstance(event, Piece):
                pieces[prompt.line].append(event.text)
            elif isinstance(event, Ended):
                running -= 1
                text = "".join(pieces.pop(prompt.line, []))
                yield prompt, _answer(text, size, event)


def _answer(text: str, size: int, ended: Ended) -> dict[str, Any]:
    if ended.error is not None:
        return {"error": str(ended.error) or type(ended.error).__name__}
    return {
        "text": text, "finish_reason": ended.reason, "prompt_tokens": size, "completion_tokens": ended.sampled,
    }  # fmt: skip


def _tokens(model: Model, prompt: Prompt) -> list[int]:
    if prompt.messages is None:
        ids = model.tokenizer.encode(prompt.text or "")
        return ids or ([] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id])
    if model.template is None:
        raise TemplateError("the model has no chat template; give a prompt in place of messages")
    return model.tokenizer.encode(model.template.render(prompt.messages), special=False)
