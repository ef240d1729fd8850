"""How does a store become a Hugging Face folder again? Dequantized weights as bfloat16, for any other program."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from bincompress.errors import StoreError
from bincompress.sources import bitnet
from bincompress.sources.checkpoint import INDEX
from bincompress.sources.experts import experts_of, together
from bincompress.sources.fused import fused_names
from bincompress.store.files import LOCK
from bincompress.store.lock import exclusive
from bincompress.store.reading import not_finite
from bincompress.store.store import Store
from bincompress.tensors.dequantize import dequantize, to_bfloat16

_PARTIAL = ".bincompress-export"  # within the folder, until all is written
_MOVED = ".moved"  # in it, what is being moved out of it: a killed export's, to be removed
_SHARD_BYTES = 1 << 30  # weights that are in memory at once


def export(store: Store, folder: Path, on_tensor: Callable[[str, int], None] = lambda name, done: None) -> Path:
    """Write config, tokenizer and safetensors shards with their index into an empty or new folder, and return it.

    Packed tensors become bfloat16; the others keep their dtype. Raises StoreError where the store is not complete or
    the folder has something in it. Files appear under their names only when all of them are written, config.json last.
    """
    if store.attributes["status"] != "complete":
        raise StoreError(f"{store.url}: not complete; run the same `bincompress compress` again before exporting it")
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: exists and is not an empty folder; choose another")
    with exclusive(str(folder)):
        partial = folder / _PARTIAL
        try:
            _make_room(folder)
            partial.mkdir()
            for name, content in store.read_assets().items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(_asset(store, name, content))
            _write_shards(store, partial, on_tensor)
            _put_in_place(partial, folder)
        except OSError as error:
            raise StoreError(f"{folder}: cannot be written: {error.strerror or error}") from None
        finally:
            if partial.is_dir() and not (partial / _MOVED).exists():
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _make_room(folder: Path) -> None:
    """Remove what a killed export left; raises StoreError where anything else is there."""
    partial = folder / _PARTIAL
    listed = partial / _MOVED
    left = set(listed.read_text("utf-8").splitlines()) if listed.is_file() else set()
    if any(path.name not in left and path.name not in (_PARTIAL, LOCK, "lost+found") for path in folder.iterdir()):
        raise StoreError(f"{folder}: exists and is not an empty folder; choose another")
    for name in left:
        (folder / Path(name).name).unlink(missing_ok=True)
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)


def _put_in_place(partial: Path, folder: Path) -> None:
    names = sorted((path.name for path in partial.iterdir()), key=lambda name: (name == "config.json", name))
    (partial / _MOVED).write_text("\n".join(names), "utf-8")
    for name in names:
        os.replace(partial / name, folder / name)
    (partial / _MOVED).unlink()
    partial.rmdir()


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

    experts = _experts(store)
    for name, parts in _stored_as(store, experts).items():
        found = _alike([_tensor(store, part) for part in parts])
        if name in experts:
            tensor = together(_config(store), found, len({part.rsplit(".", 3)[1] for part in parts}))
        else:
            tensor = found[0] if len(found) == 1 else np.concatenate(found)
        if waiting and size + tensor.nbytes > _SHARD_BYTES:
            flush()
        own = {name: tensor}
        if bitnet.is_bitnet(_config(store)) and bitnet.is_layer(name, tensor.shape):
            own[f"{name}_scale"] = np.ones(1, ml_dtypes.bfloat16)
        waiting |= own
        where |= dict.fromkeys(own, len(shards))
        size += tensor.nbytes
        total += sum(part.nbytes for part in own.values())
        on_tensor(name, tensor.nbytes)
    flush()
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, name in zip(shards, names, strict=True):
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[shard] for name, shard in where.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")


def _asset(store: Store, name: str, content: bytes) -> bytes:
    """Return a small file as it is written; config.json of a BitNet says how its weights are stored now."""
    if name != "config.json" or not bitnet.is_bitnet(_config(store)):
        return content
    return json.dumps(bitnet.exported(_config(store)), indent=2).encode()


def _config(store: Store) -> dict[str, Any]:
    config = store.attributes.get("config")
    return config if isinstance(config, dict) else {}


def _experts(store: Store) -> dict[str, list[str]]:
    """Return the parts of each 3-D tensor of experts that the checkpoint had."""
    fused = store.attributes.get("fused")
    return experts_of(_config(store), fused if isinstance(fused, list) else [], store.tensors())


def _stored_as(store: Store, experts: dict[str, list[str]]) -> dict[str, Sequence[str]]:
    """Return the names that the checkpoint had, each with the tensors of the store that it is made of."""
    parts = {part for names in experts.values() for part in names}
    others = fused_names(_config(store), [name for name in store.tensors() if name not in parts])
    return dict(sorted({**experts, **others}.items()))


def _alike(parts: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the parts of a fused matrix in one dtype: float32 where those of kept and packed ones differ."""
    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else np.dtype(np.float32)
    return [part.astype(dtype, copy=False) for part in parts]


def _tensor(store: Store, name: str) -> NDArray[Any]:
    if store.tensors()[name] == "packed":
        return to_bfloat16(dequantize(store.read_stored(name))).view(ml_dtypes.bfloat16)
    weight, shape = store.read_plain(name)
    if problem := not_finite(weight, shape):
        raise StoreError(f"{store.url}: {name}: {problem}; compress a sound checkpoint")
    name = weight.dtype_name
    tensor: NDArray[Any] = weight.bits.view(np.dtype(getattr(ml_dtypes, name, name))).reshape(shape)
    return tensor
