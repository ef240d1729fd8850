"""What is in a Hugging Face checkpoint? Headers only, everything checked before anything is believed.

Files are untrusted: header and tensor sizes are held against the file before memory is taken, and no name leads out
of the folder.
"""

import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bincompress.errors import CheckpointError
from bincompress.sources.assets import ASSETS as ASSETS
from bincompress.sources.assets import read_assets
from bincompress.sources.experts import fused_experts, split_experts
from bincompress.sources.files import ADAPTER, FILE_NAME, index_notes, weight_files
from bincompress.sources.files import INDEX as INDEX
from bincompress.sources.fused import split
from bincompress.sources.json_files import read_json as read_json
from bincompress.sources.json_files import refuse_pointer
from bincompress.tensors.weight import TensorSource, Weight

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
# Tensors of other dtypes are kept as they are where the model does not need them. (4-bit and smaller floats have no
# whole number of bytes an item, so their sizes are not checked.)
OTHER_DTYPES: dict[str, Any] = {
    "BOOL": np.uint8, "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32,
    "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F64": np.float64, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip
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
    fused: tuple[str, ...] = ()  # 3-D tensors of which `tensors` has the experts' matrices

    def assets(self) -> dict[str, bytes]:
        """Return the small files that belong to the model (config, tokenizer, templates) by name."""
        return read_assets(self.folder)


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
    stored = tensors.values()
    return Checkpoint(
        folder, name or folder.resolve().name, revision, config, split(config, split_experts(config, stored)),
        tuple(notes), fused_experts(config, stored),
    )  # fmt: skip


def _refuse_other_folder(folder: Path) -> None:
    """Raise CheckpointError for a folder that is no checkpoint, but known to be something else."""
    if (folder / ADAPTER).exists():
        weight_files(folder)
    commits = sorted(path for pattern in ("snapshots/*", "models--*/snapshots/*") for path in folder.glob(pattern))
    if commits:
        raise CheckpointError(f"{folder}: a folder of the Hub's cache; give the model in it, such as {commits[0]}")


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


def read_weight(source: TensorSource) -> Weight:
    """Map one tensor's items into memory, read-only: floats as bit patterns; one dimension becomes one row.

    Raises CheckpointError where the dtype is neither a float's nor one of OTHER_DTYPES, or the file is shorter than its
    header said.
    """
    if source.dtype not in ITEM_BYTES and source.dtype not in OTHER_DTYPES:
        known = ", ".join([*ITEM_BYTES, *OTHER_DTYPES])
        raise CheckpointError(f"{source.name}: dtype {source.dtype}; expected one of {known}")
    item = OTHER_DTYPES.get(source.dtype, np.uint32 if source.dtype == "F32" else np.uint16)
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
