"""From a finished store to a model that writes text, in one call."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import threadpoolctl

from bincompress.errors import BincompressError, DamagedError, StoreError
from bincompress.inference.chat import load_template
from bincompress.inference.generate import GenerationSettings, Model
from bincompress.inference.sampling import Sampling
from bincompress.model.cache import cache_bytes
from bincompress.model.checkpoint_source import load_checkpoint
from bincompress.model.config import ModelConfig, parse
from bincompress.model.decoder import Decoder
from bincompress.model.errors import ConfigError
from bincompress.model.packed_linear import ActivationSettings
from bincompress.model.store_source import StoreSource
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.checkpoint import Checkpoint
from bincompress.store.store import Store, open_store
from cpu_kernels.matmul.prepacking import kernels
from cpu_kernels.parallel.workers import Workers

_BASE_BYTES = 200 << 20  # Python, NumPy, Numba, compiled kernels, work buffers
_LARGEST_SETTING = 1e9  # of a number in generation_config.json
_USUAL_CONTEXT = 2048  # tokens whose cache is counted before loading; longer texts take more


class TooLittleMemoryError(BincompressError):
    """The model does not fit into the memory that is free."""


@dataclass(frozen=True)
class Loaded:
    """A decoder over a store, with what `bench` tells about it."""

    decoder: Decoder
    paths: dict[str, str]  # by tensor: which kernel multiplies it
    nbytes: int  # of the matrices as they are laid out
    assets: dict[str, bytes]


def usable_threads() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def load(
    store: str,
    *,
    threads: int | None = None,
    activation_bits: int = 8,
    activation_scale: str = "segment",
    kernel: str | None = None,
) -> Model:
    """Load a finished store as a model.

    threads: exactly this many are used (all usable CPUs if not given). activation_bits: 8 or 6, or 16 for float32
    activations on decoded weights. activation_scale: one per "token" or per token and "segment" of 128 columns.
    kernel: "lookup", "lookup-avx2", "popcount", ... (the best of this CPU if not given).
    Raises StoreError, DamagedError, UnsupportedModelError, TokenizerError or TooLittleMemoryError.

    >>> model = load("store")  # doctest: +SKIP
    >>> for piece in model.stream("The kernel"):  # doctest: +SKIP
    ...     print(piece, end="")
    """
    loaded = load_decoder(store, threads, ActivationSettings(activation_bits, activation_scale), kernel)  # type: ignore[arg-type]
    if "tokenizer.json" not in loaded.assets:
        raise StoreError(f"{store}: has no tokenizer.json, so it cannot read or write text; add it to the checkpoint")
    sampling = default_sampling(loaded.assets)
    return Model(
        loaded.decoder,
        load_tokenizer(loaded.assets),
        load_template(loaded.assets),
        GenerationSettings(sampling=sampling),
    )


def default_sampling(assets: dict[str, bytes]) -> Sampling:
    """Return the sampling that generation_config.json asks for; greedy where it says that nothing is to be drawn."""
    try:
        found = json.loads(assets.get("generation_config.json", b"{}"))
    except (ValueError, RecursionError):
        raise ConfigError("generation_config.json: not readable as JSON") from None
    if not isinstance(found, dict):
        raise ConfigError(f"generation_config.json: expected a JSON object, found {type(found).__name__}")
    if found.get("do_sample") is False:
        return Sampling(temperature=0.0)
    kinds: dict[str, type[int] | type[float]] = {
        "temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float,
    }  # fmt: skip
    given = {key: found[key] for key in kinds if found.get(key) is not None}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST_SETTING:
            raise ConfigError(f"generation_config.json: {key}: expected a number, found {value!r:.40}")
    return Sampling(**{key: kinds[key](value) for key, value in given.items()})  # type: ignore[arg-type]


def load_decoder(url: str, threads: int | None, settings: ActivationSettings, kernel: str | None = None) -> Loaded:
    """Load the decoder of a store; `load` without the tokenizer."""
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
    config = parse(_config(store, assets))
    workers = Workers(threads or usable_threads())
    source = StoreSource(store, config, settings, workers, kernel)
    check_memory(url, _needed(store, config), psutil.virtual_memory().available)
    # The engine shares rows among its own threads; BLAS must not start more in each of them.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    decoder = Decoder(config, source, workers)
    return Loaded(decoder, source.paths, source.nbytes, assets)


def load_baseline(checkpoint: Checkpoint, threads: int | None) -> Decoder:
    """Load an unquantized checkpoint in float32, held to `threads` threads."""
    weights = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    check_memory(checkpoint.name, 4 * weights + _BASE_BYTES, psutil.virtual_memory().available)
    threadpoolctl.threadpool_limits(1, user_api="blas")
    return load_checkpoint(checkpoint, Workers(threads or usable_threads()))


def _config(store: Store, assets: dict[str, bytes]) -> dict[str, Any]:
    found = store.attributes.get("config")
    if not isinstance(found, dict):
        found = json.loads(assets.get("config.json", b"{}"))
    return dict(found)


def _needed(store: Store, config: ModelConfig) -> int:
    try:
        matrices = sum(int(store.complete_attributes(name)["report"]["stored_bytes"]) for name in config.tensors())
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{store.url}: a tensor's attributes lack its stored bytes ({error!r})") from None
    return matrices + cache_bytes(config, min(config.context, _USUAL_CONTEXT), "float16") + _BASE_BYTES


def check_memory(
    what: str, needed: int, available: int, tell: Callable[[int], str] = lambda n: f"{n / 1e6:,.0f} MB"
) -> None:
    """Raise TooLittleMemoryError where more is needed than available, both in bytes."""
    if needed > available:
        raise TooLittleMemoryError(
            f"{what}: needs about {tell(needed)} of memory, {tell(available)} are free; close other programs, or "
            "compress with fewer bits (--embeddings 4bit)"
        )
