"""config.json, which is untrusted, as a checked record: what the decoder computes and nothing else."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any

from bincompress.errors import CheckpointError
from bincompress.model.architectures import (
    ACTIVATIONS,
    ARCHITECTURES,
    OTHER_FAMILIES,
    UNHANDLED,
    Activation,
    Architecture,
    Biases,
    Mixture,
    Names,
    QkNorm,
)
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.model.fields import LARGEST_POSITION, count, flag, number, size
from bincompress.model.positions import Window, positions
from bincompress.model.rope import Rope
from bincompress.sources.bitnet import checked, is_bitnet

_MOST_LAYERS = 4096
_MOST_EXPERTS = 4096
_MOST_IN_ALL = 1 << 16  # experts of all layers: each has names, which are made before any weight is seen
_PRE_ATTENTION = 256  # query_pre_attn_scalar where absent


@dataclass(frozen=True)
class Experts:
    """The mixtures of experts of a model's layers."""

    count: int
    chosen: int  # for each token
    inner: int  # rows of an expert's gate
    normalized: bool  # whether the weights of the chosen ones are made to sum to one
    layers: tuple[bool, ...]  # per layer: whether it has them, and no dense MLP


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and options."""

    architecture: str
    vocab: int
    hidden: int
    inner: int  # rows of the gate of the dense layers, or of the experts where there are none
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    context: int
    ropes: tuple[Rope, ...]  # per layer
    windows: tuple[Window, ...]  # per layer
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = ""
    norm_offset: float = 0.0  # what is added to every stored weight of a norm
    activation: Activation = "silu"
    query_scale: float | None = None  # of queries before their product with keys; None: 1 / sqrt(head_dim)
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and the MLP add to the stream
    logit_divisor: float = 1.0
    rounds_inputs: bool = False  # of the layers' matrices: to 8 bits a token, as BitNet is trained with
    experts: Experts | None = None
    logit_cap: float | None = None  # logits become cap * tanh(logits / cap)
    names: Names = dataclass_field(default_factory=Names)  # as this model's tensors are called
    notes: tuple[str, ...] = dataclass_field(default=(), compare=False)  # what a user should know of how it is read

    @property
    def declaration(self) -> Architecture:
        """The architecture's entry in the registry, with this model's names of tensors."""
        return replace(ARCHITECTURES[self.architecture], names=self.names)

    @property
    def rope(self) -> Rope:
        """The rotary embedding of the first layer."""
        return self.ropes[0]

    @property
    def context_limit(self) -> str:
        """Return, in words, what limits the context."""
        kind = next((rope.kind for rope in self.ropes if rope.most_positions == self.context), None)
        return "this model's limit" if kind is None else f"rope type {kind!r} is not supported beyond that"

    def of_layer(self, layer: int) -> "ModelConfig":
        """Return the config of a model that has this layer alone."""
        experts = self.experts and replace(self.experts, layers=(self.experts.layers[layer],))
        return replace(self, layers=1, ropes=(self.ropes[layer],), windows=(self.windows[layer],), experts=experts)

    def experts_of(self, layer: int) -> Experts | None:
        """Return the mixture of experts that a layer has in place of a dense MLP, if it has one."""
        return self.experts if self.experts is not None and self.experts.layers[layer] else None

    def inputs_of_layer(self, layer: int) -> dict[str, list[str]]:
        """Return a layer's distinct inputs in their order, by the first matrix that reads each: its readers."""
        return {key: readers for stage in self.stages_of_layer(layer) for key, readers in stage.items()}

    def stages_of_layer(self, layer: int) -> list[dict[str, list[str]]]:
        """Return `inputs_of_layer` in the four steps of a layer: of qkv, out, gate and up, and down.

        Each expert has inputs of its own in the last two: those of the tokens that chose it.
        """
        names, experts = self.names, self.experts_of(layer)
        qkv, out = ([names.of_layer(layer, f"{part}.weight") for part in group] for group in (names.qkv, (names.out,)))
        if experts is None:
            mlp = [
                [[names.of_layer(layer, f"{part}.weight") for part in group]]
                for group in (names.gate_up, (names.down,))
            ]
        else:
            found = [names.of_expert(layer, expert) for expert in range(experts.count)]
            mlp = [[list(gate_up) for gate_up, _ in found], [[down] for _, down in found]]
        return [{group[0]: group for group in stage} for stage in ([qkv], [out], *mlp)]

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
            for norm in (names.input_norm, names.post_norm, names.out_norm, names.down_norm):
                if norm:
                    shapes[names.of_layer(layer, norm)] = (self.hidden,)
            for norm, width in ((names.mixed_norm, queries), (names.inner_norm, self.inner)):
                if norm:
                    shapes[names.of_layer(layer, norm)] = (width,)
            if self.qk_norm:
                whole = self.qk_norm == "whole"
                shapes[names.of_layer(layer, names.q_norm)] = (queries if whole else self.head_dim,)
                shapes[names.of_layer(layer, names.k_norm)] = (keys if whole else self.head_dim,)
            experts = self.experts_of(layer)
            if experts is not None:
                shapes |= self._expert_tensors(experts, layer)
            for part, (rows, cols, bias) in matrices.items():
                if experts is not None and part in (gate, up, names.down):
                    continue
                shapes[names.of_layer(layer, part + ".weight")] = (rows, cols)
                if bias:
                    shapes[names.of_layer(layer, part + ".bias")] = (rows,)
        shapes[names.norm] = (self.hidden,)
        if not self.tied:
            shapes[names.head] = (self.vocab, self.hidden)
        return shapes

    def _expert_tensors(self, experts: Experts, layer: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {self.router_of(layer): (experts.count, self.hidden)}
        for expert in range(experts.count):
            (gate, up), down = self.names.of_expert(layer, expert)
            shapes |= {gate: (experts.inner, self.hidden), up: (experts.inner, self.hidden)}
            shapes[down] = (self.hidden, experts.inner)
        return shapes

    def router_of(self, layer: int) -> str:
        """Return the name of the matrix that chooses a layer's experts."""
        return self.names.of_layer(layer, f"{self.names.router}.weight")


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """Check config.json's values and return the record; raise UnsupportedModelError or ConfigError by name."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json: expected an object, found {type(raw).__name__}")
    name = _architecture(raw)
    declared = ARCHITECTURES[name]
    _refuse_unhandled(raw, declared)
    hidden = size(raw, "hidden_size")
    heads = size(raw, "num_attention_heads")
    layers = size(raw, "num_hidden_layers", limit=_MOST_LAYERS)
    # null means as many as heads; a field that is absent has the default of the architecture.
    kv_default = heads if "num_key_value_heads" in raw else declared.kv_heads or heads
    kv_heads = size(raw, "num_key_value_heads", kv_default)
    if heads % kv_heads:
        raise ConfigError(f"config.json: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    head_dim = size(raw, "head_dim", _head_dim(raw, declared, hidden, heads))
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
    context = size(raw, "max_position_embeddings", declared.context, limit=LARGEST_POSITION)

    def multiplier(field: str) -> float:
        return number(raw, field, 1.0) if field in declared.reads else 1.0

    ropes, windows = positions(raw, declared, layers, head_dim, context)
    context = min(context, *(rope.most_positions or context for rope in ropes))
    experts = _experts(raw, declared.mixture, layers) if declared.mixture is not None else None
    config = ModelConfig(
        architecture=name,
        vocab=size(raw, "vocab_size"),
        hidden=hidden,
        inner=size(raw, "intermediate_size") if experts is None or not all(experts.layers) else experts.inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=number(raw, "rms_norm_eps", declared.epsilon),
        context=context,
        ropes=ropes,
        windows=windows,
        tied=flag(raw, "tie_word_embeddings", declared.tied),
        qkv_bias=_bias(raw, declared.qkv_bias),
        out_bias=_bias(raw, declared.out_bias),
        mlp_bias=declared.mlp_bias and flag(raw, "mlp_bias"),
        qk_norm=declared.qk_norm,
        norm_offset=declared.norm_offset,
        activation=_activation(raw, declared),
        query_scale=_query_scale(raw, declared),
        embedding_multiplier=math.sqrt(hidden) if declared.embedding_scaled else multiplier("embedding_multiplier"),
        residual_multiplier=multiplier("residual_multiplier"),
        logit_divisor=multiplier("logits_scaling"),
        experts=experts,
        logit_cap=_logit_cap(raw, declared),
        rounds_inputs=is_bitnet(raw),
        names=declared.names,
    )
    if config.rounds_inputs and config.experts is not None:
        raise UnsupportedModelError("config.json: quantization_config = 'bitnet' is not supported for experts")
    if config.rounds_inputs and (config.qkv_bias or config.out_bias or config.mlp_bias):
        raise UnsupportedModelError("config.json: biases of BitNet's linear layers are not supported")
    return config


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
    own = () if chosen is None else (chosen, *(chosen.replace("ForCausalLM", end) for end in ("Model", "TextModel")))
    for name in names:
        if chosen is None or (name not in own and name.lower().startswith(OTHER_FAMILIES)):
            raise UnsupportedModelError(
                f"config.json: architecture {name} is not supported; known: {known} (model_type: {model_type!r})"
            )
    if chosen is None:
        raise UnsupportedModelError(f"config.json: model_type {model_type!r} is not supported; known: {known}")
    return chosen


def _refuse_unhandled(raw: Mapping[str, Any], declared: Architecture) -> None:
    for field, neutral in UNHANDLED.items():
        value = raw.get(field)
        if field in declared.reads:
            continue
        if field == "quantization_config" and is_bitnet(raw):
            try:
                checked(raw)
            except CheckpointError as error:
                raise UnsupportedModelError(str(error)) from None
            continue
        if not any(value is entry or (type(value) is type(entry) and value == entry) for entry in neutral):
            shown = value.get("quant_method", "given") if isinstance(value, Mapping) else value
            raise UnsupportedModelError(f"config.json: {field} = {shown!r} is not supported; only {neutral[0]!r} is")


def _experts(raw: Mapping[str, Any], mixture: Mixture, layers: int) -> Experts | None:
    """Return the layers' mixture of experts; None where every layer has a dense MLP."""
    # transformers takes either name for the number.
    given = {field: raw[field] for field in ("num_experts", "num_local_experts") if raw.get(field) is not None}
    if len(given) == 2 and len(set(map(repr, given.values()))) == 2:
        raise ConfigError(
            f"config.json: num_experts {given['num_experts']!r} contradicts num_local_experts "
            f"{given['num_local_experts']!r}"
        )
    field = next(iter(given), "num_experts")
    number_of = count(raw, field, mixture.count)
    if number_of > _MOST_EXPERTS:
        raise ConfigError(f"config.json: {field}: expected at most {_MOST_EXPERTS}, found {number_of}")
    sparse = [number_of > 0] * layers
    if mixture.dense_layers:
        step, dense = size(raw, "decoder_sparse_step", 1), _dense_layers(raw)
        sparse = [number_of > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    elif not number_of:
        raise ConfigError(f"config.json: {field}: expected 1 to {_MOST_EXPERTS}, found 0")
    if not any(sparse):
        return None
    if number_of * sum(sparse) > _MOST_IN_ALL:
        raise ConfigError(
            f"config.json: {field} {number_of} in {sum(sparse)} layers: expected at most {_MOST_IN_ALL} experts in all"
        )
    chosen = size(raw, "num_experts_per_tok", mixture.chosen)
    if chosen > number_of:
        raise ConfigError(
            f"config.json: num_experts_per_tok {chosen} is more than the {number_of} experts that {field} gives"
        )
    normalized = flag(raw, "norm_topk_prob") if mixture.normalized is None else mixture.normalized
    return Experts(number_of, chosen, size(raw, mixture.inner_field, mixture.inner), normalized, tuple(sparse))


def _dense_layers(raw: Mapping[str, Any]) -> list[int]:
    found = raw.get("mlp_only_layers")
    listed = [] if found is None else found
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise ConfigError(f"config.json: mlp_only_layers: expected a list of numbers of layers, found {found!r:.80}")
    return listed


def _activation(raw: Mapping[str, Any], declared: Architecture) -> Activation:
    found = raw.get(declared.activation_field, declared.activation)
    if not isinstance(found, str) or found not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedModelError(
            f"config.json: {declared.activation_field} = {found!r} is not supported; known: {known}"
        )
    return ACTIVATIONS[found]


def _query_scale(raw: Mapping[str, Any], declared: Architecture) -> float | None:
    if "query_pre_attn_scalar" in declared.reads:
        return 1.0 / math.sqrt(number(raw, "query_pre_attn_scalar", _PRE_ATTENTION))
    return number(raw, "attention_multiplier", 1.0) if "attention_multiplier" in declared.reads else None


def _logit_cap(raw: Mapping[str, Any], declared: Architecture) -> float | None:
    field = "final_logit_softcapping"
    return number(raw, field) if field in declared.reads and raw.get(field) is not None else None


def _bias(raw: Mapping[str, Any], rule: Biases) -> bool:
    return rule == "always" or (rule == "attention_bias" and flag(raw, "attention_bias"))


def _head_dim(raw: Mapping[str, Any], declared: Architecture, hidden: int, heads: int) -> int | None:
    """Return head_dim where the field is absent or null; None where it is not needed or may not be null."""
    if raw.get("head_dim") is not None:
        return None
    if declared.head_dim is not None:
        return None if "head_dim" in raw else declared.head_dim
    if hidden % heads:
        raise ConfigError(f"config.json: num_attention_heads {heads} does not divide hidden_size {hidden}")
    return hidden // heads
