"""What was computed of a text, in a file: the next run that begins alike goes on with it.

A safetensors file: the tokens, each layer's keys and values, and what they were computed with. It is only read where
all of this is the same, so a text is what it would be without the file.
"""

import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bincompress import __version__
from bincompress.errors import BincompressError
from bincompress.inference.prefixes import Prefix, PrefixCache
from bincompress.model.cache import KvCache
from bincompress.model.decoder import Decoder
from bincompress.process.faults import explain
from cpu_kernels.decoder.attention import BLOCK

_FORMAT = "bincompress prompt cache 1"
_LONGEST_HEADER = 1 << 20


class PromptCacheError(BincompressError):
    """A file is no prompt cache, or one of another store or other settings."""


def load_prefix(path: Path, prefixes: PrefixCache, decoder: Decoder, engine: str) -> int:
    """Give a file's cache to `prefixes`; return how many tokens it has, 0 where there is no file.

    engine: as `engine_of` returns it. Raises PromptCacheError naming the file.
    """
    if not path.exists():
        return 0
    if not path.is_file():
        raise PromptCacheError(f"{path}: not a file; give another --prompt-cache")
    import safetensors

    try:
        _check_header(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            tokens, cache = _read(path, file, prefixes, decoder, engine)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise PromptCacheError(
            f"{path}: not a prompt cache, or damaged ({str(error)[:100]}); give another name"
        ) from None
    prefixes.put(tokens.tolist(), cache)
    return len(tokens)


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(8)
    if len(begin) < 8 or struct.unpack("<Q", begin)[0] > _LONGEST_HEADER:
        raise ValueError("its header is too short or too long")


def _read(
    path: Path, file: Any, prefixes: PrefixCache, decoder: Decoder, engine: str
) -> tuple[NDArray[np.int64], KvCache]:
    told: Mapping[str, str] = file.metadata() or {}
    if told.get("format") != _FORMAT:
        raise ValueError("its format is another one")
    if told.get("engine") != engine or told.get("version") != __version__:
        raise PromptCacheError(
            f"{path}: was made with another store, other activation settings or another version; give another "
            "--prompt-cache, or remove it"
        )
    cache = decoder.new_cache(prefixes.capacity, prefixes.kind)
    shape = file.get_slice("tokens").get_shape()
    # Sizes are known before anything is read: they follow from the model and the number of tokens.
    if len(shape) != 1 or not 0 < shape[0] <= cache.capacity:
        raise ValueError(f"{shape} tokens; expected 1 to {cache.capacity:,}")
    length = int(shape[0])
    parts = _parts(cache, length)
    if set(file.keys()) != {"tokens", *parts}:
        raise ValueError("its tensors are others than this model's")
    for name, part in parts.items():
        found = file.get_slice(name)
        if tuple(found.get_shape()) != part.shape or found.get_dtype() != _DTYPES[part.dtype.name]:
            raise ValueError(f"{name} has another shape or type than this model's")
    tokens = np.asarray(file.get_tensor("tokens"))
    if tokens.dtype != np.int64 or tokens.min() < 0 or tokens.max() >= decoder.config.vocab:
        raise ValueError("its tokens are not in the vocabulary")
    digest = xxhash.xxh3_128(tokens.tobytes())
    for name, part in parts.items():
        part[:] = file.get_tensor(name)
        digest.update(np.ascontiguousarray(part).data)
    if told.get("hash") != digest.hexdigest():
        raise ValueError("its bytes are not those that were written")
    cache.hold(length)
    return tokens, cache


_DTYPES = {"uint16": "U16", "float32": "F32", "int8": "I8"}


def _parts(cache: KvCache, length: int) -> dict[str, NDArray[Any]]:
    """Return views of what a cache holds of so many positions, in whole blocks."""
    blocks = -(-length // BLOCK)
    keys = {f"keys.{layer}": own[:, :blocks] for layer, own in enumerate(cache.keys)}
    return keys | {f"values.{layer}": own[:, : blocks * BLOCK] for layer, own in enumerate(cache.values)}


def save_prefix(path: Path, prefix: Prefix, engine: str) -> None:
    """Write a text's cache; what was there before stays as it is until the whole of it is written."""
    from safetensors.numpy import save_file

    length = prefix.cache.length
    tokens = np.ascontiguousarray(prefix.tokens[:length], np.int64)
    parts = {name: np.ascontiguousarray(part) for name, part in _parts(prefix.cache, length).items()}
    digest = xxhash.xxh3_128(tokens.tobytes())
    for part in parts.values():
        digest.update(part.data)
    told = {"format": _FORMAT, "engine": engine, "version": __version__, "hash": digest.hexdigest()}
    target = Path(os.path.realpath(path))
    made = target.with_name(f".bincompress-{secrets.token_hex(8)}.tmp")
    try:
        save_file({"tokens": tokens, **parts}, made, told)
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        made.replace(target)
    except Exception as error:
        raise PromptCacheError(f"{path}: the prompt cache cannot be written: {explain(error) or error}") from None
    finally:
        made.unlink(missing_ok=True)
