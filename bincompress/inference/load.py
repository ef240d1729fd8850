"""From a finished store to a model that writes text, in one call."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from bincompress.errors import BincompressError, DamagedError, StoreError
from bincompress.inference.chat import load_template
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.model_kernels import kernels_beside_llamas
from bincompress.inference.sampling import Sampling
from bincompress.inference.warmup import expect, first_token_kernels
from bincompress.model.cache import cache_bytes, cache_type
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import ModelConfig
from bincompress.model.decoder import Decoder
from bincompress.model.errors import ConfigError, SamplingError
from bincompress.model.files import json_object
from bincompress.model.generation_fields import not_obeyed
from bincompress.model.memory import planes_beside_stored, process_bytes
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.residents import Residents
from bincompress.model.store_source import StoreSource, store_config
from bincompress.model.tokenizer import Tokenizer, load_tokenizer
from bincompress.process.blas import one_blas_thread
from bincompress.process.machine import free_memory, size_text, usable_cpus
from bincompress.process.systems import forget_library_pages, give_back_freed_memory
from bincompress.sources.checkpoint import Checkpoint
from bincompress.store.store import Store, open_store
from cpu_kernels.jit.kernel_cache import is_compiled
from cpu_kernels.matmul.prepacking import kernels
from cpu_kernels.parallel.workers import Workers
from cpu_kernels.self_test import sound_kernel

_BASE_BYTES = 200 << 20  # Python, NumPy, Numba, compiled kernels, work buffers
_GENERATION = "generation_config.json"
_SAMPLED: dict[str, type[int] | type[float]] = {
    "temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float,
}  # fmt: skip
_LARGEST_SETTING = 1e9  # of a number in generation_config.json
_USUAL_CONTEXT = 2048  # tokens whose cache is counted of what --memory bounds; longer texts take more
_SHORT_CONTEXT = 256  # tokens whose cache is counted of what has to be free
_LEAST_BYTES = 30_000_000  # of work buffers and kernels, in a process that has all else already


class TooLittleMemoryError(BincompressError):
    """The model does not fit into the memory that is free."""


@dataclass(frozen=True)
class Loaded:
    """A decoder over a store, with what `bench` tells about it."""

    decoder: Decoder
    paths: dict[str, str]  # by tensor: which kernel multiplies it
    nbytes: int  # of the matrices as they are laid out
    assets: dict[str, bytes]
    notes: tuple[str, ...] = ()  # what a user should know of how it was loaded


def checked_threads(threads: int | None) -> int:
    """Return how many threads to use; raises BincompressError for so many that starting them would take minutes."""
    most = max(64, 4 * (os.cpu_count() or 1))
    if threads is not None and threads > most:
        raise BincompressError(
            f"threads: expected 1 to {most}, found {threads}; this machine has {os.cpu_count()} CPUs"
        )
    return threads or usable_threads()


def usable_threads() -> int:
    """Return the number of threads to use if none is given: `usable_cpus`."""
    return usable_cpus()


def load(
    store: str,
    *,
    threads: int | None = None,
    activation_bits: int = 8,
    activation_scale: str = "segment",
    kernel: str | None = None,
    memory: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    prompt_lookup: bool = False,
    kv_bits: int = 16,
) -> Model:
    """Load a finished store as a model.

    threads: exactly this many are used (all usable CPUs if not given). activation_bits: 8 or 6, or 16 for float32
    activations on decoded weights. activation_scale: one per "token" or per token and "segment" of 128 columns.
    kernel: "lookup", "lookup-avx2", "popcount", ... (the best of this CPU if not given).

    Several threads may use the model at once, in any mixture of generations and evaluations: each gets what it gets
    alone. They take turns, a token or a block of prompt at a time, so they are no faster together; load a second model
    for that. A generation is for one thread at a time, and one that is suspended or dropped holds nothing up. A process
    forked after loading may use the model: it starts threads of its own. NumPy's BLAS keeps the threads that it has.

    memory: bytes that the process may take: of a mixture of experts those used last are in memory, as many as fit, and
    the others are read from the store when a token chooses them. sampling: values by name ("temperature", "top_k", ...)
    that come before those of generation_config.json. prompt_lookup: what followed the last tokens when they came before
    is drafted, and checked in one pass; the text is the same, sooner where it repeats what it has read or written.
    kv_bits: of keys and values, 16 or 8; 8 halves their memory.
    Raises StoreError, DamagedError, UnsupportedModelError, TokenizerError or TooLittleMemoryError.

    >>> model = load("store")  # doctest: +SKIP
    >>> for piece in model.stream("The kernel"):  # doctest: +SKIP
    ...     print(piece, end="")
    """
    settings = ActivationSettings(activation_bits, activation_scale)  # type: ignore[arg-type]
    kept = cache_type(kv_bits)
    tokenizers: list[Tokenizer] = []
    # Before the matrices: reading a large vocabulary takes for a moment four times the memory that it keeps.
    loaded = load_decoder(
        store, threads, settings, kernel, memory, before=lambda assets: tokenizers.append(_tokenizer(store, assets))
    )
    if prompt_lookup and loaded.decoder.config.recurrent is not None:
        raise BincompressError(
            f"{store}: --prompt-lookup takes back tokens that were drafted wrongly, which this model's layers without "
            "attention cannot; leave it out"
        )
    chosen = default_sampling(loaded.assets, sampling)
    return Model(
        loaded.decoder,
        tokenizers[0],
        load_template(loaded.assets),
        GenerationSettings(sampling=chosen, cache=kept),
        notes=(*not_obeyed(loaded.assets), *loaded.notes),
        prompt_lookup=prompt_lookup,
    )


def _tokenizer(store: str, assets: Mapping[str, bytes]) -> Tokenizer:
    if "tokenizer.json" not in assets:
        raise StoreError(f"{store}: has no tokenizer.json, so it cannot read or write text; add it to the checkpoint")
    return load_tokenizer(assets)


def default_sampling(assets: Mapping[str, bytes], given: Mapping[str, Any] | None = None) -> Sampling:
    """Return the sampling that generation_config.json asks for; greedy, as in transformers, unless it says do_sample.

    given: what a user chose, by the names of `Sampling`; it comes before the file, whose value is not looked at then.
    Raises ConfigError naming the file, or SamplingError for what was given.
    """
    found = json_object(assets, _GENERATION) or {}
    given = dict(given or {})
    chosen = {key: _from_file(found, key) for key in _SAMPLED if key not in given and found.get(key) is not None}
    drawn = found.get("do_sample")
    if drawn not in (None, True, False) or type(drawn) is int:
        raise ConfigError(f"{_GENERATION}: do_sample: expected true or false, found {drawn!r:.40}")
    if not drawn and "temperature" not in given:
        chosen["temperature"] = 0.0
    try:
        Sampling(**chosen)
    except SamplingError as error:
        raise ConfigError(f"{_GENERATION}: {error}") from None
    return Sampling(**{**chosen, **given})


def _from_file(found: Mapping[str, Any], key: str) -> Any:
    value, kind = found[key], _SAMPLED[key]
    whole = kind is float or (
        isinstance(value, int | float) and value == value and abs(value) < 1e9 and value == int(value)
    )
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST_SETTING or not whole:
        expected = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{_GENERATION}: {key}: expected {expected}, found {value!r:.40}")
    return 0 if key == "top_k" and value == -1 else kind(value)  # -1 is how some files say that it is off


def load_decoder(
    url: str,
    threads: int | None,
    settings: ActivationSettings,
    kernel: str | None = None,
    memory: int | None = None,
    before: Callable[[Mapping[str, bytes]], None] = lambda assets: None,
) -> Loaded:
    """Load the decoder of a store; `load` without the tokenizer.

    before: what is to be read of the assets before the matrices are.
    """
    if settings.bits not in (6, 8, 16) or settings.per not in ("token", "segment"):
        raise BincompressError(
            f"activations: {settings.bits} bits per {settings.per}; expected 6, 8 or 16 bits per token or segment"
        )
    if kernel is not None and kernel not in ("lookup", *kernels()):
        raise BincompressError(
            f"kernel {kernel!r} is unknown or not supported by this CPU; available: {', '.join(kernels())}"
        )
    store = open_store(url)
    assets = store.read_assets()
    config = store_config(store, assets)
    expect(kernels_beside_llamas(config))
    before(assets)
    _take_kernels(config)
    workers = Workers(checked_threads(threads))
    experts = _expert_names(config)
    residents = None if memory is None else _residents(store, config, experts, memory, workers.threads)
    chosen = _sound_kernel(kernel, settings, trial=residents is not None)
    apart = frozenset(experts if residents is not None else ())
    source = StoreSource(store, config, settings, workers, chosen, apart)
    more = _more(store, config, assets) if memory is None else min(_needed(store, config), memory)
    check_memory(url, more, free_memory())
    if residents is not None:
        store.forget(experts)
    # The engine shares rows among its own threads; BLAS must not start more in each of them.
    with one_blas_thread():
        decoder = Decoder(config, source, workers, residents)
        # After the matrices are laid out: the longest kernel may be compiled by another process meanwhile.
        sound = _sound_kernel(kernel, settings, trial=True)
        if sound != chosen:
            del decoder, source
            source = StoreSource(store, config, settings, workers, sound, apart)
            decoder = Decoder(config, source, workers, residents)
    give_back_freed_memory()
    return Loaded(decoder, source.paths, source.nbytes, assets, source.notes)


def _take_kernels(config: ModelConfig) -> None:
    """Load the kernels that are compiled already, and give back what that takes, before the matrices take theirs.

    Without it the height of a process is 50 MB more. Those that are to be compiled are compiled when they are needed,
    some of them by another process meanwhile, and need what would be given back.
    """
    wanted = [*first_token_kernels(), *kernels_beside_llamas(config)]
    if all(is_compiled(kernel.name()) for kernel in wanted):
        for kernel in wanted:
            kernel.compile()
        forget_library_pages()


def _sound_kernel(asked: str | None, settings: ActivationSettings, trial: bool) -> str | None:
    """Return the kernel that gives right products; float32 activations are multiplied by BLAS."""
    return asked if settings.bits == 16 else sound_kernel(asked, settings.bits, trial)


def load_baseline(checkpoint: Checkpoint, threads: int | None) -> Decoder:
    """Load an unquantized checkpoint in float32, held to `threads` threads."""
    weights = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    check_memory(checkpoint.name, 4 * weights + _BASE_BYTES, free_memory())
    return load_checkpoint(checkpoint, Workers(checked_threads(threads)))


def _residents(
    store: Store, config: ModelConfig, experts: dict[str, tuple[int, int]], memory: int, threads: int
) -> Residents | None:
    """Return what holds the experts to what the rest of the model leaves of so many bytes; None where all fit.

    Raises TooLittleMemoryError where the rest does not fit, or not beside it the experts that are used at a time.
    """
    needed = _needed(store, config)
    if needed <= memory:
        return None
    sizes: dict[tuple[int, int], int] = {}
    for name, place in experts.items():
        sizes[place] = sizes.get(place, 0) + _stored_bytes(store, name)
    rest = needed - sum(sizes.values())
    at_a_time = (config.experts.chosen + threads if config.experts is not None else 0) * max(sizes.values(), default=0)
    if rest + at_a_time > memory:
        beside = f" and {size_text(at_a_time)} for the experts that are used at a time" if sizes else ""
        raise TooLittleMemoryError(
            f"{store.url}: --memory {size_text(memory)} is too little: {'without its experts ' if sizes else ''}the "
            f"model needs about {size_text(rest)}{beside}"
        )
    return Residents(memory - rest)


def _expert_names(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the layer and the number of the expert that each matrix of an expert belongs to."""
    found: dict[str, tuple[int, int]] = {}
    for layer in range(config.layers):
        experts = config.experts_of(layer)
        for expert in range(experts.count if experts is not None else 0):
            gate_up, down = config.names.of_expert(layer, expert)
            found |= dict.fromkeys((*gate_up, down), (layer, expert))
    return found


def _more(store: Store, config: ModelConfig, assets: Mapping[str, bytes]) -> int:
    """Return the bytes that this process takes in the end beside what it has now, with a short text."""
    sizes = {}
    for name, shape in config.tensors().items():
        terms = store.complete_attributes(name).get("terms")
        # What else stands there is refused by name when the tensor is read.
        numbers = [term for term in terms if type(term) is int] if isinstance(terms, list) else []
        beside = planes_beside_stored(numbers)
        sizes[name] = _stored_bytes(store, name) + beside * math.prod(shape) // 8
    tokenizer = len(assets.get("tokenizer.json", b""))
    loaded, rest = process_bytes(config, sizes, tokenizer, min(config.context, _SHORT_CONTEXT))
    return loaded + max(_LEAST_BYTES, rest - int(psutil.Process().memory_info().rss))


def _stored_bytes(store: Store, name: str) -> int:
    try:
        return store.stored_bytes(name)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{store.url}: a tensor's attributes lack its stored bytes ({error!r})") from None


def _needed(store: Store, config: ModelConfig) -> int:
    matrices = sum(_stored_bytes(store, name) for name in config.tensors())
    return matrices + cache_bytes(config, min(config.context, _USUAL_CONTEXT), "float16") + _BASE_BYTES


def check_memory(what: str, needed: int, free: tuple[int, str]) -> None:
    """Raise TooLittleMemoryError where more bytes are needed than are free; free: as `free_memory` returns it."""
    available, limit = free
    if needed > available:
        raise TooLittleMemoryError(
            f"{what}: needs about {size_text(needed)} of memory, {size_text(available)} are free ({limit}); "
            "close other programs, raise the limit, or compress with fewer bits (--embeddings 4bit)"
        )
