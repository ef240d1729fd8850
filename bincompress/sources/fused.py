"""Which matrices does a checkpoint store as one, one below the other? Each is a matrix of its own to all that follows.

Rows are contiguous, so a part is read like any other tensor. `export` puts the parts together again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bincompress.errors import CheckpointError
from bincompress.sources.multimodal import text_config
from bincompress.tensors.weight import TensorSource

_GATE_UP: dict[str, tuple[str, ...]] = {
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
# By model_type: how the name of a fused matrix ends, and those of its parts.
_FUSED: dict[object, dict[str, tuple[str, ...]]] = {
    "phi3": {
        "self_attn.qkv_proj.weight": (
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
        ),
        **_GATE_UP,
    },
    "glm": _GATE_UP,
    "glm4": _GATE_UP,
    "granitemoehybrid": {
        "shared_mlp.input_linear.weight": ("shared_mlp.gate_proj.weight", "shared_mlp.up_proj.weight"),
    },
}


def split(config: Mapping[str, Any], tensors: Iterable[TensorSource]) -> dict[str, TensorSource]:
    """Return tensors by name in their order, those that are fused in this model_type as their parts.

    config: config.json. Raises CheckpointError where a fused matrix has not the rows that config.json gives its parts.
    """
    found: dict[str, TensorSource] = {}
    for tensor in tensors:
        found |= {part.name: part for part in _parts(config, tensor)}
    return dict(sorted(found.items()))


def fused_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the names that the checkpoint has, each with those of its parts among `names`; usually itself alone.

    A fused matrix of which a part is missing is not put together.
    """
    whole: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    for end, ends in _of(config).items():
        for prefix in [name.removesuffix(ends[0]) for name in whole if name.endswith(ends[0])]:
            parts = tuple(prefix + part for part in ends)
            if prefix + end not in whole and all(part in whole for part in parts):
                for part in parts:
                    del whole[part]
                whole[prefix + end] = parts
    return dict(sorted(whole.items()))


def _of(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    kind = text_config(config).get("model_type")
    return _FUSED.get(kind, {}) if isinstance(kind, str) else {}


def _parts(config: Mapping[str, Any], tensor: TensorSource) -> list[TensorSource]:
    for end, ends in _of(config).items():
        if not tensor.name.endswith(end) or len(tensor.shape) != 2:
            continue
        rows, cols = tensor.shape
        counts = _rows(config, len(ends))
        if sum(counts) != rows or min(counts) < 1:
            raise CheckpointError(
                f"{tensor.name}: shape {list(tensor.shape)} contradicts config.json, which gives its parts "
                f"{' + '.join(map(str, counts))} rows; are the weights and config.json of one model?"
            )
        prefix, row_bytes = tensor.name.removesuffix(end), tensor.nbytes // rows
        starts = [sum(counts[:number]) for number in range(len(counts))]
        return [
            _part(tensor, prefix + part, start, (count, cols), row_bytes)
            for part, start, count in zip(ends, starts, counts, strict=True)
        ]
    return [tensor]


def _part(tensor: TensorSource, name: str, start: int, shape: tuple[int, int], row_bytes: int) -> TensorSource:
    """Return the rows of a matrix from `start` on as a matrix of its own."""
    found = replace(tensor, name=name, shape=shape, nbytes=shape[0] * row_bytes)
    if tensor.encoding is not None:
        return replace(found, encoding=replace(tensor.encoding, first_row=tensor.encoding.first_row + start))
    return replace(found, offset=tensor.offset + start * row_bytes)


def _rows(config: Mapping[str, Any], parts: int) -> list[int]:
    """Return the rows of queries, keys and values, or of gate and up."""
    config = text_config(config)
    if parts == 2:
        inner = "shared_intermediate_size" if config.get("model_type") == "granitemoehybrid" else "intermediate_size"
        return [_number(config, inner)] * 2
    heads = _number(config, "num_attention_heads")
    kv_heads = _number(config, "num_key_value_heads") or heads
    head_dim = _number(config, "head_dim") or _number(config, "hidden_size") // max(1, heads)
    return [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]


def _number(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    return value if type(value) is int and value > 0 else 0
