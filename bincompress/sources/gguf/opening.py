"""A GGUF file as a checkpoint: tensors, config.json, tokenizer and chat template, from one file or its parts."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.sources.checkpoint import Checkpoint
from bincompress.sources.fused import split
from bincompress.sources.gguf.blocks import PLAIN, gguf_package, type_of
from bincompress.sources.gguf.config import config_of
from bincompress.sources.gguf.header import GgufTensor, Header, read_header
from bincompress.sources.gguf.names import FAMILIES, ROPE, Family, heads_in_turns, name_of, one_more
from bincompress.sources.gguf.tokenizer import tokenizer_files
from bincompress.sources.mapping import map_floats
from bincompress.tensors.weight import Encoding, TensorSource, encoded

SUFFIX = ".gguf"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 1000


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file by its name."""
    return path.name.lower().endswith(SUFFIX) and path.is_file()


def open_gguf(path: Path) -> Checkpoint:
    """Read the header of a GGUF file, and of its other parts where it is the first of several.

    Raises CheckpointError where it is truncated, contradicts itself, or is of an architecture that is not read.
    """
    gguf_package()
    headers = _parts(path)
    metadata = headers[0].metadata
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{path}: architecture {arch!r:.60} is not read from GGUF files; known: {known}")
    family = FAMILIES[arch]
    found: dict[str, tuple[GgufTensor, TensorSource]] = {}
    for header in headers:
        for tensor, source in _sources(header):
            if tensor.name in found:
                raise CheckpointError(f"{header.path}: the tensor {tensor.name!r} is in another part of the model too")
            found[tensor.name] = (tensor, source)
    if "token_embd.weight" not in found:
        raise CheckpointError(f"{path}: token_embd.weight is missing; expected the tensors of a whole model")
    vocab = found["token_embd.weight"][0].shape[0]
    config, notes = config_of(family, arch, metadata, vocab, set(found), _rope_factors(found))
    tensors = [_named(family, config, *found[name]) for name in found if name not in ROPE]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocab:
        raise CheckpointError(f"{path}: {len(tokens):,} tokens; token_embd.weight has {vocab:,} rows")
    made = {"config.json": json.dumps(config, indent=2).encode(), **tokenizer_files(arch, metadata)}
    counts = Counter(tensor.type for tensor, _ in found.values())
    listed = ", ".join(sorted(f"{count} tensors of {_type_name(kind)}" for kind, count in counts.items()))
    note = f"a GGUF file: {listed}; quantized ones are dequantized as they are read"
    return Checkpoint(path.parent, path.stem, "", config, split(config, tensors), (note, *notes), made, path)


def _type_name(number: int) -> str:
    kind = type_of(number)
    return kind[0] if kind is not None else str(number)


def _parts(path: Path) -> list[Header]:
    """Return the headers of a file and, where it is the first of several, of the others."""
    first = read_header(path)
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return [first]
    match = _PART.fullmatch(path.name)
    if type(count) is not int or not 1 < count <= _MOST_PARTS or match is None or int(match[3]) != count:
        raise CheckpointError(f"{path}: one of {count!r:.20} parts; expected a name like model-00001-of-00002.gguf")
    if first.metadata.get("split.no") != 0 or int(match[2]) != 1:
        raise CheckpointError(
            f"{path}: part {int(match[2])} of {count}; give the first, {match[1]}-00001-of-{match[3]}.gguf"
        )
    paths = [path.parent / f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(2, count + 1)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        raise CheckpointError(f"{path.parent / missing[0]}: missing; {path.name} is one of {count} parts")
    headers = [first, *(read_header(other) for other in paths)]
    total = first.metadata.get("split.tensors.count")
    held = sum(len(header.tensors) for header in headers)
    if total is not None and total != held:
        raise CheckpointError(f"{path}: its {count} parts hold {held} tensors, expected {total!r:.20}")
    return headers


def _sources(header: Header) -> list[tuple[GgufTensor, TensorSource]]:
    """Return a file's tensors with the bytes that each is in; raises CheckpointError where they cannot be."""
    found = []
    for tensor in header.tensors:
        kind = type_of(tensor.type)
        where = f"{header.path}: {tensor.name!r:.80}"
        if kind is None:
            raise CheckpointError(f"{where}: tensors of type {tensor.type} are not read by this version of gguf")
        name, weights, size = kind
        if tensor.shape[-1] % weights:
            raise CheckpointError(f"{where}: {tensor.shape[-1]} columns; {name} has blocks of {weights}")
        nbytes = math.prod(tensor.shape) // weights * size
        start = header.data + tensor.offset
        if tensor.offset % header.alignment:
            raise CheckpointError(f"{where}: begins at byte {tensor.offset:,}, no multiple of {header.alignment}")
        if start + nbytes > header.size:
            raise CheckpointError(
                f"{where}: bytes {start:,} to {start + nbytes:,} lie outside the {header.size:,} of the file "
                "(truncated download?)"
            )
        shape = tensor.shape if name in PLAIN else (nbytes,)
        found.append(
            (tensor, TensorSource(tensor.name, name if name in PLAIN else "U8", shape, str(header.path), start, nbytes))
        )
    end, before = 0, ""
    for _, source in sorted(found, key=lambda pair: pair[1].offset):
        if source.offset < end:
            raise CheckpointError(f"{header.path}: {source.name!r:.80} overlaps {before!r:.80}")
        end, before = source.offset + source.nbytes, source.name
    return found


def _rope_factors(found: dict[str, tuple[GgufTensor, TensorSource]]) -> dict[str, NDArray[Any]]:
    """Return the values of the tensors of rotary embeddings that are there."""
    factors = {}
    for name in [name for name in ROPE if name in found]:
        tensor, source = found[name]
        if source.dtype != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 1 << 16:
            raise CheckpointError(f"{name}: {source.dtype} {list(tensor.shape)}; expected a short list of F32")
        factors[name] = map_floats(source)
        if not np.isfinite(factors[name]).all() or (factors[name] <= 0).any():
            raise CheckpointError(f"{name}: holds a factor that is not a positive number")
    return factors


def _named(family: Family, config: dict[str, Any], tensor: GgufTensor, source: TensorSource) -> TensorSource:
    """Return a tensor under its name in a checkpoint, with what has to be done to its values."""
    name = name_of(family, tensor.name)
    heads = heads_in_turns(family, name, config["num_attention_heads"], config["num_key_value_heads"])
    if heads and len(tensor.shape) == 1 and source.dtype not in PLAIN:
        raise CheckpointError(f"{tensor.name!r}: a quantized bias of heads in another order, which is not read")
    rows = tensor.shape[0] if len(tensor.shape) == 1 and heads else math.prod(tensor.shape[:-1])
    if heads and (rows % heads or rows // heads % 2):
        raise CheckpointError(f"{tensor.name!r}: {rows} rows; expected those of {heads} heads with an even number each")
    minus = int(one_more(family, name))
    if source.dtype in PLAIN and not heads and not minus:
        return TensorSource(name, source.dtype, tensor.shape, source.file, source.offset, source.nbytes)
    kind = type_of(tensor.type)
    assert kind is not None  # as _sources found
    options = (("type", kind[0]), ("rows", rows), ("heads", heads), ("minus", minus))
    dtype = source.dtype if source.dtype in ("F16", "BF16") and not minus else "F32"
    bare = TensorSource(source.name, "U8", (source.nbytes,), source.file, source.offset, source.nbytes)
    return encoded(name, dtype, tensor.shape, Encoding(f"GGUF {kind[0]}", "gguf", (("data", bare),), options))
