"""What prompt lookup gains: CPU time of writing with and without it, in turns, of the same texts.

python -m benchmarks.prompt_lookup STORE [FILE...]

First, how many times as long as for a single token a pass of several takes. Then, for each file of text or code, the
model goes on with its beginning, and (where it has a chat template) is to give a part of it again with one change.
Prints how many tokens were written, how many passes over the weights that took, and how many times as fast drafts are:
the median of several turns. Seconds are CPU seconds of the process, so that other work on the machine matters less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bincompress import load
from bincompress.inference.generate import Generation, GenerationSettings, Model

_EDIT = "Add a comment to the first line of this, and give all of it again without any other change:\n```\n{}\n```"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--prompt", type=int, default=400, help="tokens that are taken of a file")
    parser.add_argument("--tokens", type=int, default=200, help="tokens that are written")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    plain = load(given.store, threads=1, sampling={"temperature": 0.0})
    drafting = replace(plain, prompt_lookup=True)
    settings = replace(plain.defaults, max_tokens=given.tokens)
    show_passes(plain)
    for file in given.files:
        ids = plain.tokenizer.encode(file.read_text("utf-8")[: 20 * given.prompt], special=False)[: given.prompt]
        compare(f"{file.name}, continued", plain, drafting, partial(continued, ids, settings), given.turns)
        if plain.template is not None:
            text = plain.tokenizer.decode(ids)
            compare(f"{file.name}, edited", plain, drafting, partial(edited, text, settings), given.turns)


def continued(ids: list[int], settings: GenerationSettings, model: Model) -> Generation:
    """Return what follows these tokens."""
    return model.stream(ids, settings)


def edited(text: str, settings: GenerationSettings, model: Model) -> Generation:
    """Return the answer to a request that gives the text again."""
    return model.chat([{"role": "user", "content": _EDIT.format(text)}], settings)


def show_passes(model: Model, repeats: int = 8) -> None:
    """Print how long passes of several tokens take behind 300 others, as multiples of one of a single token."""
    decoder, ids = model.decoder, [5 + number % 90 for number in range(300)]
    cache = decoder.new_cache(400, "float16")
    decoder.next_logits(ids, cache)
    times: dict[int, list[float]] = {tokens: [] for tokens in (1, 2, 4, 8, 16)}
    for _ in range(repeats):
        for tokens, found in times.items():
            cache.rewind(len(ids))
            start = time.process_time()
            decoder.logits_of(decoder.states_of_all([(ids[:tokens], cache)]))
            found.append(time.process_time() - start)
    single = statistics.median(times[1])
    told = ", ".join(f"{tokens}: {statistics.median(found) / single:.2f}" for tokens, found in times.items())
    print(
        f"a pass of one token: {1000 * single:.1f} ms of CPU; passes of several, as multiples of it: {told}", flush=True
    )


def compare(title: str, plain: Model, drafting: Model, begin: Callable[[Model], Generation], turns: int) -> None:
    """Print what drafts gain for one text."""
    ratios, texts, passes = [], set(), 0
    written = 0
    for _ in range(turns):
        without, text, _, _ = measured(plain, begin)
        with_drafts, same, passes, written = measured(drafting, begin)
        texts |= {text, same}
        ratios.append(without / with_drafts)
    assert len(texts) == 1, "drafts must not change a text"
    print(
        f"{title}: {written} tokens in {passes} passes, {statistics.median(ratios):.2f} x as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def measured(model: Model, begin: Callable[[Model], Generation]) -> tuple[float, str, int, int]:
    """Return CPU seconds from the first piece of text on, the text, passes over the weights, and tokens."""
    decoder, passes = model.decoder, 0
    run = decoder._advance_parts

    def counted(*arguments: object) -> object:
        nonlocal passes
        passes += 1
        return run(*arguments)  # type: ignore[arg-type]

    generation = begin(model)
    pieces = iter(generation)
    text = next(pieces, "")
    decoder._advance_parts = counted  # type: ignore[assignment,method-assign]
    try:
        start = time.process_time()
        text += "".join(pieces)
        return time.process_time() - start, text, passes, len(generation.tokens)
    finally:
        decoder._advance_parts = run  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
