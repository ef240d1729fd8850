"""How fast does a decoder read a prompt and write tokens? In the manner of llama-bench: pp and tg, mean and spread."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bincompress.model.cache import CacheType, KvCache
from bincompress.model.decoder import Decoder
from bincompress.model.errors import PromptError
from bincompress.process.energy import EnergyMeter


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one test over its repetitions."""

    # "pp128": a prompt of 128 tokens; "tg64": 64 tokens one after the other; "tg64 @ d512": behind 512 others
    test: str
    mean: float
    spread: float  # standard deviation
    joules: float | None  # a token, of the whole CPU; None where that cannot be read
    cache_bytes: int | None  # of keys and values that a written token reads on average; None for prompts


def measure(
    decoder: Decoder,
    prompt: int,
    tokens: int,
    repeats: int,
    on_test: Callable[[str], None] = lambda test: None,
    cache_type: CacheType = "float16",
    depth: int = 0,
) -> list[Speed]:
    """Return the speeds of reading `prompt` tokens and of writing `tokens` after one, random ids, no sampling.

    depth: tokens that are in the cache before. Raises PromptError where the model's context is shorter than all of it.
    """
    context = decoder.config.context
    if depth + max(prompt, tokens) > context:
        raise PromptError(
            f"depth: expected at most {context - max(prompt, tokens):,}, so that all fits the context of {context:,}, "
            f"found {depth:,}"
        )
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab, max(prompt, tokens, depth, 1))
    before = decoder.new_cache(depth, cache_type) if depth else None
    if before is not None:
        decoder.next_logits(ids[:depth], before)
    speeds = []
    for test, count in (("pp", prompt), ("tg", tokens)):
        if not count:
            continue
        name = f"{test}{count}" + (f" @ d{depth}" if depth else "")
        seen, joules = [], 0.0
        for number in range(repeats + 1):  # the first warms caches and compiles
            on_test(name)
            cache = decoder.new_cache(depth + count, cache_type)
            if before is not None:
                cache.copy_from(before, depth)
            meter, begin = EnergyMeter(), time.perf_counter()
            if test == "pp":
                decoder.next_logits(ids[:count], cache)
            else:
                for token in ids[:count]:
                    decoder.next_logits([token], cache)
            seen.append(count / (time.perf_counter() - begin))
            used = meter.joules()
            joules += 0.0 if number == 0 else float("nan") if used is None else used
        energy = None if np.isnan(joules) else joules / (repeats * count)
        read = None if test == "pp" else _bytes_a_token(cache, depth, count)
        speeds.append(Speed(name, float(np.mean(seen[1:])), float(np.std(seen[1:])), energy, read))
    return speeds


def _bytes_a_token(cache: KvCache, depth: int, count: int) -> int:
    """Return the bytes of keys and values of the positions that a token sees, on average over those written."""
    whole = sum(array.nbytes for array in (*cache.keys, *cache.values))
    return int(whole * (depth + (count + 1) / 2) / cache.capacity)
