"""Many prompts from a file, written at once as the server does it; an interrupted run keeps what is done."""

import collections
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bincompress.errors import BincompressError
from bincompress.inference.answers import Answers
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.prompt_requests import PromptRequests
from bincompress.inference.prompts import Prompt, check_lengths, settings_of
from bincompress.inference.scheduler import Limits, Scheduler
from bincompress.inference.sequence import Ended, Piece, PromptRead


def write_answers(
    model: Model,
    prompts: list[Prompt],
    out: Path,
    defaults: GenerationSettings,
    limits: Limits,
    engine: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int]:
    """Write an answer to every prompt; return how many were written now, and how many of them failed.

    engine: tells the store and the options that change its numbers from others (`engine_of`); answers of another one
    that are in `out` are refused. progress: is called with the answers that are there and those that will be.
    Raises PromptFileError.
    """
    check_lengths(prompts, defaults.context)
    requests = PromptRequests(model, prompts)
    chosen = {prompt.line: settings_of(prompt, defaults) for prompt in prompts}
    keys = {prompt.line: prompt.key(chosen[prompt.line], engine) for prompt in prompts}
    answers = Answers(out, keys, {prompt.line: prompt.id for prompt in prompts})
    scheduler = None
    failed = written = 0
    try:
        left = [prompt for prompt in prompts if prompt.line not in answers.done]
        requests.compile(left)
        progress(len(answers.done), len(prompts))
        scheduler = Scheduler(model, limits)
        for prompt, answer in _answered(scheduler, left, requests, chosen):
            answers.add({"line": prompt.line, "id": prompt.id, "key": keys[prompt.line], **answer})
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
    scheduler: Scheduler,
    prompts: list[Prompt],
    requests: PromptRequests,
    chosen: dict[int, GenerationSettings],
) -> Iterator[tuple[Prompt, dict[str, Any]]]:
    """Yield each prompt with its answer, in the order in which they are finished."""
    events: queue.SimpleQueue[tuple[Prompt, int, PromptRead | Piece | Ended]] = queue.SimpleQueue()
    pieces: dict[int, list[str]] = collections.defaultdict(list)
    waiting, running = collections.deque(prompts), 0
    while waiting or running:
        while waiting and running < 2 * scheduler.limits.parallel:
            prompt = waiting.popleft()
            try:
                request = requests.request(prompt, chosen[prompt.line])

                def tell(event: Any, prompt: Prompt = prompt, size: int = len(request.prompt)) -> None:
                    events.put((prompt, size, event))

                scheduler.submit([(request, tell)])
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
                if event.error is not None:
                    yield prompt, {"error": str(event.error) or type(event.error).__name__}
                    continue
                counts = {"prompt_tokens": size, "completion_tokens": event.sampled}
                yield prompt, requests.answer(prompt, text, event.reason) | counts
