"""FP8, GPTQ, AWQ and MXFP4 as transformers knows them: tensors of a module, and the numbers of quantization_config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bincompress.errors import CheckpointError
from bincompress.sources.quantized import fp8 as fp8_format
from bincompress.sources.quantized import gptq as gptq_format
from bincompress.sources.quantized import mxfp4 as mxfp4_format
from bincompress.sources.quantized.declared import (
    FLOATS,
    WHERE,
    absent,
    block_words,
    check,
    names,
    one_of,
    pair,
    scale_shapes,
    whole,
)
from bincompress.sources.quantized.patterns import Patterns
from bincompress.tensors.weight import TensorSource

# Scales of what flows between matrices, which is not rounded here.
_OF_ACTIVATIONS = (
    ".input_scale", ".activation_scale", ".output_scale", ".input_scale_ub", ".k_scale", ".v_scale", ".q_scale",
    ".kv_scale", ".prob_output_scale", ".input_global_scale", ".input_zero_point", ".output_zero_point",
    ".k_zero_point", ".v_zero_point",
)  # fmt: skip
Tensors = Mapping[str, TensorSource]


@dataclass
class Quantized:
    """What was found: tensors that are computed, the names in the files that this uses up, and notes."""

    tensors: list[TensorSource] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def add(self, tensor: TensorSource) -> None:
        """Note a tensor and its parts."""
        assert tensor.encoding is not None
        self.tensors.append(tensor)
        self.used |= {part.name for _, part in tensor.encoding.parts}

    def drop_activations(self, tensors: Tensors) -> None:
        """Use up the scales of activations, and say so."""
        dropped = {name for name in tensors if name.endswith(_OF_ACTIVATIONS)}
        if dropped:
            self.used |= dropped
            self.notes.append(f"{len(dropped)} scales of activations are not used: activations are not rounded by them")


def required(tensors: Tensors, name: str, of: str) -> TensorSource:
    """Return a part; raises CheckpointError where it is missing."""
    if name not in tensors:
        raise CheckpointError(f"{name}: missing; {of} needs it to be dequantized (incomplete download?)")
    return tensors[name]


def check_left_out(declared: Mapping[str, Any], found: Quantized, *fields: str) -> None:
    """Raise CheckpointError where a module is quantized that quantization_config says is not."""
    patterns, left_out = Patterns(f"{WHERE}: {fields[0]}"), names(declared, *fields)
    for tensor in found.tensors:
        pattern = patterns.first(tensor.name.removesuffix(".weight"), left_out, regex_prefix=False)
        if pattern is not None:
            raise CheckpointError(
                f"{tensor.name}: is quantized, but {WHERE} says that it is not ({fields[0]}: {pattern!r:.60})"
            )


def fp8(declared: Mapping[str, Any], tensors: Tensors, local: bool) -> Quantized:
    """Return FP8 matrices: a scale a tensor or a row, or of each block where weight_block_size is given."""
    one_of(declared, "fmt", ("e4m3", "float8_e4m3fn", "float8_e4m3"), "e4m3")
    given = declared.get("weight_block_size")
    block = None if given is None else pair(given, "weight_block_size")
    found = Quantized()
    for name, weight in tensors.items():
        if weight.dtype.startswith("F8_"):
            scale = _fp8_scale(tensors, weight)
            rows, cols = weight.shape
            shapes = [[(rows, cols)], [(1, cols)]] if block is None else [[block]]
            sizes = [size for group in shapes for size in group if scale.shape in scale_shapes(rows, cols, size)]
            expected = [shape for group in shapes for size in group for shape in scale_shapes(rows, cols, size)]
            check(scale, FLOATS, expected, f"of {name} {list(weight.shape)}, by {WHERE}")
            what = f"FP8, {block_words(sizes[0], rows, cols)}"
            found.add(fp8_format.source_of(name, weight, scale, sizes[0], "F32", what))
    for name in tensors:
        if name.endswith((".weight_scale_inv", ".weight_scale")) and name not in found.used:
            of = tensors.get(name.rpartition(".")[0] + ".weight")
            dtype = "is missing" if of is None else f"is {of.dtype}"
            raise CheckpointError(f"{name}: a scale, but the weight that it belongs to {dtype}; expected F8_E4M3")
    check_left_out(declared, found, "modules_to_not_convert", "ignored_layers")
    found.drop_activations(tensors)
    return found


def _fp8_scale(tensors: Tensors, weight: TensorSource) -> TensorSource:
    """Return the scale of an FP8 matrix."""
    name = weight.name
    if weight.dtype != "F8_E4M3" or len(weight.shape) != 2 or not name.endswith(".weight"):
        raise CheckpointError(
            f"{name}: {weight.dtype} {list(weight.shape)}; of FP8, only matrices (.weight) of F8_E4M3 are read"
        )
    both = [name + end for end in ("_scale_inv", "_scale") if name + end in tensors]
    if len(both) == 2:
        raise CheckpointError(f"{both[1]}: beside {both[0]}; expected one scale for {name}")
    return required(tensors, both[0] if both else f"{name}_scale_inv", name)


def gptq(declared: Mapping[str, Any], tensors: Tensors, local: bool) -> Quantized:
    """Return matrices of GPTQ with 4 or 8 bits, both conventions of zero points, in any order of inputs."""
    bits = one_of(declared, "bits", (4, 8))
    size = whole(declared, "group_size", default=128, least=-1)
    stated = {declared[key] for key in ("checkpoint_format", "format") if isinstance(declared.get(key), str)}
    if len(stated) > 1:
        raise CheckpointError(f"{WHERE}: checkpoint_format and format contradict each other: {sorted(stated)}")
    layout = one_of({"checkpoint_format": next(iter(stated), None)}, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    absent(declared, "dynamic", "is_marlin_format", "rotation", "adapter", "extra_config")
    ordered = one_of(declared, "desc_act", (True, False), False)
    one_of(declared, "pack_dtype", ("int32",), "int32")
    found = Quantized()
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        weight = tensors[f"{module}.qweight"]
        if weight.dtype != "I32" or len(weight.shape) != 2 or not all(weight.shape):
            raise CheckpointError(f"{weight.name}: {weight.dtype} {list(weight.shape)}; expected a matrix of I32")
        inputs, outputs = weight.shape[0] * 32 // bits, weight.shape[1]
        width = inputs if size <= 0 else size
        count = -(-inputs // width)
        why = f"of {weight.name} {list(weight.shape)}, with {bits} bits and group_size {size}"
        parts = {
            "weight": weight,
            "zeros": check(
                required(tensors, f"{module}.qzeros", weight.name), ("I32",), [(count, outputs * bits // 32)], why
            ),
            "scales": check(required(tensors, f"{module}.scales", weight.name), FLOATS, [(count, outputs)], why),
        }
        if f"{module}.g_idx" in tensors:
            parts["group"] = check(tensors[f"{module}.g_idx"], ("I32", "I64"), [(inputs,)], why)
        elif ordered:
            required(tensors, f"{module}.g_idx", weight.name)
        groups = "one group" if count == 1 else f"groups of {width}"
        what = f"GPTQ {bits}-bit, {groups}{', in order of activations' if declared.get('desc_act') is True else ''}"
        found.add(gptq_format.gptq_source(f"{module}.weight", parts, bits, width, layout == "gptq", what))
    check_left_out(declared, found, "modules_to_not_convert")
    return found


def awq(declared: Mapping[str, Any], tensors: Tensors, local: bool) -> Quantized:
    """Return matrices of AWQ with 4 bits in the packing of "gemm"."""
    one_of({"bits": declared.get("bits", declared.get("w_bit"))}, "bits", (4,), 4)
    size = whole(declared, "group_size", "q_group_size", default=128, least=-1)
    for key in ("version", "format"):
        value = declared.get(key)
        one_of({key: value.lower() if isinstance(value, str) else value}, key, ("gemm",), "gemm")
    one_of(declared, "zero_point", (True,), True)
    absent(declared, "desc_act", "dynamic", "extra_config")
    found = Quantized()
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        weight = tensors[f"{module}.qweight"]
        if weight.dtype != "I32" or len(weight.shape) != 2 or not all(weight.shape):
            raise CheckpointError(f"{weight.name}: {weight.dtype} {list(weight.shape)}; expected a matrix of I32")
        inputs, words = weight.shape
        width = inputs if size <= 0 else size
        if inputs % width:
            raise CheckpointError(f"{weight.name}: group_size {width} does not divide its {inputs} inputs")
        why = f"of {weight.name} {list(weight.shape)}, with group_size {size}"
        count = inputs // width
        parts = {
            "weight": weight,
            "zeros": check(required(tensors, f"{module}.qzeros", weight.name), ("I32",), [(count, words)], why),
            "scales": check(required(tensors, f"{module}.scales", weight.name), FLOATS, [(count, 8 * words)], why),
        }
        groups = "one group" if count == 1 else f"groups of {width}"
        found.add(gptq_format.awq_source(f"{module}.weight", parts, width, f"AWQ 4-bit, {groups}"))
    check_left_out(declared, found, "modules_to_not_convert")
    return found


def mxfp4(declared: Mapping[str, Any], tensors: Tensors, local: bool) -> Quantized:
    """Return the tensors of experts that gpt-oss stores as blocks of 4-bit floats."""
    found = Quantized()
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        blocks = tensors[f"{name}_blocks"]
        if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != 16:
            raise CheckpointError(
                f"{blocks.name}: {blocks.dtype} {list(blocks.shape)}; expected U8 of experts, outputs, blocks and 16"
            )
        why = f"of {blocks.name} {list(blocks.shape)}"
        scales = check(required(tensors, f"{name}_scales", blocks.name), ("U8",), [blocks.shape[:3]], why)
        found.add(mxfp4_format.source_of(name, blocks, scales))
    check_left_out(declared, found, "modules_to_not_convert")
    return found
