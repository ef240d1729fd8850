"""Which tensors of a checkpoint are quantized, and what do they stand for? quantization_config of config.json decides.

Each becomes one tensor with the name and the values that it has in the unquantized model. A form that is not
understood, or that contradicts quantization_config, is refused by name, before any work.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bincompress.errors import CheckpointError
from bincompress.sources.mapping import map_floats, map_items
from bincompress.sources.quantized import compressed_tensors, gptq, methods
from bincompress.sources.quantized.declared import WHERE, Reading
from bincompress.sources.quantized.methods import Quantized
from bincompress.tensors.weight import TensorSource

_METHODS: dict[str, Callable[[Mapping[str, Any], Mapping[str, TensorSource], bool], Quantized]] = {
    "fp8": methods.fp8,
    "fbgemm_fp8": methods.fp8,
    "compressed-tensors": compressed_tensors.find,
    "gptq": methods.gptq,
    "awq": methods.awq,
    "mxfp4": methods.mxfp4,
}
# Fields that change no value of a weight: how it was quantized, with which kernel it is to run, what was left out.
_IDLE = (
    "quant_method", "activation_scheme", "activation_scale_ub", "scale_fmt", "dequantize", "sym", "true_sequential",
    "damp_percent", "damp_auto_increment", "static_groups", "model_seqlen", "block_name_to_quantize", "dataset",
    "modules_in_block_to_quantize", "tokenizer", "cache_block_outputs", "max_input_length", "exllama_config",
    "use_exllama", "disable_exllama", "use_cuda_fp16", "batch_size", "pad_token_id", "meta", "lm_head", "backend",
    "model_name_or_path", "model_file_base_name", "quantizer", "mse", "act_group_aware", "do_fuse",
    "fuse_max_seq_len", "modules_to_fuse", "global_compression_ratio", "module_name_preceding_first_block",
    "version", "nsamples", "seqlen", "iters", "low_gpu_mem_usage", "autoround_version",
)  # fmt: skip


def unquantized(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSource]
) -> tuple[dict[str, Any], dict[str, TensorSource], tuple[str, ...]]:
    """Return config.json, tensors and notes of the model that a quantized checkpoint stands for.

    A checkpoint that is not quantized, or by a method that is not read, comes back as it is. Raises CheckpointError.
    """
    declared = config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    if not isinstance(declared, Mapping) or not isinstance(method, str):
        return dict(config), dict(tensors), ()
    if method not in _METHODS:
        meant = {_spelled(known): known for known in _METHODS}.get(_spelled(method))
        if meant is not None:  # transformers knows this spelling alone
            raise CheckpointError(f"{WHERE}: quant_method = {method!r:.60} is not known; expected {meant!r}")
        return dict(config), dict(tensors), ()
    local = all(Path(tensor.file).is_file() for tensor in tensors.values())
    reading = Reading(declared)
    found = _METHODS[method](reading, tensors, local)
    left = reading.left_over(_IDLE)
    if left:
        found.notes.append(f"fields of quantization_config that are not read: {', '.join(left)}")
    if not found.tensors:
        raise CheckpointError(
            f"{WHERE} says {method}, but no tensor is quantized so; remove it from config.json if the weights are plain"
        )
    kept = {name: tensor for name, tensor in tensors.items() if name not in found.used}
    for tensor in found.tensors:
        if tensor.name in kept:
            first = tensor.encoding.parts[0][1].name if tensor.encoding else ""
            raise CheckpointError(f"{tensor.name}: there beside {first}, of which it is made; expected one of them")
        kept[tensor.name] = tensor
    if local:
        for tensor in found.tensors:
            _check_values(tensor)
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    return rest, kept, (*formats_note(kept.values()), *found.notes)


def _spelled(method: str) -> str:
    return method.strip().lower().replace("_", "").replace("-", "")


def formats_note(tensors: Iterable[TensorSource]) -> tuple[str, ...]:
    """Return a line that says how many tensors are computed from what, where any are."""
    counts = Counter(tensor.encoding.format for tensor in tensors if tensor.encoding is not None)
    if not counts:
        return ()
    listed = ", ".join(f"{count} tensors from {name}" for name, count in sorted(counts.items()))
    return (f"the source is quantized, and its weights are dequantized as they are read: {listed}",)


def _check_values(tensor: TensorSource) -> None:
    """Raise CheckpointError where a scale is not finite or a group is not there; both would spoil whole blocks."""
    assert tensor.encoding is not None
    parts = dict(tensor.encoding.parts)
    scales = parts.get("scale") or parts["scales"]
    if scales.dtype == "U8":
        finite = map_items(scales).max(initial=0) < 255  # 255 stands for NaN
    else:
        finite = bool(np.isfinite(map_floats(scales)).all())
    if not finite:
        raise CheckpointError(f"{scales.name}: holds a scale that is not a finite number; is the checkpoint damaged?")
    if "group" in parts:
        groups = map_items(parts["group"])
        count = scales.shape[0] if tensor.encoding.decoder == "gptq" else scales.shape[-1]
        if groups.size and not 0 <= groups.min() <= groups.max() < count:
            raise CheckpointError(gptq.outside(parts["group"].name, groups, count))
