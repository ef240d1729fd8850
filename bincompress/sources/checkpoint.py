"""What is in a Hugging Face checkpoint? Headers only, everything checked before anything is believed.

Files are untrusted: header and tensor sizes are held against the file before memory is taken, and no name leads out
of the folder.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bincompress.errors import CheckpointError
from bincompress.sources.assets import ASSETS as ASSETS
from bincompress.sources.assets import read_assets
from bincompress.sources.bitnet import ternary
from bincompress.sources.experts import fused_experts, split_experts
from bincompress.sources.files import ADAPTER, FILE_NAME, index_notes, weight_files
from bincompress.sources.files import INDEX as INDEX
from bincompress.sources.fused import split
from bincompress.sources.json_files import read_json as read_json
from bincompress.sources.json_files import refuse_other_kind, refuse_pointer
from bincompress.sources.mapping import ITEM_BYTES as ITEM_BYTES
from bincompress.sources.mapping import OTHER_DTYPES as OTHER_DTYPES
from bincompress.sources.quantized.finding import unquantized
from bincompress.sources.reading import read_weight as read_weight
from bincompress.tensors.weight import TensorSource

_DAMAGED = "the safetensors library refuses such a file too: download or save it again"
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
_COMPARED_AT_ONCE = 1 << 24  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, its config and where each of its tensors lies."""

    folder: Path
    name: str  # the Hub id, or the folder's name
    revision: str  # the Hub commit, or empty
    config: dict[str, Any]
    tensors: dict[str, TensorSource]
    notes: tuple[str, ...] = ()  # what a user should know of how its files are read
    made: Mapping[str, bytes] = field(
        default_factory=dict
    )  # small files that are made, in place of those of the folder
    file: Path | None = None  # where one file holds all of the model, small files too

    @property
    def place(self) -> Path:
        """What to give to `open_source` to open the same checkpoint again."""
        return self.folder if self.file is None else self.file

    fused: tuple[str, ...] = ()  # 3-D tensors of which `tensors` has the experts' matrices
    omitted: tuple[str, ...] = ()  # small files of the folder that do not come along

    def assets(self) -> dict[str, bytes]:
        """Return the small files that belong to the model (config, tokenizer, templates) by name."""
        found = read_assets(self.folder) if self.file is None else {}
        return {**{name: content for name, content in found.items() if name not in self.omitted}, **self.made}


def open_checkpoint(folder: Path, name: str = "", revision: str = "") -> Checkpoint:
    """Read the headers of a checkpoint folder: config.json and safetensors files, sharded or not.

    Raises CheckpointError where a file is missing, truncated, contradicts itself or names something outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a Hugging Face checkpoint folder or a Hub id")
    if not (folder / "config.json").exists():
        _refuse_other_folder(folder)
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    notes = list(files.notes)
    tensors: dict[str, TensorSource] = {}
    for path in files.paths:
        for tensor in read_header(path):
            if tensor.name in tensors:
                _check_double(tensors[tensor.name], tensor, files.index.get(tensor.name))
            tensors[tensor.name] = tensor
    if not tensors:
        raise CheckpointError(f"{folder}: its safetensors files hold no tensors")
    notes += index_notes(files, tensors)
    return checkpoint_of(folder, name or folder.resolve().name, revision, config, tensors, tuple(notes))


def checkpoint_of(
    folder: Path, name: str, revision: str, config: dict[str, Any], tensors: dict[str, TensorSource],
    notes: tuple[str, ...] = (),
) -> Checkpoint:  # fmt: skip
    """Return the checkpoint of a config.json and the tensors beside it; quantized ones become what they stand for."""
    tensors, rounded = ternary(config, tensors)
    plain, found, more = unquantized(config, tensors)
    made = {} if plain == config else {"config.json": json.dumps(plain, indent=2).encode()}
    parts = split(plain, split_experts(plain, found.values()))
    fused = fused_experts(plain, found.values())
    return Checkpoint(folder, name, revision, plain, parts, (*notes, *rounded, *more), made, fused=fused)


def _refuse_other_folder(folder: Path) -> None:
    """Raise CheckpointError for a folder that is no checkpoint, but known to be something else."""
    if (folder / ADAPTER).exists() or any(folder.glob("*.gguf")):
        weight_files(folder)
    commits = sorted(path for pattern in ("snapshots/*", "models--*/snapshots/*") for path in folder.glob(pattern))
    if commits:
        raise CheckpointError(f"{folder}: a folder of the Hub's cache; give the model in it, such as {commits[0]}")
    if (folder / "zarr.json").is_file():
        raise CheckpointError(f"{folder}: a store, not a checkpoint; give the checkpoint that it was made from")


def _check_double(first: TensorSource, second: TensorSource, named: str | None) -> None:
    """Let a tensor be in two files where loaders agree on it: the later file, or the same bytes in both."""
    if named == Path(second.file).name:
        return
    if (first.dtype, first.shape) == (second.dtype, second.shape) and _same_bytes(first, second):
        return
    says = f"the index names {named}, transformers reads {Path(second.file).name}" if named else "no index says which"
    raise CheckpointError(
        f"{second.name}: in both {first.file} and {second.file}, with different values, and {says}; expected in one: "
        "remove the file that does not belong to the model, or download the index (model.safetensors.index.json)"
    )


def _same_bytes(first: TensorSource, second: TensorSource) -> bool:
    with open(first.file, "rb") as one, open(second.file, "rb") as other:
        one.seek(first.offset)
        other.seek(second.offset)
        for start in range(0, first.nbytes, _COMPARED_AT_ONCE):
            count = min(_COMPARED_AT_ONCE, first.nbytes - start)
            if one.read(count) != other.read(count):
                return False
    return first.nbytes == second.nbytes


def read_header(path: Path) -> list[TensorSource]:
    """Return the tensors of one safetensors file, each checked against the file's size."""
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _HEADER_LIMIT):
                refuse_other_kind(path)
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
    end, gap = 8 + length, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise CheckpointError(f"{path}: {tensor.name} overlaps the tensor before it")
        if tensor.offset > end and not gap:
            gap = f"{tensor.offset - end:,} bytes before {tensor.name}"
        end = tensor.offset + tensor.nbytes
    if end < size and not gap:
        gap = f"{size - end:,} bytes after the last tensor"
    if gap:
        raise CheckpointError(f"{path}: {gap} are no tensor's; {_DAMAGED}")
    return tensors


def _tensor(path: Path, base: int, size: int, name: str, entry: Any) -> TensorSource:
    where = f"{path}: {name!r}"
    if not FILE_NAME.fullmatch(name) or ".." in name:
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
    known = ITEM_BYTES | {other: np.dtype(kind).itemsize for other, kind in OTHER_DTYPES.items()}
    expected = math.prod(shape) * known.get(dtype, 0)
    if dtype in known and expected != end - begin:
        raise CheckpointError(f"{where}: {dtype} {shape} needs {expected:,} bytes, the header gives {end - begin:,}")
    return TensorSource(name, dtype, tuple(shape), str(path), base + begin, end - begin)
