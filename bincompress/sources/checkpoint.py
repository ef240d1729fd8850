"""What is in a Hugging Face checkpoint? Headers only, everything checked before anything is believed.

Files are untrusted: header and tensor sizes are held against the file before memory is taken, and no name leads out
of the folder.
"""

import json
import math
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bincompress.errors import CheckpointError
from bincompress.tensors.weight import TensorSource, Weight

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
INDEX = "model.safetensors.index.json"
ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
_ASSET_LIMIT = 256 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, its config and where each of its tensors lies."""

    folder: Path
    name: str  # the Hub id, or the folder's name
    revision: str  # the Hub commit, or empty
    config: dict[str, Any]
    tensors: dict[str, TensorSource]

    def assets(self) -> dict[str, bytes]:
        """Return the small files that belong to the model (config, tokenizer, templates) by name."""
        found = {}
        for name in ASSETS:
            path = self.folder / name
            if path.is_file():
                if path.stat().st_size > _ASSET_LIMIT:
                    raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; expected at most {_ASSET_LIMIT:,}")
                found[name] = path.read_bytes()
        return found


def open_checkpoint(folder: Path, name: str = "", revision: str = "") -> Checkpoint:
    """Read the headers of a checkpoint folder: config.json and safetensors files, sharded or not.

    Raises CheckpointError where a file is missing, truncated, contradicts itself or names something outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a Hugging Face checkpoint folder or a Hub id")
    config = read_json(folder / "config.json")
    tensors: dict[str, TensorSource] = {}
    for path in _files(folder):
        for tensor in read_header(path):
            if tensor.name in tensors:
                raise CheckpointError(f"{tensor.name}: in both {tensors[tensor.name].file} and {path}; expected in one")
            tensors[tensor.name] = tensor
    _check_index(folder, tensors)
    if not tensors:
        raise CheckpointError(f"{folder}: its safetensors files hold no tensors")
    return Checkpoint(folder, name or folder.resolve().name, revision, config, dict(sorted(tensors.items())))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; raises CheckpointError where it is missing or not one."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; expected a Hugging Face checkpoint (config.json, *.safetensors)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    if not index.exists():
        return {}
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to file names")
    return found


def _files(folder: Path) -> list[Path]:
    """Return the safetensors files of the model: those that the index names, else model.safetensors, else all."""
    names = set(_weight_map(folder).values())
    for name in sorted(names):
        # A Hub download holds links into its cache, so the name is checked, not where it leads.
        if not _NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: names the file {name!r}; expected a .safetensors file in that folder"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, but {INDEX} names it; download the checkpoint again")
    if names:
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{folder}: no .safetensors file; other formats (.bin, .gguf) are not read")
    return found


def _check_index(folder: Path, tensors: dict[str, TensorSource]) -> None:
    for name, file in _weight_map(folder).items():
        if name not in tensors:
            raise CheckpointError(f"{folder / INDEX}: says that {file} holds {name}, which it does not")
        if Path(tensors[name].file).name != file:
            raise CheckpointError(f"{folder / INDEX}: {name} is in {Path(tensors[name].file).name}, not in {file}")


def read_header(path: Path) -> list[TensorSource]:
    """Return the tensors of one safetensors file, each checked against the file's size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(
                    f"{path}: truncated or not safetensors: header of {length:,} bytes in a file of {size:,}"
                )
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header not readable: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a JSON object as header, found {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = [_tensor(path, 8 + length, size, name, entry) for name, entry in header.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise CheckpointError(f"{path}: {tensor.name} overlaps the tensor before it")
        end = tensor.offset + tensor.nbytes
    return tensors


def _tensor(path: Path, base: int, size: int, name: str, entry: Any) -> TensorSource:
    where = f"{path}: {name!r}"
    if not _NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(f"{where}: expected a tensor name of letters, digits, '.', '_' and '-'")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {entry!r:.80}") from None
    if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise CheckpointError(f"{where}: dtype, shape or data_offsets are not a name and whole numbers: {entry!r:.120}")
    if not begin <= end <= size - base:
        raise CheckpointError(
            f"{where}: bytes {begin:,} to {end:,} lie outside the {max(size - base, 0):,} bytes of data in the file "
            "(truncated download?)"
        )
    expected = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    if dtype in ITEM_BYTES and expected != end - begin:
        raise CheckpointError(f"{where}: {dtype} {shape} needs {expected:,} bytes, the header gives {end - begin:,}")
    return TensorSource(name, dtype, tuple(shape), str(path), base + begin, end - begin)


def read_weight(source: TensorSource) -> Weight:
    """Map one tensor's float bit patterns into memory, read-only; a tensor of one dimension becomes one row.

    Raises CheckpointError where the dtype is not BF16, F16 or F32, or the file is shorter than its header said.
    """
    if source.dtype not in ITEM_BYTES:
        raise CheckpointError(f"{source.name}: dtype {source.dtype}; expected one of {', '.join(ITEM_BYTES)}")
    item = np.uint32 if source.dtype == "F32" else np.uint16
    count = math.prod(source.shape)
    if not count:
        return Weight(np.empty((0, 0), item), source.dtype)
    # Mapped, not read: filling new memory costs three times what the first pass over a mapped file does.
    start = source.offset - source.offset % mmap.ALLOCATIONGRANULARITY
    try:
        with open(source.file, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < source.offset + source.nbytes:
                raise CheckpointError(
                    f"{source.name}: {source.file} has {size:,} bytes, the tensor ends at "
                    f"{source.offset + source.nbytes:,}; has it changed since?"
                )
            mapped = mmap.mmap(
                file.fileno(), source.offset - start + source.nbytes, access=mmap.ACCESS_READ, offset=start
            )
    except OSError as error:
        raise CheckpointError(f"{source.name}: {source.file} not readable: {error}") from None
    bits = np.frombuffer(mapped, np.uint8, source.nbytes, source.offset - start)
    # Kernels want aligned items; the format does not promise them.
    aligned = bits.view(item) if bits.ctypes.data % item().itemsize == 0 else np.frombuffer(bits.tobytes(), item)
    return Weight(aligned.reshape(math.prod(source.shape[:-1]), source.shape[-1] if source.shape else 1), source.dtype)


_SHAPES = {
    "embed_tokens.weight": ("vocab_size", "hidden_size"),
    "lm_head.weight": ("vocab_size", "hidden_size"),
    "self_attn.q_proj.weight": ("heads", "hidden_size"),
    "self_attn.k_proj.weight": ("kv_heads", "hidden_size"),
    "self_attn.v_proj.weight": ("kv_heads", "hidden_size"),
    "self_attn.o_proj.weight": ("hidden_size", "heads"),
    "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
}


def check_shapes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where a tensor's shape contradicts config.json (names as Llama and its kin use them)."""
    config = checkpoint.config
    sizes = {key: value for key, value in config.items() if type(value) is int}
    heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    if heads and hidden:
        head_dim = sizes.get("head_dim") or hidden // heads
        sizes["heads"] = heads * head_dim
        sizes["kv_heads"] = sizes.get("num_key_value_heads", heads) * head_dim
    for tensor in checkpoint.tensors.values():
        for suffix, keys in _SHAPES.items():
            if not tensor.name.endswith("." + suffix) and tensor.name != suffix:
                continue
            if not all(key in sizes for key in keys):
                continue
            expected = tuple(sizes[key] for key in keys)
            if tensor.shape != expected:
                raise CheckpointError(
                    f"{tensor.name}: shape {list(tensor.shape)} contradicts config.json, which gives {list(expected)} "
                    f"({' x '.join(keys)}); are the weights and config.json of one model?"
                )
