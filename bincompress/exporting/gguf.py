"""How does a store become a GGUF file? Checked before the work, written as it is read, whole or not at all."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bincompress.errors import StoreError
from bincompress.exporting import metadata as of_config
from bincompress.exporting.tensors import GgufType, Tensor, Ternary, chunks, named_tensors, typed
from bincompress.exporting.tokenizer import tokenizer_metadata
from bincompress.model.store_source import store_config
from bincompress.process.out_file import refuse_unwritable
from bincompress.sources.gguf.blocks import gguf_package
from bincompress.sources.gguf.header import read_header
from bincompress.store.files import is_local
from bincompress.store.new_file import explained, new_file
from bincompress.store.store import Store

OnTensor = Callable[[str, int], None]  # a tensor's name, and bytes written or weights looked through
_ALIGNMENT = 32
_MOST_NAMED = 3
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "Q1_0": 27}  # as llama.cpp has them


@dataclass(frozen=True)
class GgufFile:
    """What came of writing a GGUF file."""

    file: str
    nbytes: int
    types: dict[str, int]  # tensors by type
    exact: int  # matrices whose every weight is that of the store
    matrices: int
    notes: tuple[str, ...]  # what the file does not say, or says otherwise


def names_gguf(path: str | Path) -> bool:
    """Return whether a path names a GGUF file."""
    return str(path).lower().endswith(".gguf")


def export_gguf(
    store: Store,
    file: str | Path,
    *,
    gguf_type: GgufType = "f16",
    ternary: Ternary = "tq2_0",
    overwrite: bool = False,
    on_tensor: OnTensor = lambda name, done: None,
) -> GgufFile:
    """Write a finished store as one GGUF file with tokenizer and chat template, and return what came of it.

    Matrices of -d and d in each 128 columns become Q1_0, those of -d, 0 and d in each 256 `ternary`, both exactly.
    Other packed ones become `gguf_type`: F16, rounded to nearest, or Q8_0. What was kept stays in its dtype, unless
    Q8_0 is asked for. Raises StoreError, before the work, where GGUF cannot hold the model, or the file is there and
    `overwrite` is not given; CheckpointError where the gguf package is missing.
    """
    check_target(file, overwrite)
    refuse_unwritable(Path(file), "TARGET", makes_folders=True)
    gguf_package()
    assets = store.read_assets()
    config = store_config(store, assets)
    arch, family = of_config.family_of(config)
    found, factors = of_config.metadata_of(config, _raw(store, assets))
    named = named_tensors(store, config, family)
    of_config.check(config, found, {*factors, *(tensor.name for tensor in named)}, factors)
    tokens, notes = tokenizer_metadata(arch, assets, config.vocab)
    tensors = [typed(store, tensor, gguf_type, ternary) for tensor in named]
    tensors += [Tensor(name, (), values.shape) for name, values in factors.items()]
    with explained(str(file)), new_file(str(file)) as partial:
        _write_header(partial, {**found, **_general(store, tensors), **tokens}, tensors)
        with open(partial, "ab") as out:
            _pad(out)
            for tensor in tensors:
                parts = [factors[tensor.name].view(np.uint8)] if not tensor.parts else chunks(store, tensor)
                for part in parts:
                    out.write(part.data)
                    on_tensor(tensor.name, part.nbytes)
                _pad(out)
        nbytes = _read_back(partial, tensors)
        check_target(file, overwrite)
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    kinds = Counter(tensor.type for tensor in tensors)
    exact = sum(tensor.exact for tensor in matrices)
    if arch == "phi3" and config.windows[0] is not None:
        notes = [*notes, f"llama.cpp does not use the window of {config.windows[0]:,} positions of this architecture"]
    notes = [*notes, *_not_written(store, tensors)]
    return GgufFile(str(file), nbytes, dict(sorted(kinds.items())), exact, len(matrices), tuple(notes))


def _not_written(store: Store, tensors: list[Tensor]) -> list[str]:
    """Return a note on the store's tensors that the decoder does not use."""
    used = {part for tensor in tensors for part in tensor.parts}
    others = [name for name in store.tensors() if name not in used]
    shown = ", ".join(others[:_MOST_NAMED]) + (" ..." if len(others) > _MOST_NAMED else "")
    return [f"{len(others)} tensors that the decoder does not use are not written: {shown}"] if others else []


def _general(store: Store, tensors: list[Tensor]) -> dict[str, Any]:
    """Return the keys that every GGUF file has; its type is the one that most bytes are in."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.nbytes
    return {
        "general.type": "model",
        "general.name": _name(store),
        "general.file_type": _FILE_TYPES[sizes.most_common(1)[0][0]],
        "general.quantization_version": 2,
    }


def check_target(file: str | Path, overwrite: bool) -> None:
    """Raise StoreError where no file may be written under this name."""
    if not is_local(str(file)):
        raise StoreError(f"{file}: a GGUF file is written to a local path; copy it from there")
    path = Path(file)
    if path.is_dir():
        raise StoreError(f"{file}: is a folder; give the name of a file in it, such as {path / 'model.gguf'}")
    if path.exists() and not overwrite:
        raise StoreError(f"{file}: is there; nothing was changed: --overwrite replaces it")
    if path.is_file() and not _may_be_replaced(path):
        raise StoreError(f"{file}: is there, and is no GGUF file; nothing was changed: choose another name")


def _may_be_replaced(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"GGUF", b"")


def _raw(store: Store, assets: Mapping[str, bytes]) -> dict[str, Any]:
    raw = store.attributes.get("config")
    return raw if isinstance(raw, dict) else dict(json.loads(assets.get("config.json", b"{}")))


def _name(store: Store) -> str:
    source = store.attributes.get("source")
    found = str(source.get("id", "")) if isinstance(source, dict) else ""
    return found.rstrip("/").rpartition("/")[2] or Path(store.url).name


def writer_of(path: Path, metadata: Mapping[str, Any]) -> Any:
    """Return the gguf package's writer of a file, which has been given the metadata."""
    writer = gguf_package().GGUFWriter(str(path), metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    return writer


def _write_header(path: Path, metadata: Mapping[str, Any], tensors: list[Tensor]) -> None:
    """Write all but the tensors' bytes, by the gguf package."""
    gguf, writer = gguf_package(), writer_of(path, metadata)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _pad(out: Any) -> None:
    out.write(bytes(-out.tell() % _ALIGNMENT))


def _read_back(path: Path, tensors: list[Tensor]) -> int:
    """Return the bytes of a file whose header says what was written; raises StoreError where it does not."""
    header = read_header(path)
    end = max((header.data + tensor.offset for tensor in header.tensors), default=header.data)
    written = {tensor.name: tensor.shape for tensor in header.tensors}
    last = tensors[-1]
    if written != {tensor.name: tensor.shape for tensor in tensors} or header.size < end + last.nbytes:
        raise StoreError(f"{path}: what was read back differs from what was written; is the disk full?")
    return header.size
