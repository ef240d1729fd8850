"""How does a store become a Hugging Face folder again? Dequantized weights as bfloat16, for any other program."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from bincompress.errors import StoreError
from bincompress.sources.checkpoint import INDEX
from bincompress.store.store import PLAIN_DTYPES, Store
from bincompress.tensors.dequantize import dequantize, to_bfloat16

_SHARD_BYTES = 1 << 30  # weights that are in memory at once


def export(store: Store, folder: Path, on_tensor: Callable[[str, int], None] = lambda name, done: None) -> Path:
    """Write config, tokenizer and safetensors shards with their index into a new folder, and return it.

    Packed tensors become bfloat16; the others keep their dtype. Raises StoreError where the store is not complete or
    the folder exists with something in it. The folder appears under its name only when all of it is written.
    """
    if store.attributes["status"] != "complete":
        raise StoreError(f"{store.url}: not complete; run the same `bincompress compress` again before exporting it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder}: exists and is not an empty folder; choose another")
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in store.read_assets().items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        _write_shards(store, partial, on_tensor)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_shards(store: Store, folder: Path, on_tensor: Callable[[str, int], None]) -> None:
    shards: list[Path] = []
    where: dict[str, int] = {}
    waiting: dict[str, NDArray[Any]] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        path = folder / f"shard-{len(shards)}"
        safetensors.numpy.save_file(waiting, path, {"format": "pt"})
        shards.append(path)
        waiting.clear()
        size = 0

    for name in sorted(store.tensors()):
        tensor = _tensor(store, name)
        if waiting and size + tensor.nbytes > _SHARD_BYTES:
            flush()
        waiting[name] = tensor
        where[name] = len(shards)
        size += tensor.nbytes
        total += tensor.nbytes
        on_tensor(name, tensor.nbytes)
    flush()
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, name in zip(shards, names, strict=True):
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[shard] for name, shard in where.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _tensor(store: Store, name: str) -> NDArray[Any]:
    if store.tensors()[name] == "packed":
        return to_bfloat16(dequantize(store.read_packed(name))).view(ml_dtypes.bfloat16)
    weight, shape = store.read_plain(name)
    name = PLAIN_DTYPES[weight.dtype]
    tensor: NDArray[Any] = weight.bits.view(np.dtype(getattr(ml_dtypes, name, name))).reshape(shape)
    return tensor
