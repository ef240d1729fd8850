"""Which 3-D tensors hold the matrices of all experts of a layer? Each expert's part is a matrix of its own to all else.

transformers 5 stores them so: gate_up_proj (experts, gate's and up's rows, columns) and down_proj (experts, rows,
columns). Rows are contiguous, so a part is read like any other tensor. `export` puts the parts together again.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bincompress.errors import CheckpointError
from bincompress.tensors.weight import TensorSource

# By model_type: how the name of a 3-D tensor ends, and those of each expert's parts.
_FUSED: dict[object, dict[str, tuple[str, ...]]] = {
    "qwen3_moe": {
        "mlp.experts.gate_up_proj": (
            "mlp.experts.{expert}.gate_proj.weight",
            "mlp.experts.{expert}.up_proj.weight",
        ),
        "mlp.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
    },
    "mixtral": {
        "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.w1.weight", "mlp.experts.{expert}.w3.weight"),
        "mlp.experts.down_proj": ("mlp.experts.{expert}.w2.weight",),
    },
}


def fused_experts(config: Mapping[str, Any], tensors: Iterable[TensorSource]) -> tuple[str, ...]:
    """Return the names of the 3-D tensors that `split_experts` takes apart, sorted."""
    return tuple(sorted(tensor.name for tensor in tensors if _parts(config, tensor.name) and len(tensor.shape) == 3))


def split_experts(config: Mapping[str, Any], tensors: Iterable[TensorSource]) -> list[TensorSource]:
    """Return the tensors, those that hold the matrices of all experts as these matrices.

    config: config.json. Raises CheckpointError where such a tensor has not the sizes that config.json gives, or where
    an expert's matrix is there twice.
    """
    given = list(tensors)
    found: list[TensorSource] = []
    for tensor in given:
        parts = _parts(config, tensor.name)
        if not parts or len(tensor.shape) != 3:
            found.append(tensor)
            continue
        if tensor.encoding is not None:
            raise CheckpointError(
                f"{tensor.name}: experts in one 3-D tensor stored as {tensor.encoding.format} are not read; expected "
                "BF16, F16 or F32, or a matrix for each expert"
            )
        _check_shape(config, tensor, len(parts))
        found += _split(tensor, parts)
    if len(found) != len(given):
        names: set[str] = set()
        for tensor in found:
            if tensor.name in names:
                raise CheckpointError(
                    f"{tensor.name}: stored both as a matrix and as a part of a 3-D tensor; expected one of the two"
                )
            names.add(tensor.name)
    return found


def experts_of(config: Mapping[str, Any], fused: Sequence[object], names: Iterable[str]) -> dict[str, list[str]]:
    """Return which of these names the parts of each 3-D tensor are, in their order; fused: as `fused_experts` gave it.

    A tensor of which a part is missing, or whose name is none of a 3-D tensor, is left out.
    """
    there = set(names)
    found: dict[str, list[str]] = {}
    for name in fused:
        ends = _parts(config, name) if isinstance(name, str) else ()
        if not isinstance(name, str) or not ends:
            continue
        prefix = name[: -len(_end(config, name))]
        number = re.compile(re.escape(prefix + ends[0]).replace(r"\{expert\}", r"(\d{1,6})"))
        count = sum(number.fullmatch(other) is not None for other in there)
        parts = [prefix + end.format(expert=expert) for expert in range(count) for end in ends]
        if parts and all(part in there for part in parts):
            found[name] = parts
    return found


def _end(config: Mapping[str, Any], name: str) -> str:
    """Return how the name of a 3-D tensor of experts ends; empty where it is none."""
    kind = config.get("model_type")
    known = _FUSED.get(kind, {}) if isinstance(kind, str) else {}
    return next((end for end in known if name == end or name.endswith("." + end)), "")


def _parts(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    end = _end(config, name)
    return _FUSED[config["model_type"]][end] if end else ()


def _check_shape(config: Mapping[str, Any], tensor: TensorSource, parts: int) -> None:
    """Raise CheckpointError where the axes are not those of transformers 5."""
    count = config.get("num_experts") or config.get("num_local_experts") or tensor.shape[0]
    inner = config.get("intermediate_size" if config["model_type"] == "mixtral" else "moe_intermediate_size")
    hidden = config.get("hidden_size")
    if parts == 2:
        expected = (count, 2 * inner if isinstance(inner, int) else tensor.shape[1], hidden or tensor.shape[2])
    else:
        expected = (count, hidden or tensor.shape[1], inner or tensor.shape[2])
    if tensor.shape != expected or not math.prod(tensor.shape) or tensor.shape[1] % parts:
        turned = (expected[0], expected[2], expected[1]) == tensor.shape
        hint = "rows and columns are exchanged" if turned else "are the weights and config.json of one model?"
        raise CheckpointError(
            f"{tensor.name}: shape {list(tensor.shape)} contradicts config.json, which gives {list(expected)} "
            f"(experts, rows, columns): {hint}"
        )


def _split(tensor: TensorSource, parts: tuple[str, ...]) -> list[TensorSource]:
    """Return the matrices of every expert, each with its place in the file."""
    experts, height, cols = tensor.shape
    prefix = tensor.name[: tensor.name.rindex("mlp.experts.")]
    rows, nbytes = height // len(parts), tensor.nbytes // (experts * len(parts))
    return [
        replace(
            tensor, name=prefix + part.format(expert=expert), shape=(rows, cols),
            offset=tensor.offset + (expert * len(parts) + number) * nbytes, nbytes=nbytes,
        )
        for expert in range(experts)
        for number, part in enumerate(parts)
    ]  # fmt: skip
