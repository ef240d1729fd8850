"""config.json, which is untrusted, as a checked record: what the decoder computes and nothing else."""

import math
from collections.abc import Mapping
from typing import Any

from bincompress.model.architectures import ARCHITECTURES
from bincompress.model.declaration import ACTIVATIONS, Activation, Architecture, BiasRule
from bincompress.model.errors import ConfigError, UnsupportedModelError
from bincompress.model.expert_fields import Experts as Experts
from bincompress.model.expert_fields import read_experts
from bincompress.model.fields import LARGEST_POSITION, flag, number, size
from bincompress.model.model_config import ModelConfig as ModelConfig
from bincompress.model.positions import positions
from bincompress.model.recurrence_fields import read_recurrent
from bincompress.model.supported import architecture_of, refuse_unhandled
from bincompress.sources.bitnet import is_bitnet
from bincompress.sources.multimodal import is_multimodal, text_config

_MOST_LAYERS = 4096
_TEXT_ALONE = "the checkpoint's language model is packed and run; what sees or hears beside it is kept and not used"
_PRE_ATTENTION = 256  # query_pre_attn_scalar where absent


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """Check config.json's values and return the record; raise UnsupportedModelError or ConfigError by name."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json: expected an object, found {type(raw).__name__}")
    whole, raw = raw, text_config(raw)
    name = architecture_of(raw)
    declared = ARCHITECTURES[name]
    refuse_unhandled(raw, declared)
    hidden = size(raw, "hidden_size")
    layers = size(raw, "num_hidden_layers", limit=_MOST_LAYERS)
    heads, kv_heads, head_dim = _heads(raw, declared, hidden)
    context = size(raw, "max_position_embeddings", declared.context, limit=LARGEST_POSITION)

    def multiplier(field: str) -> float:
        return number(raw, field, 1.0) if field in declared.reads else 1.0

    ropes, windows = positions(raw, declared, layers, head_dim, context)
    context = min(context, *(rope.most_positions or context for rope in ropes))
    recurrence = declared.recurrence
    experts = read_experts(raw, declared.mixture, layers) if declared.mixture is not None else None
    config = ModelConfig(
        architecture=name,
        vocab=size(raw, "vocab_size"),
        hidden=hidden,
        inner=_inner(raw, declared) if experts is None or not all(experts.layers) else experts.inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_epsilon=number(raw, declared.epsilon_field, declared.epsilon),
        context=context,
        ropes=ropes,
        windows=windows,
        rotates_in_pairs=declared.rotates_in_pairs,
        tied=_tied(raw, declared),
        recurrent=read_recurrent(raw, recurrence, layers, hidden) if recurrence is not None else None,
        gated=declared.gated,
        qkv_bias=_bias(raw, declared, declared.biases.qkv),
        out_bias=_bias(raw, declared, declared.biases.out),
        mlp_bias=declared.biases.mlp and flag(raw, "mlp_bias"),
        qk_norm=declared.qk_norm if not declared.qk_norm_field or flag(raw, declared.qk_norm_field) else "",
        norm_offset=declared.norm_offset,
        sinks=bool(declared.names.sinks),
        activation=_activation(raw, declared),
        query_scale=_query_scale(raw, declared),
        embedding_multiplier=math.sqrt(hidden) if declared.embedding_scaled else multiplier("embedding_multiplier"),
        residual_multiplier=multiplier("residual_multiplier"),
        logit_divisor=multiplier("logits_scaling"),
        experts=experts,
        logit_cap=_logit_cap(raw, declared),
        rounds_inputs=is_bitnet(raw),
        names=declared.names,
        notes=(_TEXT_ALONE,) if is_multimodal(whole) else (),
    )
    if config.rounds_inputs:
        _refuse_with_rounded_inputs(config)
    return config


def _heads(raw: Mapping[str, Any], declared: Architecture, hidden: int) -> tuple[int, int, int]:
    """Return the heads, those of keys and values, and the items of each."""
    heads = size(raw, "num_attention_heads")
    # null means as many as heads; a field that is absent has the default of the architecture.
    kv_default = heads if "num_key_value_heads" in raw else declared.kv_heads or heads
    kv_heads = size(raw, "num_key_value_heads", kv_default)
    if heads % kv_heads:
        raise ConfigError(f"config.json: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    head_dim = size(raw, "head_dim", _head_dim(raw, declared, hidden, heads))
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
    return heads, kv_heads, head_dim


def _refuse_with_rounded_inputs(config: ModelConfig) -> None:
    if config.experts is not None:
        raise UnsupportedModelError("config.json: quantization_config = 'bitnet' is not supported for experts")
    if config.recurrent is not None:
        raise UnsupportedModelError(
            "config.json: quantization_config = 'bitnet' is not supported for layers without attention"
        )
    if config.qkv_bias or config.out_bias or config.mlp_bias:
        raise UnsupportedModelError("config.json: biases of BitNet's linear layers are not supported")


def _activation(raw: Mapping[str, Any], declared: Architecture) -> Activation:
    found = raw.get(declared.activation_field, declared.activation)
    found = declared.activation_names.get(found, found) if isinstance(found, str) else found
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


def _inner(raw: Mapping[str, Any], declared: Architecture) -> int:
    """Return the rows of the gate of a dense layer, adjusted as transformers' LFM2 adjusts them."""
    field = "block_ff_dim" if declared.adjusted_inner and "block_ff_dim" in raw else declared.inner_field
    inner = size(raw, field)
    if not declared.adjusted_inner or not flag(raw, "block_auto_adjust_ff_dim", True):
        return inner
    inner = int(2 * inner / 3)
    if raw.get("block_ffn_dim_multiplier", 1.0) is not None:
        multiple = size(raw, "block_multiple_of", 256)
        inner = int(number(raw, "block_ffn_dim_multiplier", 1.0) * inner)
        inner = multiple * -(-inner // multiple)
    return size({field: inner}, field)


def _tied(raw: Mapping[str, Any], declared: Architecture) -> bool:
    field = declared.tied_field if declared.tied_field in raw else "tie_word_embeddings"
    return flag(raw, field, declared.tied)


def _bias(raw: Mapping[str, Any], declared: Architecture, rule: BiasRule) -> bool:
    default = declared.biases.default and rule != "attention_out_bias"
    return rule == "always" or (rule != "never" and flag(raw, rule, default))


def _head_dim(raw: Mapping[str, Any], declared: Architecture, hidden: int, heads: int) -> int | None:
    """Return head_dim where the field is absent or null; None where it is not needed or may not be null."""
    if raw.get("head_dim") is not None:
        return None
    if declared.head_dim is not None:
        return None if "head_dim" in raw else declared.head_dim
    if hidden % heads:
        raise ConfigError(f"config.json: num_attention_heads {heads} does not divide hidden_size {hidden}")
    return hidden // heads
