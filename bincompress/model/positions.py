"""How does each layer see positions? Its rotary embedding and its window, as config.json gives them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bincompress.model.declaration import Architecture
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.model.fields import LARGEST_POSITION, count, flag, number, size
from bincompress.model.rope import Rope, rotated
from bincompress.model.rope_fields import read_rope

_OTHER_NAMES = {"attention": "full_attention", "mamba": "linear_attention"}  # that transformers takes as well
_KINDS = ("full_attention", "sliding_attention")
_IF_USED = ("by layer_types", "without rope", "every layer if used")  # where use_sliding_window decides

Window = int | None  # positions that a token sees, None for all


def positions(
    raw: Mapping[str, Any], declared: Architecture, layers: int, head_dim: int, context: int
) -> tuple[tuple[Rope, ...], tuple[Window, ...]]:
    """Return every layer's rotary embedding and window; raises UnsupportedModelError or ConfigError by name."""
    turned = _layers_with_rope(raw, declared, layers)
    windows = _windows(raw, declared, turned)
    if declared.rope_in_windows and raw.get("sliding_window", declared.window) is not None:
        turned = [window is not None for window in windows]
    if not _turns(raw, declared):
        ropes: tuple[Rope, ...] = (Rope(share=0.0),) * layers
    elif declared.local_rope_theta is None:
        rope = _rope(raw, declared, head_dim, context)
        ropes = tuple(rope if turns else Rope(share=0.0) for turns in turned)
    else:
        whole, local = _two_ropes(raw, declared, declared.local_rope_theta, head_dim, context)
        ropes = tuple(whole if window is None else local for window in windows)
    for rope in set(ropes):
        if rotated(rope, head_dim) % 2 or (not rotated(rope, head_dim) and rope.share):
            raise UnsupportedModelError(
                f"config.json: partial_rotary_factor = {rope.share!r} of head_dim {head_dim} is not an even number"
            )
    return ropes, windows


def _rope(raw: Mapping[str, Any], declared: Architecture, head_dim: int, context: int) -> Rope:
    """Read either form as transformers does: rope_scaling, where there is any, replaces all of rope_parameters."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = declared.rope if raw.get(field) is None else _object(raw[field], field)
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise UnsupportedModelError(f"config.json: {field} per kind of layer ({nested[0]!r}) are not supported")
    rope = read_rope(given, field, raw, declared, ("rope_theta", declared.rope_theta), head_dim, context)
    if not declared.query_growth:
        return rope
    original = rope.original_context
    if rope.kind not in ("yarn", "llama3"):
        original = size(given, "original_max_position_embeddings", limit=LARGEST_POSITION)
    return replace(rope, query_growth=number(given, declared.query_growth), original_context=original)


def _turns(raw: Mapping[str, Any], declared: Architecture) -> bool:
    """Return whether there is a rotary embedding at all."""
    if not declared.rope_switch:
        return True
    value = raw.get(declared.rope_switch)
    if value not in (None, "rope", "nope"):
        raise UnsupportedModelError(
            f"config.json: {declared.rope_switch} = {value!r:.60} is not supported; known: rope, nope"
        )
    return bool(value == "rope")


def _two_ropes(
    raw: Mapping[str, Any], declared: Architecture, local: float, head_dim: int, context: int
) -> tuple[Rope, Rope]:
    """Read the embeddings of layers without and with a window: two objects, or the older fields beside each other."""
    given = _object(raw.get("rope_parameters"), "rope_parameters")
    others = [key for key in given if key not in _KINDS]
    if others:
        raise UnsupportedModelError(f"config.json: rope_parameters: {others[0]!r} beside kinds of layers")
    whole, sliding = (_object(given.get(kind), f"rope_parameters: {kind}") for kind in _KINDS)
    if raw.get("rope_scaling"):  # which updates what is there, and there is a type already
        whole = {"rope_type": "default", **whole, **_object(raw["rope_scaling"], "rope_scaling")}
    if not declared.local_rope_field and "rope_theta" in raw and sliding.get("rope_theta") is None:
        # transformers gives it to layers without a window alone, other programs to all.
        beside = number(raw, "rope_theta")
        if beside != local:
            raise UnsupportedModelError(
                f"config.json: rope_theta = {beside:g} is not supported beside layers with a window: programs differ "
                "in which layers it is for; give it in rope_parameters for each kind of layer"
            )
    bases = ("rope_theta", declared.rope_theta), (declared.local_rope_field, local)
    of_whole, of_sliding = (
        read_rope(own, f"rope_parameters: {kind}", raw, declared, base, head_dim, context, of_layers=True)
        for own, kind, base in zip((whole, sliding), _KINDS, bases, strict=True)
    )
    return of_whole, of_sliding


def _layers_with_rope(raw: Mapping[str, Any], declared: Architecture, layers: int) -> list[bool]:
    """Return which layers have a rotary embedding; fields that switch it off are refused where they do not count."""
    if "no_rope_layers" not in declared.reads:
        return [True] * layers
    given = raw.get("no_rope_layers")
    if given is None:
        interval = size(raw, "no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or not all(type(item) is int for item in given):
        raise ConfigError(
            f"config.json: no_rope_layers: expected a list of {layers} numbers 0 or 1, found {str(given)[:80]}"
        )
    return [bool(turns) for turns in given[:layers]]


def _windows(raw: Mapping[str, Any], declared: Architecture, turned: list[bool]) -> tuple[Window, ...]:
    layers, rule = len(turned), declared.windows
    if declared.without_layer_types and raw.get("layer_types") is None:
        raise UnsupportedModelError(
            f"config.json: without layer_types is not supported: {declared.without_layer_types}"
        )
    if declared.recurrence is not None:  # layer_types says which layers have attention, and all of those see all
        return (None,) * layers
    window = declared.window
    if rule != "never" and "sliding_window" in raw:
        window = None if raw["sliding_window"] is None else size(raw, "sliding_window", limit=LARGEST_POSITION)
    if rule == "never" or (rule in _IF_USED and not flag(raw, "use_sliding_window")):
        window = None
    sliding = [window is not None] * layers
    if window is not None and rule == "by layer_types" and raw.get("layer_types") is None:
        first = count(raw, "max_window_layers", 28)
        sliding = [layer >= first for layer in range(layers)]
    elif window is not None and rule == "by pattern" and raw.get("layer_types") is None:
        pattern = size(raw, declared.pattern_field, declared.pattern)
        sliding = [(layer + 1) % pattern != 0 for layer in range(layers)]
    elif window is not None and rule == "without rope":
        sliding = [not turns for turns in turned]
    elif window is None and rule == "by pattern" and raw.get("layer_types") is None:
        raise UnsupportedModelError("config.json: sliding_window = None is not supported; most layers have a window")
    if raw.get("layer_types") is not None:
        stated = _layer_kinds(raw["layer_types"], layers)
        if rule not in ("never", "every layer", "every layer if used") and window is not None:
            sliding = stated
        elif stated != sliding:
            raise UnsupportedModelError("config.json: layer_types contradict the sliding window; not supported")
    return tuple(window if slides else None for slides in sliding)


def _layer_kinds(kinds: Any, layers: int) -> list[bool]:
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"config.json: layer_types: expected a list of {layers} kinds, found {str(kinds)[:80]}")
    known = [_OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    for given, kind in zip(kinds, known, strict=True):
        if kind not in _KINDS:
            raise UnsupportedModelError(f"config.json: layer type {given!r:.60} is not supported")
    return [kind == "sliding_attention" for kind in known]


def _object(value: Any, field: str) -> Mapping[str, Any]:
    """Return an object of config.json, an empty one where there is none."""
    if not isinstance(value or {}, Mapping):
        raise ConfigError(f"config.json: {field}: expected an object, found {value!r:.80}")
    return value or {}
