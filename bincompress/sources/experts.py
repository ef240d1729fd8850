"""Which 3-D tensors hold the matrices of all experts of a layer? Each expert's part is a matrix of its own to all else.

transformers 5 stores them so: gate_up_proj (experts, gate's and up's rows, columns) and down_proj (experts, rows,
columns). Rows are contiguous, so a part is read like any other tensor; of gpt-oss columns come first (see turned.py).
`export` puts the parts together again.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.sources.multimodal import text_config
from bincompress.sources.turned import matrix_of, whole_of
from bincompress.tensors.weight import TensorSource

# By model_type: how the name of a 3-D tensor ends, and those of each expert's parts.
_USUAL: dict[str, tuple[str, ...]] = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
}
_FUSED: dict[object, dict[str, tuple[str, ...]]] = {
    "qwen2_moe": _USUAL,
    "qwen3_moe": _USUAL,
    "olmoe": _USUAL,
    "gpt_oss": _USUAL,
    "qwen3_next": _USUAL,
    "qwen3_5_moe_text": _USUAL,
    "lfm2_moe": {
        "feed_forward.experts.gate_up_proj": (
            "feed_forward.experts.{expert}.w1.weight",
            "feed_forward.experts.{expert}.w3.weight",
        ),
        "feed_forward.experts.down_proj": ("feed_forward.experts.{expert}.w2.weight",),
    },
    "glm4_moe": _USUAL,
    "granitemoe": {
        "block_sparse_moe.input_linear.weight": (
            "block_sparse_moe.experts.{expert}.gate_proj.weight",
            "block_sparse_moe.experts.{expert}.up_proj.weight",
        ),
        "block_sparse_moe.output_linear.weight": ("block_sparse_moe.experts.{expert}.down_proj.weight",),
    },
    "mixtral": {
        "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.w1.weight", "mlp.experts.{expert}.w3.weight"),
        "mlp.experts.down_proj": ("mlp.experts.{expert}.w2.weight",),
    },
}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TURNED = ("gpt_oss",)  # of which the columns come first, and the rows of the parts take turns
_INNER = dict.fromkeys(
    ("mixtral", "gpt_oss", "olmoe", "granitemoe"), "intermediate_size"
)  # which field has an expert's inner rows


def fused_experts(config: Mapping[str, Any], tensors: Iterable[TensorSource]) -> tuple[str, ...]:
    """Return the names of the 3-D tensors that `split_experts` takes apart, sorted."""
    return tuple(sorted(tensor.name for tensor in tensors if _parts(config, tensor.name) and len(tensor.shape) == 3))


def split_experts(config: Mapping[str, Any], tensors: Iterable[TensorSource]) -> list[TensorSource]:
    """Return the tensors, those that hold the matrices of all experts as these matrices.

    config: config.json. Raises CheckpointError where such a tensor has not the sizes that config.json gives, or where
    an expert's matrix is there twice.
    """
    config = text_config(config)
    given = list(tensors)
    found: list[TensorSource] = []
    for tensor in given:
        parts = _parts(config, tensor.name)
        if not parts or len(tensor.shape) != 3:
            found.append(tensor)
            continue
        if tensor.encoding is not None and config["model_type"] not in _TURNED:
            raise CheckpointError(
                f"{tensor.name}: experts in one 3-D tensor stored as {tensor.encoding.format} are not read; expected "
                "BF16, F16 or F32, or a matrix for each expert"
            )
        _check_shape(config, tensor, len(parts))
        found += _split(config, tensor, parts)
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
    kind = text_config(config).get("model_type")
    known = _FUSED.get(kind, {}) if isinstance(kind, str) else {}
    return next((end for end in known if name == end or name.endswith("." + end)), "")


def _parts(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    end = _end(config, name)
    return _FUSED[text_config(config)["model_type"]][end] if end else ()


def _check_shape(config: Mapping[str, Any], tensor: TensorSource, parts: int) -> None:
    """Raise CheckpointError where the axes are not those of transformers 5."""
    count = next(filter(None, map(config.get, _COUNTS)), tensor.shape[0])
    inner = config.get(_INNER.get(config["model_type"], "moe_intermediate_size"))
    hidden = config.get("hidden_size")
    high, wide = (2, 1) if config["model_type"] in _TURNED else (1, 2)  # axes of rows and columns
    axes = [count, count, count]
    if parts == 2:
        axes[high] = 2 * inner if isinstance(inner, int) else tensor.shape[high]
        axes[wide] = hidden or tensor.shape[wide]
    else:
        axes[high], axes[wide] = hidden or tensor.shape[high], inner or tensor.shape[wide]
    expected = tuple(axes)
    if tensor.shape != expected or not math.prod(tensor.shape) or tensor.shape[high] % parts:
        turned = (expected[0], expected[2], expected[1]) == tensor.shape
        hint = "rows and columns are exchanged" if turned else "are the weights and config.json of one model?"
        raise CheckpointError(
            f"{tensor.name}: shape {list(tensor.shape)} contradicts config.json, which gives {list(expected)} "
            f"(experts, {'columns, rows' if high == 2 else 'rows, columns'}): {hint}"
        )


def together(config: Mapping[str, Any], parts: Sequence[NDArray[Any]], count: int) -> NDArray[Any]:
    """Return the 3-D tensor of the matrices of `count` experts, in the order of `experts_of`."""
    if text_config(config).get("model_type") in _TURNED:
        return whole_of(parts, count)
    joined = np.concatenate(parts)
    return joined.reshape(count, len(joined) // count, -1)


def _split(config: Mapping[str, Any], tensor: TensorSource, parts: tuple[str, ...]) -> list[TensorSource]:
    """Return the matrices of every expert, each with its place in the file."""
    experts, height, cols = tensor.shape
    prefix = tensor.name[: -len(_end(config, tensor.name))]
    if config["model_type"] in _TURNED:
        return [
            matrix_of(tensor, prefix + part.format(expert=expert), expert, number, len(parts))
            for expert in range(experts)
            for number, part in enumerate(parts)
        ]
    rows, nbytes = height // len(parts), tensor.nbytes // (experts * len(parts))
    return [
        replace(
            tensor, name=prefix + part.format(expert=expert), shape=(rows, cols),
            offset=tensor.offset + (expert * len(parts) + number) * nbytes, nbytes=nbytes,
        )
        for expert in range(experts)
        for number, part in enumerate(parts)
    ]  # fmt: skip
