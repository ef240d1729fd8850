"""Which matrices of a checkpoint have so few levels that a method gives every weight exactly? Told from some rows.

Models trained at low bits have such matrices. Where the user asked for no method they are packed without loss; where he
did, the summary says that it would have been possible.
"""

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bincompress.compression.plan import Plan, PlannedTensor, peak_memory
from bincompress.compression.recipe import Override, Recipe
from bincompress.errors import RecipeError
from bincompress.methods import KEEP, METHODS, Method, Recognized, method_named
from bincompress.methods.rounding.few_levels import crowded
from bincompress.model.roles import Kind
from bincompress.model.runnable import roles_of
from bincompress.sources.checkpoint import ITEM_BYTES, Checkpoint, read_weight
from bincompress.tensors.weight import TensorSource, Weight

_FIRST = 256  # columns of the first row, which rule most matrices out
_SAMPLE = 1 << 16  # weights
_SAMPLE_ROWS = (4, 64)


@dataclass(frozen=True)
class Few:
    """A tensor of few levels."""

    source: TensorSource
    kind: Kind
    method: str  # that gives it exactly
    found: Recognized


def few_levels(checkpoint: Checkpoint) -> dict[str, Few]:
    """Return the tensors of few levels by name; none of a plan whose weights are not here.

    Linear layers are told from a sample of their rows, since another method can take them if the rest differs.
    Embeddings and heads would be kept then, which a plan has to know: all of their rows are looked at.
    """
    roles, found = roles_of(checkpoint), {}
    for name, source in checkpoint.tensors.items():
        kind = roles.of(name, source.shape).kind
        if kind == "other" or not _is_readable(source):
            continue
        for method in METHODS:
            seen = _recognized(method, source, kind != "linear") if method.recognize is not None else None
            if seen is not None:
                found[name] = Few(source, kind, method.name, seen)
                break
    return found


def _recognized(method: Method, source: TensorSource, whole: bool) -> Recognized | None:
    """Ask a method about a matrix: of its first row, which tells for most, of a sample, and if `whole` of all rows."""
    assert method.recognize is not None
    rows, cols = source.shape
    least, most = _SAMPLE_ROWS
    count = min(rows, max(least, min(most, _SAMPLE // cols)))
    if source.encoding is None:
        weight = read_weight(source)
        chosen = np.linspace(0, rows - 1, count).astype(np.intp)
        samples = [weight.bits[:1, :_FIRST], weight.bits[chosen]]
    else:  # values that are computed are computed for a few rows, at once
        weight = read_weight(replace(source, shape=(count, cols)))
        samples = [weight.bits]
    seen = None
    for sample in samples:
        seen = method.recognize(Weight(np.ascontiguousarray(sample), weight.dtype), (rows, cols))
        if seen is None:
            return None
    return method.recognize(read_weight(source), (rows, cols)) if whole else seen


def _is_readable(source: TensorSource) -> bool:
    matrix = len(source.shape) == 2 and min(source.shape) > 0
    return matrix and source.dtype in ITEM_BYTES and Path(source.file).is_file()


def taken(recipe: Recipe, few: Mapping[str, Few]) -> dict[str, Few]:
    """Return those that are packed without loss although nobody named a method for them."""
    lossless = recipe.method != KEEP.method and method_named(recipe.method).recognize is not None
    if recipe.method_given and not lossless:
        return {}
    patterns = [override.pattern for override in recipe.overrides]
    return {
        name: each
        for name, each in few.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        and not (recipe.embeddings_given if each.kind != "linear" else recipe.method_given)
    }


def with_methods(recipe: Recipe, few: Mapping[str, Few]) -> Recipe:
    """Return the recipe that packs these tensors by the methods that give them exactly."""
    own = tuple(Override(name, (("method", each.method),)) for name, each in few.items())
    return replace(recipe, overrides=(*own, *recipe.overrides))


def with_fallbacks(plan: Plan, recipe: Recipe, few: Mapping[str, Few], chosen: Mapping[str, Few]) -> Plan:
    """Return the plan with what is known of these tensors' sizes, and what to do where a weight differs after all.

    recipe: that of the user, whose settings linear layers get then. chosen: those for which nobody named a method.
    """
    tensors = []
    for tensor in plan.tensors:
        each = few.get(tensor.source.name)
        if each is not None and tensor.settings.method == each.method:
            expected = each.found.nbytes + 12 * len(tensor.kept)
            linear = each.kind == "linear" and tensor.source.name in chosen
            tensor = replace(
                tensor,
                expected_bytes=expected,
                peak_memory=peak_memory(tensor.source, tensor.settings, expected),
                fallback=recipe.settings_for(tensor.source.name) if linear else None,
            )
        tensors.append(tensor)
    return replace(plan, tensors=tuple(tensors))


def refuse_lossy(plan: Plan, few: Mapping[str, Few]) -> None:
    """Raise RecipeError where a method that gives every weight exactly is asked for a tensor that it is not for."""
    for tensor in plan.tensors:
        name = tensor.source.name
        if name in few or not tensor.packed or not _is_readable(tensor.source) or _method(tensor).recognize is None:
            continue
        raise RecipeError(
            f"{name}: method {tensor.settings.method} is for matrices of at most four values a block, and this one has "
            "more, or values that no planes and scales give exactly; choose another method for it, or --keep it"
        )


def _method(tensor: PlannedTensor) -> Method:
    return method_named(tensor.settings.method)


def remarks(plan: Plan, few: Mapping[str, Few]) -> tuple[str, ...]:
    """Return what a summary says of tensors of few levels: that they are packed exactly, or could have been."""
    settings = {tensor.source.name: tensor.settings.method for tensor in plan.tensors}
    exact = [each for name, each in few.items() if settings[name] == each.method]
    could = [each for name, each in few.items() if settings[name] != each.method]
    lines = []
    inexact = sum(_has_few(tensor) for tensor in plan.tensors if tensor.source.name not in few)
    if inexact:
        lines.append(f"few levels, but planes and scales cannot give them exactly in float32: {inexact} matrices")
    if exact:
        lines.append(
            f"few levels: {_told(exact)}: packed by method {exact[0].method}, in about {_bits(exact):.3f} bits a "
            "weight (every weight is checked)"
        )
    if could:
        lines.append(
            f"few levels: {_told(could)}: method {could[0].method} would give every weight exactly, in about "
            f"{_bits(could):.3f} bits a weight, but other settings were asked for"
        )
    return tuple(lines)


def _has_few(tensor: PlannedTensor) -> bool:
    """Return whether a float32 matrix has few levels by its sampled rows, and enough weights for each to be a sign."""
    source = tensor.source
    if source.dtype != "F32" or source.encoding is not None or tensor.kind == "other" or not _is_readable(source):
        return False
    rows, cols = source.shape
    weight = read_weight(source)
    least, most = _SAMPLE_ROWS
    chosen = np.linspace(0, rows - 1, min(rows, max(least, min(most, _SAMPLE // cols)))).astype(np.intp)
    samples = [weight.bits[:1, :_FIRST], weight.bits[chosen]]
    return cols >= 32 and all(crowded(Weight(np.ascontiguousarray(each), weight.dtype)) is None for each in samples)


def _told(few: Iterable[Few]) -> str:
    counts = Counter(each.found.levels for each in few)
    return ", ".join(f"{count} matrices with {{{levels}}}" for levels, count in counts.items())


def _bits(few: Iterable[Few]) -> float:
    few = list(few)
    return 8 * sum(each.found.nbytes for each in few) / sum(math.prod(each.source.shape) for each in few)
