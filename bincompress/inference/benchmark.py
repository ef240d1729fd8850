"""How fast does a decoder read a prompt and write tokens? In the manner of llama-bench: pp and tg, mean and spread."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bincompress.model.cache import CacheType
from bincompress.model.decoder import Decoder


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one test over its repetitions."""

    test: str  # "pp128": a prompt of 128 tokens; "tg64": 64 tokens one after the other
    mean: float
    spread: float  # standard deviation


def measure(
    decoder: Decoder,
    prompt: int,
    tokens: int,
    repeats: int,
    on_test: Callable[[str], None] = lambda test: None,
    cache_type: CacheType = "float16",
) -> list[Speed]:
    """Return the speeds of reading `prompt` tokens and of writing `tokens` after one, random ids, no sampling."""
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab, max(prompt, tokens, 1))
    speeds = []
    for test, count in (("pp", prompt), ("tg", tokens)):
        if not count:
            continue
        seen = []
        for _ in range(repeats + 1):  # the first warms caches and compiles
            on_test(f"{test}{count}")
            cache = decoder.new_cache(count, cache_type)
            begin = time.perf_counter()
            if test == "pp":
                decoder.next_logits(ids[:count], cache)
            else:
                for token in ids[:count]:
                    decoder.next_logits([token], cache)
            seen.append(count / (time.perf_counter() - begin))
        speeds.append(Speed(f"{test}{count}", float(np.mean(seen[1:])), float(np.std(seen[1:]))))
    return speeds
