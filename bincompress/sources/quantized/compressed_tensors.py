"""compressed-tensors: which group of quantization_config is each module of, and what do its tensors stand for?

Source: compressed-tensors, utils/match.py and quantization/quant_config.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bincompress.errors import CheckpointError
from bincompress.sources.mapping import map_items
from bincompress.sources.quantized import fp8, integers
from bincompress.sources.quantized.declared import (
    FLOATS,
    WHERE,
    Reading,
    absent,
    block_words,
    check,
    names,
    one_of,
    pair,
    scale_shapes,
    whole,
)
from bincompress.sources.quantized.methods import Quantized, Tensors, required
from bincompress.sources.quantized.patterns import Patterns
from bincompress.tensors.weight import TensorSource

_PACKED = "pack-quantized"
# The types of numbers that a format has.
_TYPES = {
    _PACKED: ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}
_STRATEGIES = ("tensor", "channel", "group", "block")
# Fields of weights that say how the numbers were found, or of what type a part is, which the file says itself.
_IDLE = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_ENDS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@dataclass(frozen=True)
class _Scheme:
    """How the weights of a group of modules are quantized."""

    name: str
    targets: list[str]
    format: str
    bits: int
    floats: bool
    symmetric: bool
    strategy: str
    group: int  # columns; of the strategy "group"
    block: tuple[int, int]  # of the strategy "block"
    ordered: bool  # whether columns belong to groups in another order, that of weight_g_idx


def find(declared: Mapping[str, Any], tensors: Tensors, local: bool) -> Quantized:
    """Return matrices of integers with 4 or 8 bits, or of FP8; local: whether the files are here."""
    one_of(declared, "quantization_status", ("compressed",), "compressed")
    absent(declared, "transform_config")
    sparsity = declared.get("sparsity_config") or {}
    one_of(sparsity if isinstance(sparsity, Mapping) else {"format": sparsity}, "format", ("dense",), "dense")
    groups = declared.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{WHERE}: config_groups: expected groups of modules, found {groups!r:.60}")
    schemes = [_scheme(str(name), group, declared) for name, group in groups.items()]
    ignore, patterns = names(declared, "ignore"), Patterns(WHERE)
    found = Quantized()
    modules = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in _ENDS}
    modules |= {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.dtype.startswith("F8_") or (tensor.dtype == "I8" and name.endswith(".weight"))
    }
    for module in sorted(modules):
        ignored = patterns.first(module, ignore, regex_prefix=True)
        scheme = _scheme_of(module, schemes, patterns)
        if ignored is not None or scheme is None:
            says = f"ignores it ({ignored!r:.60})" if ignored is not None else "has no group that targets it"
            raise CheckpointError(f"{module}: is quantized, but {WHERE} {says}")
        packed = scheme.format == _PACKED
        found.add(_packed(module, tensors, scheme, local) if packed else _plain(module, tensors, scheme, local))
        found.used |= {f"{module}.{end}" for end in _ENDS if f"{module}.{end}" in tensors}
    found.drop_activations(tensors)
    rounded = ("input_activations", "output_activations")
    if declared.get("kv_cache_scheme") or any(group.get(key) for group in groups.values() for key in rounded):
        found.notes.append("activations, keys and values are not rounded, which quantization_config asks for")
    return found


def _scheme(name: str, group: Any, declared: Mapping[str, Any]) -> _Scheme:
    given = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(given, Mapping):
        raise CheckpointError(f"{WHERE}: config_groups: {name:.60}: expected targets and weights, found {group!r:.60}")
    weights = Reading(given)
    stated = group.get("format") or declared.get("format")
    layout = one_of({"format": stated}, "format", tuple(_TYPES))
    floats = one_of(_lower(weights, "type"), "type", _TYPES[layout], "int") == "float"
    size = weights.get("group_size")
    usual = "tensor" if size is None else "channel" if size == -1 and type(size) is int else "group"
    strategy = one_of(_lower(weights, "strategy"), "strategy", _STRATEGIES, usual)
    if strategy != "group" and size not in (None, 0, -1):
        raise CheckpointError(f"{WHERE}: group_size = {size!r:.60} contradicts strategy = {strategy!r}; expected none")
    block = weights.get("block_structure")
    if strategy != "block" and block is not None:
        raise CheckpointError(f"{WHERE}: block_structure contradicts strategy = {strategy!r}; expected none")
    absent(weights, "dynamic")
    order = one_of(
        _lower(weights, "actorder"), "actorder", (False, "weight", "static", True, "group", "dynamic"), False
    )
    found = _Scheme(
        name=name,
        targets=names(group, "targets"),
        format=layout,
        bits=one_of(weights, "num_bits", (8,) if floats or layout != _PACKED else (4, 8), 8),
        floats=floats,
        symmetric=one_of(weights, "symmetric", (True,) if floats else (True, False), True),
        strategy=strategy,
        group=whole(weights, "group_size") if strategy == "group" else 0,
        block=pair(block, "block_structure") if strategy == "block" else (0, 0),
        ordered=order in (True, "group", "dynamic"),
    )
    unknown = weights.left_over(_IDLE)
    if unknown:
        raise CheckpointError(f"{WHERE}: config_groups: {name:.60}: weights: {', '.join(unknown)}: not read")
    return found


def _lower(weights: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return a field alone, its text in small letters, as the package takes it."""
    value = weights.get(field)
    return {field: value.lower() if isinstance(value, str) else value}


def _scheme_of(module: str, schemes: list[_Scheme], patterns: Patterns) -> _Scheme | None:
    """Return the scheme that targets a module: by its name, by an expression, or as one of all linear layers.

    Raises CheckpointError where two that differ do so in the same way.
    """
    for kind in ("name", "re:", "Linear"):
        found = []
        for scheme in schemes:
            own = [target for target in scheme.targets if _kind(target) == kind]
            if (kind == "Linear" and own) or patterns.first(module, own, regex_prefix=True) is not None:
                found.append(scheme)
        other = next((each for each in found if _unnamed(each) != _unnamed(found[0])), None)
        if other is not None:
            raise CheckpointError(
                f"{module}: {WHERE}: {found[0].name:.60} and {other.name:.60} both target it and differ; expected one"
            )
        if found:
            return found[0]
    return None


def _unnamed(scheme: _Scheme) -> _Scheme:
    return replace(scheme, name="", targets=[])


def _kind(target: str) -> str:
    return "re:" if target.startswith("re:") else "Linear" if target == "Linear" else "name"


def _blocks(scheme: _Scheme, rows: int, cols: int, of: str) -> tuple[int, int]:
    """Return the rows and columns of one scale."""
    if scheme.strategy == "group" and cols % scheme.group:
        raise CheckpointError(f"{of}: group_size {scheme.group} does not divide its {cols} columns")
    sizes = {"tensor": (rows, cols), "channel": (1, cols), "group": (1, scheme.group), "block": scheme.block}
    return sizes[scheme.strategy]


def _packed(module: str, tensors: Tensors, scheme: _Scheme, local: bool) -> TensorSource:
    """Return a matrix of integers in 32-bit words."""
    name = f"{module}.weight"
    weight = required(tensors, f"{name}_packed", module)
    if scheme.strategy == "block":
        raise CheckpointError(f"{weight.name}: {scheme.format} with the strategy block is not read")
    if weight.dtype != "I32" or len(weight.shape) != 2 or not all(weight.shape):
        raise CheckpointError(f"{weight.name}: {weight.dtype} {list(weight.shape)}; expected a matrix of I32")
    rows = weight.shape[0]
    cols = _columns(required(tensors, f"{name}_shape", weight.name), weight, scheme.bits, local)
    block = _blocks(scheme, rows, cols, weight.name)
    why = f"of {weight.name} {list(weight.shape)}, by {WHERE}"
    parts = {
        "weight": weight,
        "scale": check(required(tensors, f"{name}_scale", weight.name), FLOATS, scale_shapes(rows, cols, block), why),
    }
    if not scheme.symmetric:
        zero = required(tensors, f"{name}_zero_point", weight.name)
        packed_zeros = (-(-rows * scheme.bits // 32), -(-cols // block[1]))
        if scheme.strategy == "tensor":
            parts["zero"] = check(zero, ("I8",), scale_shapes(rows, cols, block), why)
        else:
            parts["zero"] = check(zero, ("I32",), [packed_zeros], why)
    parts |= _order(name, tensors, scheme, cols, local)
    words_of = block_words(block, rows, cols)
    what = f"compressed-tensors int{scheme.bits}, {words_of}{'' if scheme.symmetric else ', zero points'}"
    return integers.source_of(name, (rows, cols), parts, scheme.bits, block, what)


def _order(name: str, tensors: Tensors, scheme: _Scheme, cols: int, local: bool) -> dict[str, TensorSource]:
    """Return the part "group", the group of each column, where the columns are in another order than the groups."""
    stored = f"{name}_g_idx"
    if scheme.ordered:
        required(tensors, stored, f"{name} (actorder: columns in groups of their own order)")
    if stored not in tensors:
        return {}
    groups = check(tensors[stored], ("I32", "I64"), [(cols,)], f"of {name}, by {WHERE}")
    unset = map_items(groups) == -1 if local else np.zeros(1, bool)
    if unset.any():
        if unset.all() and not scheme.ordered:  # -1 throughout: there is no order
            return {}
        raise CheckpointError(
            f"{stored}: {int(unset.sum()):,} of {cols:,} columns have no group (-1); expected groups for all of them"
            f"{'' if scheme.ordered else ', or for none'}"
        )
    if scheme.strategy != "group" or scheme.floats:
        what = "floats" if scheme.floats else f"the strategy {scheme.strategy}"
        raise CheckpointError(f"{stored}: an order of columns with {what} is not read")
    return {"group": groups}


def _columns(shape: TensorSource, weight: TensorSource, bits: int, local: bool) -> int:
    """Return the columns of a packed matrix; where the file is not here, as many as its words can hold."""
    check(shape, ("I64", "I32"), [(2,)], f"of {weight.name}")
    rows, words = weight.shape
    if not local:
        return words * 32 // bits
    stated = [int(value) for value in map_items(shape)]
    if stated[0] != rows or stated[1] < 1 or -(-stated[1] * bits // 32) != words:
        raise CheckpointError(
            f"{shape.name}: says {stated}; {weight.name} has {rows} rows of {words} words, which hold "
            f"{words * 32 // bits} integers of {bits} bits"
        )
    return stated[1]


def _plain(module: str, tensors: Tensors, scheme: _Scheme, local: bool) -> TensorSource:
    """Return a matrix of 8-bit integers or floats, one an item."""
    name = f"{module}.weight"
    weight = required(tensors, name, module)
    dtype = "F8_E4M3" if scheme.floats else "I8"
    if weight.dtype != dtype or len(weight.shape) != 2 or not all(weight.shape):
        raise CheckpointError(
            f"{name}: {weight.dtype} {list(weight.shape)}; expected a matrix of {dtype}, by {WHERE} ({scheme.format})"
        )
    rows, cols = weight.shape
    block = _blocks(scheme, rows, cols, name)
    why, shapes = f"of {name} {list(weight.shape)}, by {WHERE}", scale_shapes(rows, cols, block)
    scale = check(required(tensors, f"{name}_scale", name), FLOATS, shapes, why)
    words_of, order = block_words(block, rows, cols), _order(name, tensors, scheme, cols, local)
    if scheme.floats:
        return fp8.source_of(name, weight, scale, block, scale.dtype, f"compressed-tensors FP8, {words_of}")
    parts = {"weight": weight, "scale": scale, **order}
    if not scheme.symmetric:
        parts["zero"] = check(required(tensors, f"{name}_zero_point", name), ("I8",), shapes, why)
    what = f"compressed-tensors int8, {words_of}{'' if scheme.symmetric else ', zero points'}"
    return integers.source_of(name, (rows, cols), parts, 8, block, what)
