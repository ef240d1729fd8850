"""The kernels that run a store, compiled for programs that begin later."""

import numpy as np

from bincompress.inference.load import load_decoder
from bincompress.model.cache import CacheType, cache_type
from bincompress.model.packed_linear import ActivationSettings

_PROMPT = 52  # tokens: 32, 16 and 4 are multiplied at a time, where the CPU has kernels for so many


def compile_for(
    store: str,
    threads: int | None,
    settings: ActivationSettings,
    kernel: str | None,
    memory: int | None,
    kv_bits: int = 16,
) -> None:
    """Compile (or load) what generating, serving and evaluating with a store use: the model reads and writes a little.

    Raises as `load_decoder` does.
    """
    decoder = load_decoder(store, threads, settings, kernel, memory).decoder
    count = min(_PROMPT, decoder.config.context - 1)
    prompt = np.arange(count) % decoder.config.vocab
    kinds: tuple[CacheType, ...] = (cache_type(kv_bits), "float32")  # of generating and of evaluating
    for kind in kinds:
        first, second = (decoder.new_cache(count + 1, kind) for _ in range(2))
        decoder.logits(prompt, first)
        decoder.next_logits(prompt[:1], first)
        decoder.logits_of(decoder.states_of_all([(prompt, second)]))
        first.rewind()
        second.rewind()
        decoder.logits_of(decoder.states_of_all([(prompt[:1], first), (prompt[:1], second)]))
