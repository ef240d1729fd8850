"""How does one object of config.json, rope_scaling or rope_parameters, say how positions become angles?"""

import math
from collections.abc import Mapping
from typing import Any, cast

from bincompress.model.declaration import Architecture
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.model.fields import LARGEST_POSITION, flag, number, size
from bincompress.model.rope import Kind, Rope, rotated

_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")


def read_rope(
    given: Mapping[str, Any],
    field: str,
    raw: Mapping[str, Any],
    declared: Architecture,
    base: tuple[str, float],
    head_dim: int,
    context: int,
    of_layers: bool = False,
) -> Rope:
    """Read one object of rope parameters as transformers does; raises UnsupportedModelError or ConfigError by name.

    raw: the fields beside it. base: which of them is its theta, and the default. of_layers: whether it is one of
    several, for layers of one kind; then the original length beside it does not count.
    """
    kind = given.get("rope_type", given.get("type", "default"))
    kind = declared.rope_names.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise UnsupportedModelError(f"config.json: {field}: rope type {kind!r:.60} is not supported; known: {known}")
    share = _share(given, raw, declared, head_dim)
    theta = number(given, "rope_theta") if given.get("rope_theta") is not None else number(raw, *base)
    plain = Rope(theta, cast(Kind, kind), share=share)
    if kind == "default":
        return plain
    if kind == "linear":
        return Rope(theta, "linear", number(given, "factor"), share=share)
    if kind == "dynamic":  # whose base changes past the context alone
        number(given, "factor")
        return Rope(theta, "dynamic", original_context=context, share=share)
    original = _original(given, {} if of_layers else raw, declared, context)
    if kind == "llama3":
        factor, low, high = (number(given, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ConfigError(f"config.json: low_freq_factor {low} must be below high_freq_factor {high}")
        return Rope(theta, "llama3", factor, low, high, original, share)
    if kind == "yarn":
        return _yarn(given, plain, original, context, of_layers)
    return _longrope(given, field, plain, original, context, head_dim)


def _original(given: Mapping[str, Any], beside: Mapping[str, Any], declared: Architecture, context: int) -> int:
    """Return the context before scaling; the field beside the object comes before that inside it."""
    name = "original_max_position_embeddings"
    if beside.get(name) is not None:
        return size(beside, name, limit=LARGEST_POSITION)
    if declared.original_context is not None:
        return declared.original_context
    return size(given, name, context, limit=LARGEST_POSITION)


def _yarn(given: Mapping[str, Any], plain: Rope, original: int, context: int, of_layers: bool) -> Rope:
    if "factor" not in given:
        raise ConfigError("config.json: factor: expected a positive number, found None")
    factor = number(given, "factor", context / original)
    if plain.theta == 1:
        raise ConfigError("config.json: rope_theta: expected another number than 1 with rope type 'yarn'")

    def scaled(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = given.get("attention_factor")
    if attention is not None:
        attention = number(given, "attention_factor")
    elif given.get("mscale") and given.get("mscale_all_dim"):
        attention = scaled(number(given, "mscale")) / scaled(number(given, "mscale_all_dim"))
    else:
        attention = scaled(1.0)
    fast, slow = (
        number(given, name) if given.get(name) else usual for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    # transformers does not look into the objects of layers for this one.
    truncate = flag(given, "truncate", True) if not of_layers else True
    return Rope(
        plain.theta, "yarn", factor, original_context=original, share=plain.share, attention_factor=attention,
        beta_fast=fast, beta_slow=slow, truncate=truncate,
    )  # fmt: skip


def _longrope(given: Mapping[str, Any], field: str, plain: Rope, original: int, context: int, head_dim: int) -> Rope:
    """Return the embedding of texts up to the original context; past it, other divisors apply to every position."""
    pairs = rotated(plain, head_dim) // 2
    for name in ("short_factor", "long_factor"):
        values = given.get(name)
        if not isinstance(values, list) or len(values) != pairs:
            found = f"{len(values)}" if isinstance(values, list) else f"{values!r:.40}"
            raise ConfigError(f"config.json: {field}: {name}: expected a list of {pairs} numbers, found {found}")
        for value in values:
            number({name: value}, name)
    attention = given.get("attention_factor")
    if attention is not None:
        attention = number(given, "attention_factor")
    else:
        factor = number(given, "factor", context / original)
        if factor > 1 and original == 1:
            raise ConfigError("config.json: original_max_position_embeddings: expected more than 1, found 1")
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = tuple(float(value) for value in given["short_factor"])
    return Rope(
        plain.theta, "longrope", original_context=min(original, context), share=plain.share,
        attention_factor=attention, divisors=divisors,
    )  # fmt: skip


def _share(given: Mapping[str, Any], raw: Mapping[str, Any], declared: Architecture, head_dim: int) -> float:
    """Return which share of a head is rotated; raises UnsupportedModelError where the architecture rotates it all."""
    field = "partial_rotary_factor"
    if field not in declared.reads:
        if given.get(field, 1.0) not in (None, 1.0):
            raise UnsupportedModelError(f"config.json: {field} = {given[field]!r} is not supported; only 1.0 is")
        return 1.0
    default, items = declared.rope_share, declared.rope_items_field
    if items and raw.get(items) is not None:
        default = size(raw, items) / head_dim
    share = number(given if given.get(field) is not None else raw, field, default)
    if share > 1:
        raise ConfigError(f"config.json: {field}: expected at most 1, found {share}")
    return share
