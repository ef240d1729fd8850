"""config.json, which is untrusted, as a checked record: what the decoder computes and nothing else."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any

from bincompress.model.architectures import ARCHITECTURES, OTHER_FAMILIES, UNHANDLED, Architecture, Biases, Names
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.model.rope import Rope

_LARGEST = 1 << 24  # no size of a known model comes near; far larger ones would exhaust the memory
_MOST_LAYERS = 4096
_ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and options."""

    architecture: str
    vocab: int
    hidden: int
    inner: int  # intermediate_size
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    context: int
    rope: Rope
    windows: tuple[int | None, ...]  # per layer: positions that a token sees, None for all
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    names: Names = dataclass_field(default_factory=Names)  # as this model's tensors are called
    notes: tuple[str, ...] = dataclass_field(default=(), compare=False)  # what a user should know of how it is read

    @property
    def declaration(self) -> Architecture:
        """The architecture's entry in the registry, with this model's names of tensors."""
        return replace(ARCHITECTURES[self.architecture], names=self.names)

    def inputs_of_layer(self, layer: int) -> dict[str, list[str]]:
        """Return a layer's distinct inputs in their order, by the first matrix that reads each: its readers."""
        names = self.declaration.names
        members = (names.qkv, (names.out,), names.gate_up, (names.down,))
        groups = [[names.of_layer(layer, f"{part}.weight") for part in group] for group in members]
        return {group[0]: group for group in groups}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that the decoder reads."""
        names = self.declaration.names
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = names.qkv
        gate, up = names.gate_up
        matrices = {
            q: (queries, self.hidden, self.qkv_bias),
            k: (keys, self.hidden, self.qkv_bias),
            v: (keys, self.hidden, self.qkv_bias),
            names.out: (self.hidden, queries, self.out_bias),
            gate: (self.inner, self.hidden, self.mlp_bias),
            up: (self.inner, self.hidden, self.mlp_bias),
            names.down: (self.hidden, self.inner, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {names.embedding: (self.vocab, self.hidden)}
        for layer in range(self.layers):
            shapes[names.of_layer(layer, names.input_norm)] = (self.hidden,)
            shapes[names.of_layer(layer, names.post_norm)] = (self.hidden,)
            if self.qk_norm:
                shapes[names.of_layer(layer, names.q_norm)] = (self.head_dim,)
                shapes[names.of_layer(layer, names.k_norm)] = (self.head_dim,)
            for part, (rows, cols, bias) in matrices.items():
                shapes[names.of_layer(layer, part + ".weight")] = (rows, cols)
                if bias:
                    shapes[names.of_layer(layer, part + ".bias")] = (rows,)
        shapes[names.norm] = (self.hidden,)
        if not self.tied:
            shapes[names.head] = (self.vocab, self.hidden)
        return shapes


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """Check config.json's values and return the record; raise UnsupportedModelError or ConfigError by name."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json: expected an object, found {type(raw).__name__}")
    name = _architecture(raw)
    declared = ARCHITECTURES[name]
    _refuse_unhandled(raw)
    hidden = _size(raw, "hidden_size")
    heads = _size(raw, "num_attention_heads")
    layers = _size(raw, "num_hidden_layers", limit=_MOST_LAYERS)
    # null means as many as heads; a field that is absent has the default of the architecture.
    kv_default = heads if "num_key_value_heads" in raw else declared.kv_heads or heads
    kv_heads = _size(raw, "num_key_value_heads", kv_default)
    if heads % kv_heads:
        raise ConfigError(f"config.json: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    head_dim = _size(raw, "head_dim", _head_dim(raw, declared, hidden, heads))
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
    context = _size(raw, "max_position_embeddings", declared.context, limit=1 << 31)
    return ModelConfig(
        architecture=name,
        vocab=_size(raw, "vocab_size"),
        hidden=hidden,
        inner=_size(raw, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=_number(raw, "rms_norm_eps", 1e-6),
        context=context,
        rope=_rope(raw, context),
        windows=_windows(raw, declared, layers),
        tied=_flag(raw, "tie_word_embeddings"),
        qkv_bias=_bias(raw, declared.qkv_bias),
        out_bias=_bias(raw, declared.out_bias),
        mlp_bias=declared.mlp_bias and _flag(raw, "mlp_bias"),
        qk_norm=declared.qk_norm,
        names=declared.names,
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    """Return the registered architecture: model_type says which, as transformers has it, unless a name contradicts."""
    model_type = raw.get("model_type")
    listed = raw.get("architectures")
    names = [] if listed is None else listed
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"config.json: architectures: expected a list of names, found {listed!r:.80}")
    of_type = [name for name, declared in ARCHITECTURES.items() if declared.model_type == model_type]
    registered = [name for name in names if name in ARCHITECTURES]
    chosen: str | None = next(iter(registered if model_type is None else of_type), None)
    known = ", ".join(ARCHITECTURES)
    for name in registered:
        expected = ARCHITECTURES[name].model_type
        if model_type not in (None, expected):
            raise UnsupportedModelError(f"config.json: {name} has model_type {expected!r}, found {model_type!r}")
    for name in names:
        if chosen is None or name.lower().startswith(OTHER_FAMILIES):
            raise UnsupportedModelError(
                f"config.json: architecture {name} is not supported; known: {known} (model_type: {model_type!r})"
            )
    if chosen is None:
        raise UnsupportedModelError(f"config.json: model_type {model_type!r} is not supported; known: {known}")
    return chosen


def _refuse_unhandled(raw: Mapping[str, Any]) -> None:
    for field, neutral in UNHANDLED.items():
        value = raw.get(field)
        if not any(value is entry or (type(value) is type(entry) and value == entry) for entry in neutral):
            shown = value.get("quant_method", "given") if isinstance(value, Mapping) else value
            raise UnsupportedModelError(f"config.json: {field} = {shown!r} is not supported; only {neutral[0]!r} is")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"config.json: hidden_act = {activation!r} is not supported; only 'silu' is")


def _rope(raw: Mapping[str, Any], context: int) -> Rope:
    """Read either form as transformers does: rope_scaling, where there is any, replaces all of rope_parameters."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(field) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.json: {field}: expected an object, found {given!r:.80}")
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise UnsupportedModelError(f"config.json: {field} per kind of layer ({nested[0]!r}) are not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_KINDS:
        known = ", ".join(_ROPE_KINDS)
        raise UnsupportedModelError(f"config.json: {field}: rope type {kind!r} is not supported; known: {known}")
    if given.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        found = given["partial_rotary_factor"]
        raise UnsupportedModelError(f"config.json: partial_rotary_factor = {found!r} is not supported; only 1.0 is")
    source = given if given.get("rope_theta") is not None else raw
    theta = _number(source, "rope_theta", 10000.0)
    if kind == "default":
        return Rope(theta)
    factor = _number(given, "factor")
    if kind == "linear":
        return Rope(theta, "linear", factor)
    low, high = _number(given, "low_freq_factor"), _number(given, "high_freq_factor")
    if low >= high:
        raise ConfigError(f"config.json: low_freq_factor {low} must be below high_freq_factor {high}")
    # The field beside the object comes before that inside it.
    source = raw if raw.get("original_max_position_embeddings") is not None else given
    original = _size(source, "original_max_position_embeddings", context, limit=1 << 31)
    return Rope(theta, "llama3", factor, low, high, original)


def _windows(raw: Mapping[str, Any], declared: Architecture, layers: int) -> tuple[int | None, ...]:
    window = declared.window
    if declared.windows != "never" and "sliding_window" in raw:
        window = None if raw["sliding_window"] is None else _size(raw, "sliding_window", limit=1 << 31)
    if declared.windows == "never" or (declared.windows == "by layer_types" and not _flag(raw, "use_sliding_window")):
        window = None
    sliding = [window is not None] * layers
    kinds = raw.get("layer_types")
    if declared.windows == "by layer_types" and kinds is None and window is not None:
        first = _count(raw, "max_window_layers", 28)
        sliding = [layer >= first for layer in range(layers)]
    if kinds is not None:
        stated = _layer_kinds(kinds, layers)
        if declared.windows == "by layer_types" and window is not None:
            sliding = stated
        elif stated != sliding:
            raise UnsupportedModelError("config.json: layer_types contradict the sliding window; not supported")
    return tuple(window if slides else None for slides in sliding)


def _layer_kinds(kinds: Any, layers: int) -> list[bool]:
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"config.json: layer_types: expected a list of {layers} kinds, found {str(kinds)[:80]}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"config.json: layer type {kind!r} is not supported")
    return [kind == "sliding_attention" for kind in kinds]


def _bias(raw: Mapping[str, Any], rule: Biases) -> bool:
    return rule == "always" or (rule == "attention_bias" and _flag(raw, "attention_bias"))


def _head_dim(raw: Mapping[str, Any], declared: Architecture, hidden: int, heads: int) -> int | None:
    """Return head_dim where the field is absent or null; None where it is not needed or may not be null."""
    if raw.get("head_dim") is not None:
        return None
    if declared.head_dim is not None:
        return None if "head_dim" in raw else declared.head_dim
    if hidden % heads:
        raise ConfigError(f"config.json: num_attention_heads {heads} does not divide hidden_size {hidden}")
    return hidden // heads


def _count(raw: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = raw.get(field)
    if value is None:
        value = default
    if type(value) is not int or value < 0:
        raise ConfigError(f"config.json: {field}: expected a whole number, found {value!r}")
    return value


def _size(raw: Mapping[str, Any], field: str, default: int | None = None, limit: int = _LARGEST) -> int:
    value = _count(raw, field, default)
    if not 0 < value <= limit:
        raise ConfigError(f"config.json: {field}: expected 1 to {limit}, found {value}")
    return value


def _number(raw: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = raw.get(field)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {field}: expected a positive number, found {value!r}")
    return float(value)


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field)
    if value not in (None, True, False) or type(value) is int:
        raise ConfigError(f"config.json: {field}: expected true or false, found {value!r}")
    return bool(value)
