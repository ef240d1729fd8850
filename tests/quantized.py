"""Checkpoints as other programs quantize them, made here, with the values that each format's definition gives.

The definitions are written out one weight at a time, or with PyTorch, and share nothing with what is tested.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which output the 4 bits of a word hold, the lowest first
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@dataclass
class Form:
    """How a matrix is stored, what config.json says, and the float32 values that it stands for."""

    config: dict[str, Any]
    parts: Tensors  # by what follows the module's name
    values: NDArray[np.float32]
    format: str  # as the plan names it
    rounded: Any = field(default=np.float32)  # to which the values are rounded


def random_of(rows: int, cols: int, seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([rows, cols, seed])


def fp8(rows: int, cols: int, block: tuple[int, int], name: str = "weight_scale_inv", listed: bool = True) -> Form:
    """8-bit floats; block: rows and columns of one scale."""
    random = random_of(rows, cols)
    weight = random.standard_normal((rows, cols), np.float32).astype(ml_dtypes.float8_e4m3fn)
    scale = random.uniform(0.001, 0.1, (-(-rows // block[0]), -(-cols // block[1]))).astype(np.float32)
    values = np.empty((rows, cols), np.float32)
    for row in range(rows):
        for col in range(cols):
            values[row, col] = np.float32(weight[row, col]) * scale[row // block[0], col // block[1]]
    whole = block[0] >= rows and block[1] >= cols
    words = "one scale" if whole else "a scale a row" if block[0] == 1 else f"blocks of {block[0]} x {block[1]}"
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    config |= {"weight_block_size": list(block)} if listed else {}
    return Form(
        config, {"weight": weight, name: scale.reshape(()) if whole and not listed else scale}, values, f"FP8, {words}"
    )


def packed_words(integers: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Integers (rows, n) in words of 32 bits, the lowest bits first."""
    per = 32 // bits
    rows, count = integers.shape
    words = np.zeros((rows, -(-count // per)), np.int64)
    for place in range(count):
        words[:, place // per] |= integers[:, place].astype(np.int64) << (bits * (place % per))
    return words.astype(np.uint32).view(np.int32)


def gptq(rows: int, cols: int, bits: int, group: int, version: str = "gptq", order: bool = False) -> Form:
    random = random_of(rows, cols, bits)
    width = cols if group == -1 else group
    count = -(-cols // width)
    integers = random.integers(0, 1 << bits, (rows, cols))
    zeros = random.integers(0 if version == "gptq" else 1, 1 << bits, (count, rows))  # 0: stored as the greatest
    scales = random.uniform(0.001, 0.02, (count, rows)).astype(np.float16)
    groups = np.arange(cols) // width
    if order:
        random.shuffle(groups)
    values = np.empty((rows, cols), np.float32)
    for row in range(rows):
        for col in range(cols):
            g = groups[col]
            values[row, col] = np.float32(scales[g, row]) * np.float32(integers[row, col] - zeros[g, row])
    stored = (zeros - 1) % (1 << bits) if version == "gptq" else zeros
    parts: Tensors = {
        "qweight": np.ascontiguousarray(packed_words(integers, bits).T),
        "qzeros": packed_words(stored, bits),
        "scales": scales,
        "g_idx": groups.astype(np.int32),
    }
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": False,
        "checkpoint_format": version,
    }  # fmt: skip
    words = "one group" if count == 1 else f"groups of {width}"
    return Form(config, parts, values, f"GPTQ {bits}-bit, {words}{', in order of activations' if order else ''}")


def awq(rows: int, cols: int, group: int) -> Form:
    random = random_of(rows, cols, 4)
    count = cols // group
    integers, zeros = random.integers(0, 16, (rows, cols)), random.integers(0, 16, (rows, count))
    scales = random.uniform(0.001, 0.02, (count, rows)).astype(np.float16)
    values = np.empty((rows, cols), np.float32)
    for row in range(rows):
        for col in range(cols):
            g = col // group
            values[row, col] = np.float32(scales[g, row]) * np.float32(integers[row, col] - zeros[row, g])

    def packed(matrix: NDArray[Any]) -> NDArray[np.int32]:  # (outputs, n) as words (n, outputs / 8)
        words = np.zeros((matrix.shape[1], matrix.shape[0] // 8), np.int64)
        for place, output in enumerate(AWQ_ORDER):
            words |= matrix[output::8].T.astype(np.int64) << (4 * place)
        return words.astype(np.uint32).view(np.int32)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    parts: Tensors = {"qweight": packed(integers), "qzeros": packed(zeros), "scales": scales}
    return Form(config, parts, values, f"AWQ 4-bit, groups of {group}")


def compressed(
    rows: int, cols: int, bits: int, strategy: str, group: int = 32, symmetric: bool = True, kind: str = "int",
    packed: bool = True, dtype: Any = ml_dtypes.bfloat16, order: bool = False,
) -> Form:  # fmt: skip
    """compressed-tensors: packed integers, integers of 8 bits, or FP8."""
    random = random_of(rows, cols, bits)
    block = {"tensor": (rows, cols), "channel": (1, cols), "group": (1, group), "block": (group, group)}[strategy]
    counts = (-(-rows // block[0]), -(-cols // block[1]))
    low = -(1 << (bits - 1))
    scale = random.uniform(0.001, 0.05, counts).astype(dtype)
    zero = random.integers(low, -low, counts) if not symmetric else np.zeros(counts, int)
    groups = np.arange(cols) // block[1]
    if order:
        random.shuffle(groups)
    q = random.standard_normal((rows, cols), np.float32).astype(ml_dtypes.float8_e4m3fn)
    if kind == "int":
        q = random.integers(low, -low, (rows, cols)).astype(np.int8)
    values = np.empty((rows, cols), np.float32)
    for row in range(rows):
        for col in range(cols):
            at = (row // block[0], groups[col])
            exact = (np.float32(q[row, col]) - np.float32(zero[at])) * np.float32(scale[at])
            values[row, col] = np.float32(dtype(exact))
    parts: Tensors = {"weight_scale": scale.reshape(1) if strategy == "tensor" else scale}
    if packed:
        parts["weight_packed"] = packed_words(q.astype(int) - low, bits)
        parts["weight_shape"] = np.array([rows, cols], np.int64)
        if not symmetric:
            parts["weight_zero_point"] = np.ascontiguousarray(packed_words((zero - low).T, bits).T)
    else:
        parts["weight"] = q
        if not symmetric:
            parts["weight_zero_point"] = zero.astype(np.int8)
    if order:
        parts["weight_g_idx"] = groups.astype(np.int32)
    weights = {
        "num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": False,
        "group_size": group if strategy == "group" else None, "actorder": "group" if order else None,
        "block_structure": [group, group] if strategy == "block" else None,
    }  # fmt: skip
    layout = "pack-quantized" if packed else f"{kind}-quantized"
    config = {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
    }  # fmt: skip
    words = {"tensor": "one scale", "channel": "a scale a row", "group": f"groups of {group}"}
    what = "FP8" if kind == "float" else f"int{bits}"
    named = f"compressed-tensors {what}, {words.get(strategy, f'blocks of {group} x {group}')}"
    return Form(config, parts, values, named + ("" if symmetric else ", zero points"), dtype)


def mxfp4(experts: int, outputs: int, inputs: int) -> Form:
    random = random_of(outputs, inputs)
    blocks = random.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
    scales = random.integers(100, 140, (experts, outputs, inputs // 32)).astype(np.uint8)
    values = np.empty((experts, inputs, outputs), np.float32)
    for expert in range(experts):
        for output in range(outputs):
            for col in range(inputs):
                byte = int(blocks[expert, output, col // 32, col % 32 // 2])
                code = byte >> 4 if col % 2 else byte & 15
                sign = -1.0 if code & 8 else 1.0
                exponent = int(scales[expert, output, col // 32]) - 127
                values[expert, col, output] = sign * E2M1[code & 7] * 2.0**exponent
    parts: Tensors = {"_blocks": blocks, "_scales": scales}
    return Form({"quant_method": "mxfp4"}, parts, values, "MXFP4", ml_dtypes.bfloat16)


_FORMS: dict[str, Callable[[int, int], Form]] = {
    "fp8 tensor": lambda r, c: fp8(r, c, (r, c), "weight_scale", listed=False),
    "fp8 row": lambda r, c: fp8(r, c, (1, c), "weight_scale", listed=False),
    "fp8 blocks": lambda r, c: fp8(r, c, (48, 48)),
    "fp8 one block": lambda r, c: fp8(r, c, (256, 256)),
    "gptq 4": lambda r, c: gptq(r, c, 4, 32),
    "gptq 4 whole": lambda r, c: gptq(r, c, 4, -1),
    "gptq 4 ragged": lambda r, c: gptq(r, c, 4, 48),
    "gptq 8 v2": lambda r, c: gptq(r, c, 8, 32, "gptq_v2"),
    "gptq 8": lambda r, c: gptq(r, c, 8, 32),
    "gptq 4 order": lambda r, c: gptq(r, c, 4, 32, order=True),
    "gptq 4 v2 order": lambda r, c: gptq(r, c, 4, 32, "gptq_v2", order=True),
    "awq": lambda r, c: awq(r, c, 32),
    "int4 group": lambda r, c: compressed(r, c, 4, "group"),
    "int4 group zeros": lambda r, c: compressed(r, c, 4, "group", symmetric=False),
    "int4 group order": lambda r, c: compressed(r, c, 4, "group", order=True),
    "int4 group order zeros": lambda r, c: compressed(r, c, 4, "group", symmetric=False, order=True),
    "int4 channel zeros": lambda r, c: compressed(r, c, 4, "channel", symmetric=False, dtype=np.float16),
    "int8 packed channel": lambda r, c: compressed(r, c, 8, "channel", dtype=np.float32),
    "int8 packed group zeros": lambda r, c: compressed(r, c, 8, "group", symmetric=False),
    "int8 channel": lambda r, c: compressed(r, c, 8, "channel", packed=False),
    "int8 channel zeros": lambda r, c: compressed(r, c, 8, "channel", packed=False, symmetric=False),
    "int8 tensor": lambda r, c: compressed(r, c, 8, "tensor", packed=False),
    "float channel": lambda r, c: compressed(r, c, 8, "channel", kind="float", packed=False),
    "float tensor": lambda r, c: compressed(r, c, 8, "tensor", kind="float", packed=False),
    "float blocks": lambda r, c: compressed(r, c, 8, "block", 48, kind="float", packed=False),
}


# Each is made once for each shape: the definitions are slow.
FORMS = {kind: functools.cache(form) for kind, form in _FORMS.items()}


def quantized(tensors: Tensors, form: Callable[[int, int], Form]) -> tuple[Tensors, dict[str, Form]]:
    """Return a model's tensors with the matrices of its layers stored so, and what each stands for."""
    stored: Tensors = {}
    forms: dict[str, Form] = {}
    for name, value in tensors.items():
        if value.ndim != 2 or ".layers." not in name:
            stored[name] = value
            continue
        forms[name] = form(*value.shape)
        stored |= {f"{name.removesuffix('weight')}{end}": part.copy() for end, part in forms[name].parts.items()}
    return stored, forms
